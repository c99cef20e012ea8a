"""What one call of the compiled step costs the Python thread before the devices have all the work, at 32 layers.

    python benchmarks/dispatch.py --out=benchmarks/results/dispatch.json

The state is a plain pytree with the layers stacked, so the cost does not grow with the depth; 2 layers stand beside it
to show that. Each call is timed with the device idle, on the clock and as CPU time of the calling thread, which does
not count what XLA's threads compute.
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import report
from beside import random_batch

from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import DataConfig, ModelConfig, RunConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import assemble

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/dispatch.py: dispatch overhead of a train step."""

    out: str | None = None
    """JSON file to write the figures to."""
    mesh: str = "dp1"
    """The mesh."""
    layers: tuple[int, ...] = (2, 32)
    """Depths to measure."""
    calls: int = 60
    """Timed calls."""


def measure(mesh: Any, layers: int, calls: int) -> dict[str, float]:
    config = replace(
        RunConfig(),
        model=ModelConfig(layers=layers, embed=64, heads=4, mlp=128, vocabulary=VOCABULARY, max_positions=64),
        data=DataConfig(sequence_length=64, batch_size=8),
    )
    assembly = assemble(config, mesh, VOCABULARY)
    state, compiled = assembly.init(), assembly.compile()
    batch = {
        name: jax.device_put(x, assembly.batch[name].sharding) for name, x in random_batch(config, VOCABULARY).items()
    }
    clock, cpu = [], []
    for _ in range(calls + 5):
        jax.block_until_ready(state)
        began, began_cpu = time.perf_counter(), time.thread_time()
        state, _ = compiled(state, batch)
        cpu.append((time.thread_time() - began_cpu) * 1e3)
        clock.append((time.perf_counter() - began) * 1e3)
    return {
        "arrays": len(jax.tree.leaves((state, batch))),
        "clock_milliseconds": round(statistics.median(clock[5:]), 3),
        "thread_cpu_milliseconds": round(statistics.median(cpu[5:]), 3),
    }


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    mesh, _ = meshes.build(parse(options.mesh))
    figures = {}
    for layers in options.layers:
        figures[f"{layers} layers"] = measure(mesh, layers, options.calls)
        print(f"{layers} layers: {json.dumps(figures[f'{layers} layers'])}", flush=True)
    report.write(options.out, "dispatch.py", argv, {"mesh": options.mesh} | figures)


if __name__ == "__main__":
    run(main)
