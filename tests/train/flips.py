"""`make flips`: flip one bit of a run's numbers, thousands of times, and see what notices.

A small decoder trains on a mesh of simulated devices. After one of the steps between two saves, or within it, one bit
of one number is flipped, and the steps up to the next save are done as the loop does them. Three things may notice:

- watch: the loop's watch over losses and gradients (`jaxlm.train.watch`) gives up, and the run goes back;
- checksum: the comparison of copies before the save (`jaxlm.train.replicas`), and the run goes back;
- replay: `python -m jaxlm.train replay`, run by a person, of these steps: a logged number or an array of the checkpoint
  is not bit for bit that of the steps without the flip, which are what it computes.

Where nothing notices, either no bit of what the run logs, saves or goes on with is different any more (harmless), or
something is, and this is a miss.
"""

import dataclasses
import json
import platform
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.provenance import git_revision
from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.files import write_atomically
from jaxlm.config.load import load
from jaxlm.train import local
from jaxlm.train import step as steps
from jaxlm.train.assemble import Assembly
from jaxlm.train.replay import COMPARED
from jaxlm.train.replicas import Replicas
from jaxlm.train.watch import WINDOW, BadNumbers, Watch
from tests.train.battery import LLAMA, batch, build, configuration, place

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "results" / "flips.json"

BEGIN, END = "<!-- flips: make flips -->\n", "<!-- end -->"

EVERY = 8
"""Steps from one save to the next."""

MESHES = ("dp4", "dp2,tp2", "dp2,fsdp2", "fsdp4", "dp4 zero")
"""zero: --optimizer.shard=data."""

BITS = {"sign": 31, "high exponent": 30, "low exponent": 23, "high mantissa": 22, "low mantissa": 0}
"""Name -> its place in a float32."""

TARGETS = {
    "parameters, one copy": "a parameter, on one of the devices that hold it",
    "parameters, all copies": "a parameter, wherever it is held",
    "first moments, one copy": "Adam's mean of gradients, on one of the devices that hold it",
    "first moments, all copies": "the same, wherever it is held",
    "second moments, one copy": "Adam's mean of squares, on one of the devices that hold it",
    "second moments, all copies": "the same, wherever it is held",
    "gradients, before their sum": "what one of the devices that share the batch adds to the sum over `dp`",
    "gradients, after their sum": "the sum, on one device",
}
"""Name -> what is flipped."""

OUTCOMES = ("watch", "checksum", "replay", "harmless", "missed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m tests.train.flips: flip bits of runs on several meshes, and count what notices."""

    out: str | None = None
    """JSON file of the results."""
    page: bool = False
    """Whether to write the tables of docs/reliability.md anew."""
    flips: int = 40
    """Flips of each bit of each target on each mesh."""
    mesh: str | None = None
    """The mesh (default: all)."""
    seed: int = 0
    """Seed of where the flips fall."""


class Flip(NamedTuple):
    """One bit of one number, as the step is told of it: int32 scalars."""

    where: int = 0
    """0: nowhere; 1: in a gradient before its sum; 2: after."""
    leaf: int = 0
    device: int = 0
    """Its place in the mesh; before the sum, among those that have rows of their own."""
    at: int = 0
    """Number of the element in that device's part."""
    bit: int = 0


def main(argv: list[str]) -> int:
    """Write the results. Exit code 1 where something that is different was noticed by nothing at all."""
    options, _ = load(Options, argv)
    if options.mesh not in (None, *MESHES):
        raise UserError(f"--mesh={options.mesh} is none of {'; '.join(MESHES)}")
    about = {"command": f"python -m tests.train.flips {' '.join(argv)}", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    about |= {"git_revision": git_revision(), "python": platform.python_version(), "seed": options.seed}
    about |= {"jax": version("jax"), "save_every_steps": EVERY, "flips_of_each": options.flips}
    jax.config.update("jax_num_cpu_devices", 4)
    rows: list[dict[str, Any]] = []
    for mesh in [options.mesh] if options.mesh else MESHES:
        study = Study(mesh)
        for target in TARGETS:
            rows += study.rows(target, options.flips, options.seed)
            found = sum((Counter(row["first"]) for row in rows if row["target"] == target and row["mesh"] == mesh),
                        Counter())  # fmt: skip
            print(f"{mesh:10} {target:28} {dict(found)}", flush=True)
    results = about | {"rows": rows}
    if options.out:
        write_atomically(Path(options.out), json.dumps(results, indent=1) + "\n")
    if options.page:
        write_atomically(PAGE, render(PAGE.read_text(encoding="utf-8"), results))
    return int(any(row["first"].get("missed") for row in rows))


class Study:
    """A run on one mesh, `EVERY` steps of which are done again and again."""

    def __init__(self, mesh: str) -> None:
        name, _, zero = mesh.partition(" ")
        self.mesh = mesh
        self.config = configuration(
            dataclasses.replace(LLAMA, embed=32, mlp=64),
            optimizer__shard="data" if zero else "none",
            optimizer__learning_rate=4e-3,
            train__steps=1000,
        )
        self.assembly = build(self.config, name)
        self.devices = list(self.assembly.runtime.layout.mesh.devices.flat)
        self.replicas = Replicas(self.assembly.plan.abstract)
        self.step = compile_(self.assembly)
        self.states, self.losses, self.logged = [self.assembly.init()], [], []
        for number in range(WINDOW + EVERY):
            new, logged = self._step(self.states[-1], number, Flip())
            self.states = [*self.states, new] if number >= WINDOW else [new]
            self.losses.append(logged["loss"])
            self.logged.append(logged)

    def _step(self, state: Any, number: int, flip: Flip) -> tuple[Any, dict[str, float]]:
        made = place(self.assembly, batch(self.config, number % 16))
        new, metrics = self.step(state, made, jax.tree.map(jnp.int32, flip))
        return new, {name: np.asarray(metrics[name]).item() for name in (*COMPARED, "streak")}

    def rows(self, target: str, flips: int, seed: int) -> Iterator[dict[str, Any]]:
        """What noticed the flips of each bit."""
        for name, bit in BITS.items():
            source = random.Random(f"{seed} {self.mesh} {target} {name}")
            found: Counter[str] = Counter()
            first: Counter[str] = Counter()
            for _ in range(flips):
                noticed = self.flip(target, bit, source)
                if noticed is None:
                    break
                found.update(noticed)
                first[noticed[0]] += 1
            if first:
                yield {"mesh": self.mesh, "target": target, "bit": name, "first": dict(first), "all": dict(found)}

    def flip(self, target: str, bit: int, source: random.Random) -> list[str] | None:
        """Flip `bit` of a number of `target`: what notices, the first to do so first; None where there is no such."""
        what, _, where = target.partition(", ")
        after = source.randrange(EVERY)
        state, flip = self.states[after], Flip()
        if what == "gradients":
            flip = self._of_gradients(where, bit, source)
        else:
            leaves, tree = jax.tree.flatten(state)
            chosen = self._of_state(what, where, source)
            if chosen is None:
                return None
            leaf, devices = chosen
            at = source.randrange(leaves[leaf].addressable_shards[0].data.size)
            leaves[leaf] = flipped(leaves[leaf], devices, at, bit)
            state = jax.tree.unflatten(tree, leaves)
        return self._noticed(state, after, flip)

    def _of_gradients(self, where: str, bit: int, source: random.Random) -> Flip:
        before, leaves = where.startswith("before"), len(jax.tree.leaves(self.assembly.plan.gradients))
        mesh = self.assembly.runtime.layout.mesh
        count = mesh.size // (mesh.shape["model"] if before else 1)
        at = source.randrange(2**30)
        return Flip(1 if before else 2, source.randrange(leaves), source.randrange(count), at, bit)

    def _of_state(self, what: str, where: str, source: random.Random) -> tuple[int, list[jax.Device]] | None:
        """A leaf of `what`, and the devices on which it is flipped: one of several, or all that hold a slice."""
        part = {"parameters": "params.", "first moments": ".mu.", "second moments": ".nu."}[what]
        found = []
        for number, (path, leaf) in enumerate(jax.tree.leaves_with_path(self.assembly.plan.abstract)):
            slices: dict[str, list[jax.Device]] = {}
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                slices.setdefault(str(index), []).append(device)
            name = "." + jax.tree_util.keystr(path, simple=True, separator=".")
            if f".{part.strip('.')}." in name and (where == "all copies" or len(next(iter(slices.values()))) > 1):
                found.append((number, list(slices.values())))
        if not found:
            return None
        leaf, held = source.choice(found)
        devices = source.choice(held)
        return leaf, devices if where == "all copies" else [source.choice(devices)]

    def _noticed(self, state: Any, after: int, flip: Flip) -> list[str]:
        """Do the steps from `after` to the next save, and ask each in its turn."""
        watch, noticed, different = Watch(self.config.train.max_skipped), [], False
        for loss in self.losses[after : WINDOW + after]:
            watch.see(0, 0, loss, True)
        # What is bad when the save is due is not saved: it goes on until it is good again, or the run goes back.
        for number in range(after, EVERY + self.config.train.max_skipped):
            if number >= EVERY and not watch.in_row:
                break
            state, logged = self._step(state, WINDOW + number, flip if number == after else Flip())
            if number < EVERY:
                saved = state
                different |= any(repr(logged[k]) != repr(self.logged[WINDOW + number][k]) for k in COMPARED)
            try:
                watch.see(WINDOW + number, 0, logged["loss"], logged["streak"] == 0)
            except BadNumbers:
                noticed.append("watch")
                break
        if self.replicas.differing(saved):
            noticed.append("checksum")
        if different or self._differs(saved, copies=False):
            noticed.append("replay")
        return noticed or (["missed"] if self._differs(saved, copies=True) else ["harmless"])

    def _differs(self, state: Any, copies: bool) -> bool:
        """Whether `state` is another than without the flip: all of it, or what a checkpoint holds, of each slice one
        copy."""
        pairs = zip(jax.tree.leaves(state), jax.tree.leaves(self.states[-1]), strict=True)
        return any(_bits(a, copies) != _bits(b, copies) for a, b in pairs)


def _bits(array: jax.Array, copies: bool) -> list[bytes]:
    return [np.asarray(s.data).tobytes() for s in array.addressable_shards if copies or s.replica_id == 0]


def compile_(assembly: Assembly) -> Callable[..., Any]:
    """The step with a Flip as its third argument: (state, batch, flip) -> (state, metrics)."""
    mesh, plan = assembly.runtime.layout.mesh, assembly.plan
    summed, gradients = local.summed, steps.gradients

    def step(state: Any, batch: Any, flip: Flip) -> tuple[Any, Any]:
        def sum_flipped(compute: Callable[..., Any], *arrays: Any, **others: Any) -> Any:
            def flipping(*arrays: Any, cut: local.Cut, flip: Flip, **others: Any) -> Any:
                axes = tuple(axis for axis in mesh.axis_names if axis not in cut.automatic)
                flipped = cut._replace(reduce=lambda grads: cut.reduce(_flip(grads, flip, 1, axes)))
                return compute(*arrays, cut=flipped, **others)

            return summed(flipping, *arrays, flip=flip, **others)

        def flip_sums(*arrays: Any, **others: Any) -> Any:
            grads, *sums = gradients(*arrays, **others)
            specs = jax.tree.map(lambda sharding: sharding.spec, plan.gradients)
            body = partial(_flip, where=2, axes=mesh.axis_names)
            return jax.shard_map(
                body, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=specs, check_vma=False
            )(grads, flip), *sums  # fmt: skip

        with mock.patch.object(local, "summed", sum_flipped), mock.patch.object(steps, "gradients", flip_sums):
            return assembly.step(state, batch)

    return jax.jit(step, out_shardings=(plan.shardings, NamedSharding(mesh, PartitionSpec())))


def _flip(grads: Any, flip: Flip, where: int, axes: Sequence[str]) -> Any:
    """Inside a shard_map over `axes`: `grads` with a bit of one of this device's numbers flipped, if it is meant."""
    here = (flip.where == where) & (flip.device == jax.lax.axis_index(tuple(axes)))
    leaves, tree = jax.tree.flatten(grads)
    for number, leaf in enumerate(leaves):
        mask = jnp.where(here & (flip.leaf == number), jnp.uint32(1) << flip.bit.astype(jnp.uint32), jnp.uint32(0))
        place = jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape) == flip.at % leaf.size
        words = jax.lax.bitcast_convert_type(leaf, jnp.uint32) ^ jnp.where(place, mask, jnp.uint32(0))
        leaves[number] = jax.lax.bitcast_convert_type(words, leaf.dtype)
    return jax.tree.unflatten(tree, leaves)


def flipped(array: jax.Array, devices: Sequence[jax.Device], at: int, bit: int) -> jax.Array:
    """`array` with one bit (0: the lowest) of number `at` of their part of it flipped on `devices`."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device in devices:
            words = data.view(f"uint{data.itemsize * 8}").reshape(-1)
            words[at] ^= words.dtype.type(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def faulty(compile_: Callable[..., Any], after: int, devices: slice, times: int = 1) -> Callable[..., Any]:
    """What may stand for `Assembly.compile`: its steps flip the lowest bit of a weight on some devices, the first
    `times` times that step `after` is done."""
    left = [times]

    def compiled(self: Assembly, *arguments: Any) -> Callable[..., Any]:
        program = compile_(self, *arguments)

        def step(state: Any, batch: Any) -> Any:
            new, metrics = program(state, batch)
            if int(new["step"]) == after and left[0]:
                left[0] -= 1
                up = new["params"]["blocks"]["mlp"]["up"]
                up["kernel"] = flipped(up["kernel"], jax.devices()[devices], at=5, bit=0)
            return new, metrics

        return step

    return compiled


def table(results: dict[str, Any]) -> Iterator[str]:
    """What noticed the flips of each target, and of each bit, over all meshes."""
    for key, names in (("target", TARGETS), ("bit", BITS)):
        yield f"| {key} | flips | watch | checksum | replay alone | harmless | missed |"
        yield "|---|---|---|---|---|---|---|"
        for name in names:
            first = sum((Counter(row["first"]) for row in results["rows"] if row[key] == name), Counter())
            yield f"| {name} | {first.total():,} | {' | '.join(f'{first[outcome]:,}' for outcome in OUTCOMES)} |"
        yield ""


def render(page: str, results: dict[str, Any]) -> str:
    """`page` with the tables of these results between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + "\n".join(table(results)) + END + rest.split(END)[1]


if __name__ == "__main__":
    run(main)
