"""`make flips`: flip one bit of a run's numbers, thousands of times, and see what notices.

A small decoder trains on a mesh of simulated devices. After one of the steps between two saves, or within it, one bit of
one number is flipped, and the steps up to the next save are done as the loop does them. Three things may notice:

- watch: the loop's watch over losses and gradients (`jaxlm.train.watch`) gives up, and the run goes back;
- checksum: the comparison of copies before the save (`jaxlm.train.replicas`), and the run goes back;
- replay: `python -m jaxlm.train replay`, run by a person, of these steps: a logged number or an array of the checkpoint
  is not bit for bit that of the steps without the flip, which are what it computes.

Where nothing notices, either no bit of what the run logs, saves or goes on with is different any more (harmless), or
something is, and this is a miss.
"""

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
from jax.sharding import PartitionSpec

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
from tests.train.battery import batch, build, configuration, place

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "reliability.md", ROOT / "benchmarks" / "results" / "flips.json"

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
    "gradients, before their sum": "what one device adds to the sum over the batch",
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
    meshes: tuple[str, ...] = ()
    """The meshes (default: all)."""
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
    if unknown := set(options.meshes) - set(MESHES):
        raise UserError(f"no mesh {', '.join(sorted(unknown))} here; the meshes are {'; '.join(MESHES)} (--meshes)")
    about = {"command": f"python -m tests.train.flips {' '.join(argv)}", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    about |= {"git_revision": git_revision(), "python": platform.python_version(), "seed": options.seed}
    about |= {"jax": version("jax"), "save_every_steps": EVERY, "flips_of_each": options.flips}
    jax.config.update("jax_num_cpu_devices", 4)
    rows: list[dict[str, Any]] = []
    for mesh in options.meshes or MESHES:
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
        self.config = configuration("llama", optimizer__shard="data" if zero else "none")
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
        leaves = jax.tree.leaves(self.assembly.plan.abstract["params"])
        leaf, before = source.randrange(len(leaves)), where.startswith("before")
        mesh = self.assembly.runtime.layout.mesh
        shape = leaves[leaf].shape
        spread = jax.tree.leaves(self.assembly.plan.gradients)[leaf]
        size = int(np.prod(shape if before else spread.shard_shape(shape)))
        count = len(self.devices) // (mesh.shape["model"] if before else 1)
        return Flip(1 if before else 2, leaf, source.randrange(count), source.randrange(size), bit)

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
        for number in range(after, EVERY + self.config.train.max_skipped):
            if number >= EVERY and not (watch.in_row and not noticed):
                break  # what is bad is not saved: it goes on until it is good again, or the run goes back
            state, logged = self._step(state, WINDOW + number, flip if number == after else Flip())
            if number < EVERY:
                different |= any(repr(logged[k]) != repr(self.logged[WINDOW + number][k]) for k in COMPARED)
            try:
                watch.see(WINDOW + number, 0, logged["loss"], logged["streak"] == 0)
            except BadNumbers:
                noticed.append("watch")
            if number == EVERY - 1:
                saved = state
        if self.replicas.differing(saved):
            noticed.append("checksum")
        if different or written(saved) != written(self.states[-1]):
            noticed.append("replay")
        elsewhere = any(bits(a, all_) != bits(b, all_) for all_ in (True,) for a, b in self._pairs(saved))
        return noticed or (["missed"] if elsewhere else ["harmless"])

    def _pairs(self, state: Any) -> Iterator[tuple[jax.Array, jax.Array]]:
        return zip(jax.tree.leaves(state), jax.tree.leaves(self.states[-1]), strict=True)


def written(state: Any) -> list[list[bytes]]:
    """The bits that a checkpoint of `state` holds: of each slice one copy."""
    return [bits(leaf, False) for leaf in jax.tree.leaves(state)]


def bits(array: jax.Array, copies: bool) -> list[bytes]:
    return [np.asarray(s.data).tobytes() for s in array.addressable_shards if copies or s.replica_id == 0]
