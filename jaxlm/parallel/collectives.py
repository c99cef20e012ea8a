"""The collectives of a compiled step, read from its HLO: kind, how often, how many bytes, over which mesh axes."""

import itertools
import re
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from jaxlm.parallel.rules import FLAG

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
"""Bytes of an element where they are not 4 (or, of eight-bit floats, 1)."""

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"\b(?:to_apply|body|condition|calls|true_computation|false_computation|branch_computations|called_computations)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind over the same mesh axes in one execution of the program."""

    kind: str
    axes: str
    count: int
    """Executions on one device; those inside a loop counted as often as it turns."""
    bytes: int
    """Bytes of their results on one device, summed over the executions."""


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """Read the collectives of `hlo` (`compiled.as_text()`), largest first.

    A loop whose trip count XLA does not state is counted once, and a branch as if it were always taken.
    """
    runs = _executions(hlo)
    total: dict[tuple[str, str], tuple[int, int]] = {}
    for computation, line in _lines(hlo):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        kind = match[2].removesuffix("-start")
        if kind not in KINDS:
            continue
        times = runs.get(computation, 1)
        key = (kind, _axes(line, mesh))
        count, size = total.get(key, (0, 0))
        total[key] = (count + times, size + times * _result_bytes(match[1], match[2]))
    rows = [Collective(kind=k, axes=a, count=c, bytes=b) for (k, a), (c, b) in total.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def axes_in_branches(hlo: str, mesh: Mesh) -> set[str]:
    """The mesh axes of all collectives that stand in a branch: each group must take the same branch, or it hangs."""
    calls: dict[str, set[str]] = {}
    reached: list[str] = []
    for computation, line in _lines(hlo):
        called = {n.strip() for one, more in _CALLED.findall(line) for n in (one or more).replace("%", "").split(",")}
        calls.setdefault(computation, set()).update(called)
        if " conditional(" in line:
            reached.extend(called)
    inside: set[str] = set()
    while reached:
        name = reached.pop()
        if name not in inside:
            inside.add(name)
            reached.extend(calls.get(name, ()))
    found = set()
    for computation, line in _lines(hlo):
        match = _INSTRUCTION.match(line)
        if computation in inside and match and match[2].removesuffix("-start") in KINDS:
            found.add(_axes(line, mesh))
    return found


def _lines(hlo: str):
    """Each instruction line with the computation it stands in."""
    computation = ""
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header and " = " not in line.split("{")[0]:
            computation = header[1]
        else:
            yield computation, line


def _executions(hlo: str) -> dict[str, int]:
    """How often each computation runs in one execution of the program."""
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = ""
    for line in hlo.splitlines():
        if line.startswith("ENTRY"):
            entry = _COMPUTATION.match(line)[1]  # type: ignore[index]
    for computation, line in _lines(hlo):
        trips = _TRIPS.search(line)
        times = int(trips[1]) if trips and " while(" in line else 1
        for one, several in _CALLED.findall(line):
            for name in (one or several).replace("%", "").split(","):
                calls.setdefault(computation, []).append((name.strip(), times))
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for called, turns in calls.get(name, ()):
            visit(called, times * turns)

    visit(entry, 1)
    return runs


def _result_bytes(result: str, opcode: str) -> int:
    arrays = [
        int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64)) * _element_bytes(dtype)
        for dtype, shape in _ARRAY.findall(result)
    ]
    # What the start of an asynchronous collective returns beside its results differs: operands, operands and contexts.
    if opcode == "collective-permute-start":
        return arrays[1]
    return sum(arrays[len(arrays) // 2 :]) if opcode == "all-gather-start" else sum(arrays)


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
