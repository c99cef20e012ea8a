"""How long a save holds up the steps, and how fast checkpoints are written and read, against `dd` of the same bytes.

    python benchmarks/checkpoint.py --out=benchmarks/results/checkpoint.json

A state of float32 arrays, whole on each of two devices, is saved through `Store`, as the loop does it: `compared` is
how long the comparison of the copies keeps the caller before a save, `blocked` how long `save` does, `whole` how long
it takes until the step counts, its files hashed and flushed. `dd` writes as many random bytes to the same disk and
flushes them, and reads them back; the bytes were read before, so both read from memory. Takes turns.
"""

import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import report

from jaxlm.checkpoint.store import Store
from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.parallel import mesh as meshes
from jaxlm.train.replicas import Replicas


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/checkpoint.py: saves and restores against dd."""

    out: str | None = None
    """JSON file to write the figures to."""
    megabytes: int = 512
    """Size of the state."""
    rounds: int = 5
    """Times that each is measured; the median counts."""
    folder: str | None = None
    """Where to write (default: the folder for temporary files)."""


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    count = options.megabytes * 10**6 // 4 // 8
    mesh, _ = meshes.build(parse("dp2"), simulate=True, distributed=False, announce=print)
    everywhere = jax.NamedSharding(mesh, jax.P())
    state = {
        f"w{i}": jax.device_put(jax.random.normal(jax.random.key(i), (count,), jnp.float32), everywhere)
        for i in range(8)
    }
    jax.block_until_ready(state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    replicas = Replicas(abstract)
    size = sum(x.nbytes for x in state.values())
    found: dict[str, list[float]] = {
        name: [] for name in ("compared", "blocked", "whole", "restore", "dd_write", "dd_read")
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name, Store(Path(name) / "checkpoints", keep=1) as store:
        source, copy = Path(name) / "source", Path(name) / "copy"
        source.write_bytes(os.urandom(size))
        compiled = seconds(lambda: replicas.differing(state))
        store.save(0, state, {})
        store.wait()
        for step in range(1, options.rounds + 1):
            found["compared"].append(seconds(lambda: replicas.differing(state)))
            began = time.perf_counter()
            found["blocked"].append(seconds(lambda step=step: store.save(step, state, {})))
            store.wait()
            found["whole"].append(time.perf_counter() - began)
            found["restore"].append(seconds(lambda step=step: jax.block_until_ready(store.restore(step, abstract))))
            found["dd_write"].append(seconds(lambda: dd(f"if={source}", f"of={copy}", "conv=fsync")))
            found["dd_read"].append(seconds(lambda: dd(f"if={copy}", "of=/dev/null")))
    median = {name: statistics.median(values) for name, values in found.items()}
    figures = {
        "bytes": size,
        "seconds": {name: [round(value, 4) for value in values] for name, values in found.items()},
        "first_compared_seconds": round(compiled, 4),
        "compared_over_whole": round(median["compared"] / median["whole"], 4),
        "blocked_over_whole": round(median["blocked"] / median["whole"], 4),
        "save_over_dd": round(median["whole"] / median["dd_write"], 2),
        "restore_over_dd": round(median["restore"] / median["dd_read"], 2),
        "gigabytes_per_second": {name: round(size / value / 1e9, 3) for name, value in median.items()},
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    report.write(options.out, "checkpoint.py", argv, figures)


def dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=4M", *arguments], check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    run(main)
