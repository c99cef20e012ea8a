"""Speed of the data loader on this machine: tokens a second, and the time to seek far.

    python benchmarks/loader.py --out=benchmarks/results/loader.json

Each figure is the median of several runs, taken in turn so that a busy moment hits them all; the CPU figure counts the
CPU time of all threads instead of the clock, and so survives a machine that others use. "rows" is the loader alone;
"batches" adds device arrays, made when asked for (prefetch 0) or by the prefetch thread; "grain threads" lets Grain
read single samples with its own threads, which does not pay: a sample is microseconds of Python under one lock.
"""

import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import grain
import jax
from jax.sharding import SingleDeviceSharding

from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.schema import DataConfig
from jaxlm.data.corpus import open_corpora
from jaxlm.data.loader import Loader, batches

FAR = 5_000_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/loader.py: tokens a second of the data loader."""

    out: str | None = None
    """JSON file to write the figures to."""
    path: str = "stdlib"
    """The corpus."""
    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths."""
    batch_tokens: int = 16384
    """Tokens of a batch."""
    runs: int = 5
    """Runs whose median counts."""
    seconds: float = 0.3
    """Length of a run."""


def rates(step: Callable[[], object], tokens: int, seconds: float) -> tuple[float, float]:
    """Tokens a second, and a second of CPU time, of a step that yields `tokens`."""
    began_cpu, began = time.process_time(), time.perf_counter()
    now = began
    steps = 0
    while now - began < seconds:
        step()
        steps += 1
        now = time.perf_counter()
    return steps * tokens / (now - began), steps * tokens / (time.process_time() - began_cpu)


def take(iterator: Iterator[object], count: int) -> list[object]:
    return list(itertools.islice(iterator, count))


def measure(loader: Loader, options: Options) -> dict[str, dict[str, int]]:
    length = loader.config.sequence_length
    size = max(options.batch_tokens // length, 1)
    position = itertools.count(0, size)
    place = SingleDeviceSharding(jax.devices()[0])
    steps: dict[str, Callable[[], object]] = {"rows": lambda: loader.rows(next(position), 0, size)}
    streams = {f"batches, prefetch {n}": batches(loader, 0, size, lambda name: place, n) for n in (0, 2)}
    for threads in (0, 4, 16):
        order = grain.MapDataset.range(sys.maxsize).map(lambda i: loader.rows(int(i), 0, 1))
        iterator = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=64)))
        steps[f"grain threads {threads}"] = functools.partial(take, iterator, size)
    steps |= {name: functools.partial(next, stream) for name, stream in streams.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(options.runs):
        for name, step in steps.items():
            found[name].append(rates(step, size * length, options.seconds))
    for stream in streams.values():
        stream.close()
    kinds = ("tokens_per_second", "tokens_per_cpu_second")
    return {
        kind: {name: round(statistics.median(pair[i] for pair in pairs)) for name, pairs in found.items()}
        for i, kind in enumerate(kinds)
    }


def seek_seconds(loader: Loader, size: int) -> float:
    """From nothing to the first batch at position FAR: a new loader's index, order and rows."""
    began = time.perf_counter()
    Loader(loader.corpora, loader.config).rows(FAR, 0, size)
    return time.perf_counter() - began


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    corpora = open_corpora(DataConfig(path=(options.path,)))
    began = time.perf_counter()
    open_corpora(DataConfig(path=(options.path,)))
    report: dict[str, object] = {
        "command": " ".join(["python", "benchmarks/loader.py", *argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {jax.default_backend()}",
        "versions": {name: version(name) for name in ("jax", "grain", "numpy")} | {"python": platform.python_version()},
        "corpus": corpora.describe(),
        "open_prepared_seconds": round(time.perf_counter() - began, 4),
    }
    for packing in ("concat", "fit"):
        for length in options.lengths:
            loader = Loader(corpora, DataConfig(sequence_length=length, packing=packing))
            name = f"{packing}, sequence length {length}"
            report[name] = measure(loader, options) | {f"seek_to_{FAR}_seconds": round(seek_seconds(loader, 16), 5)}
            print(f"{name}: {json.dumps(report[name])}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
