"""The collectives of a compiled step, read from its HLO: kind, how often, how many bytes, over which mesh axes."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from jaxlm.config.mesh_spec import AXES
from jaxlm.parallel import hlo as programs
from jaxlm.parallel.hlo import Computation, Instruction, Program
from jaxlm.parallel.rules import FLAG

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
"""Bytes of an element where they are not 4 (or, of eight-bit floats, 1)."""

WORK = ("dot", "convolution", "custom-call", "while", "conditional", "call")
"""Operations, alone or within a fusion, that take long enough to hide a collective that runs beside them."""

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes in one execution of the program."""

    kind: str
    axes: str
    count: int
    """Executions on one device; those inside a loop counted as often as it turns."""
    bytes: int
    """Bytes of their results on one device, summed over the executions. The result of a ragged all-to-all is a buffer
    with room for the most that could come; what travels is known only as it runs."""
    overlapped: int = 0
    """Of the executions, those scheduled beside matrix products, kernels or loops, which hide them."""

    def sent(self, mesh: Mesh) -> float:
        """Bytes that a device sends, where they go around a ring of the n devices of a group: (n - 1) / n of an array
        to gather it, to sum and scatter it, or to exchange its parts; twice that to sum it whole; all of a permuted one
        (Thakur et al. 2005, Optimization of collective communication operations in MPICH).

        Raises:
            ValueError: the groups follow no mesh axes, so that it is not known how large they are.
        """
        if self.axes == "other":
            raise ValueError(f"{self.count} {self.kind}s run along no axes of the mesh")
        devices = math.prod(mesh.shape[AXES[axis]] for axis in self.axes.split("+") if axis in AXES)
        share = (devices - 1) / devices
        sizes = {
            "all-reduce": 2 * self.bytes,
            "reduce-scatter": devices * self.bytes,
            "collective-permute": self.bytes / share if share else 0,
        }
        return share * sizes.get(self.kind, self.bytes)


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Read the collectives of `hlo` (`compiled.as_text()`), largest first.

    A loop whose trip count XLA does not state and its condition does not show is counted once, and a branch as if it
    were always taken.
    """
    program = programs.parse(hlo)
    total: dict[tuple[str, str], Collective] = {}
    for times, found in _all(program):
        key = (found.kind, _axes(found.groups, mesh))
        sofar = total.get(key, Collective(kind=key[0], axes=key[1], count=0, bytes=0))
        total[key] = replace(
            sofar,
            count=sofar.count + times,
            bytes=sofar.bytes + times * sum(_array_bytes(found.result)),
            overlapped=sofar.overlapped + times * found.overlapped,
        )
    return sorted(total.values(), key=lambda row: -row.bytes)


def axes_in_branches(hlo: str, mesh: Mesh) -> set[str]:
    """The mesh axes of all collectives that stand in a branch: each group must take the same branch, or it hangs."""
    program = programs.parse(hlo)
    everything = [i for computation in program.computations.values() for i in computation.instructions.values()]
    reached = [
        name for instruction in everything if instruction.opcode == "conditional" for name in instruction.called()
    ]
    inside: dict[str, list[Instruction]] = {}
    while reached:
        name = reached.pop()
        if name not in inside:
            inside[name] = list(program.computations.get(name, Computation()).instructions.values())
            reached.extend(other for instruction in inside[name] for other in instruction.called())
    found = [i for instructions in inside.values() for i in instructions if i.opcode.removesuffix("-start") in KINDS]
    return {_axes(instruction.rest, mesh) for instruction in found}


@dataclass(frozen=True, kw_only=True)
class _Found:
    """One collective instruction, or the several that make up an asynchronous one."""

    kind: str
    result: str
    groups: str
    """What the instruction says of who talks to whom."""
    overlapped: bool = False


def _all(program: Program) -> Iterator[tuple[int, _Found]]:
    """Each collective with the number of its executions."""
    runs = program.executions()
    fused = {
        name
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "fusion"
        for name in instruction.called("calls")
    }
    for name, computation in program.computations.items():
        if name not in fused:
            for found in (*_written_out(program, computation), *_in_fusions(program, computation)):
                yield runs.get(name, 1), found


def _written_out(program: Program, computation: Computation) -> Iterator[_Found]:
    """Collectives that are instructions of their own: one, or a start and a done."""
    order = list(computation.instructions.values())
    for position, instruction in enumerate(order):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        result, overlapped = instruction.result, False
        if instruction.opcode != kind:
            # A start's own result holds operands and contexts too, in an order that differs by kind.
            for end in range(position + 1, len(order)):
                if order[end].opcode == f"{kind}-done" and instruction.name in order[end].operands:
                    result = order[end].result
                    overlapped = any(_works(program, other) for other in order[position:end])
                    break
        yield _Found(kind=kind, result=result, groups=instruction.rest, overlapped=overlapped)


def _in_fusions(program: Program, computation: Computation) -> Iterator[_Found]:
    """Collectives that TPU's compiler writes as fusions.

    A reduce-scatter is a fusion that reduces and slices. An asynchronous collective is a chain of fusions: one that
    starts it, some that carry it on while they compute, one that ends it. Each holds the collective again.
    """
    found: list[_Found] = []
    chains: dict[str, int] = {}
    for fusion in computation.instructions.values():
        if fusion.opcode == "get-tuple-element" and fusion.operands[0] in chains:
            chains[fusion.name] = chains[fusion.operands[0]]
        if fusion.opcode != "fusion":
            continue
        (name,) = fusion.called("calls")
        computes = name.startswith("async_collective_fusion") and _works(program, fusion)
        before = {chains[operand] for operand in fusion.operands if operand in chains}
        for inner in _fused(program, name):
            # What only reads the result of a chain may hold a collective of its own.
            linked = [link for link in before if _channel(found[link].groups) == _channel(inner.rest)]
            for link in linked:
                chains[fusion.name] = link
                found[link] = replace(found[link], overlapped=found[link].overlapped or computes)
            if not linked:
                scatters = name.startswith("all-reduce-scatter")
                kind, result = ("reduce-scatter", fusion.result) if scatters else (inner.opcode, inner.result)
                chains[fusion.name] = len(found)
                found.append(_Found(kind=kind, result=result, groups=inner.rest, overlapped=computes))
    yield from found


def _channel(rest: str) -> str:
    """The number that all parts of a collective have in common."""
    return rest.partition("channel_id=")[2].partition(",")[0]


def _fused(program: Program, name: str) -> Iterator[Instruction]:
    """Collectives of a fusion's computation, and of fusions within it."""
    for instruction in program.computations.get(name, Computation()).instructions.values():
        if instruction.opcode in KINDS:
            yield instruction
        elif instruction.opcode == "fusion":
            yield from _fused(program, instruction.called("calls")[0])


def _works(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode != "fusion":
        return instruction.opcode in WORK
    inner = program.computations.get(instruction.called("calls")[0], Computation())
    return any(_works(program, other) for other in inner.instructions.values())


def _array_bytes(result: str) -> list[int]:
    return [
        int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)) * _element_bytes(dtype)
        for dtype, shape in _ARRAY.findall(result)
    ]


def _element_bytes(dtype: str) -> int:
    return 1 if dtype.startswith("f8") else BYTES.get(dtype, 4)


def _axes(line: str, mesh: Mesh) -> str:
    """The mesh axes (command-line names) along which the groups of a collective run."""
    groups = _groups(line, mesh.size)
    if groups is None:
        groups = [list(range(mesh.size))]
    wanted = {frozenset(group) for group in groups if len(group) > 1}
    if not wanted:
        return "none"
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    names = [(i, axis) for i, axis in enumerate(mesh.axis_names) if mesh.shape[axis] > 1]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            moved = np.moveaxis(ids, [i for i, _ in chosen], range(-count, 0))
            size = int(np.prod([mesh.shape[axis] for _, axis in chosen]))
            found = {frozenset(row) for row in moved.reshape(-1, size).tolist()}
            if found == wanted or ("source_target_pairs" in line and all(any(w <= f for f in found) for w in wanted)):
                return "+".join(FLAG[axis] for _, axis in chosen)
    return "other"


def _groups(line: str, devices: int) -> list[list[int]] | None:
    """The groups in which a collective talks, as device numbers; None means all devices together."""
    listed = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", line)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line)
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, ?device_ids=\((.*?\)?)\))? ?\{([^}]*)\}", line)
    if listed:
        return [[int(n) for n in group.split(",") if n] for group in re.findall(r"\{([\d,]*)\}", listed[1])]
    if iota:
        return _iota(iota[3], devices).reshape(int(iota[1]), int(iota[2])).tolist()
    if named:
        return _along_axes(named[1], named[3], _iota(named[2] or f"[{devices}]", devices))
    return None


def _iota(text: str, devices: int) -> np.ndarray:
    """Device numbers in the order `[4,2]T(1,0)`: counted through that shape, then transposed. Or listed: `3,1,0,2`."""
    if not text.startswith("["):
        return np.array([int(n) for n in text.split(",")])
    shape, _, permutation = text[1:].rstrip(")").partition("]")
    ids = np.arange(devices).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in permutation[2:].split(",")]) if permutation else ids


def _along_axes(mesh_axes: str, wanted: str, ids: np.ndarray) -> list[list[int]]:
    """Groups along axes of a mesh the compiler made up: `'a'=4,'b'=2` and `'b'`, or `'a':(2)2` for a factor of one."""
    factors: list[int] = []
    chosen: list[int] = []
    references = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", wanted)
    for name, size in re.findall(r"'(\w+)'=(\d+)", mesh_axes):
        spans = [(int(before or 1), int(length or size)) for axis, before, length in references if axis == name]
        cuts = sorted({1, int(size), *(b for b, _ in spans), *(b * n for b, n in spans)})
        for low, high in itertools.pairwise(cuts):
            if any(before <= low < before * length for before, length in spans):
                chosen.append(len(factors))
            factors.append(high // low)
    moved = np.moveaxis(ids.reshape(factors or [1]), chosen, range(-len(chosen), 0))
    return moved.reshape(-1, int(np.prod([factors[i] for i in chosen], dtype=np.int64))).tolist()
