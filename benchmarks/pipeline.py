"""What a pipeline costs: memory by microbatches, bubbles against the simulator's, and whether zero bubble can win.

    python benchmarks/pipeline.py --out=benchmarks/results/pipeline.json

Memory: the temporaries of one compiled step on pp4, with a few and with four times as many microbatches of one size.

Bubble: pp2, two simulated devices of one thread each, on two cores. Of some recorded steps the profiler tells how long
each stage worked in each tick and how long it waited in the permutes that end it. The fastest of the steps, tick by
tick and stage by stage (others on the machine can only add), make a table of work; a tick lasts as long as its busiest
stage, and the bubble is the share of all stages' time without work. The costs of a forward and a backward are fitted to
the same table and given to the simulator.

The last virtual stage runs no forward of its own, because its backward makes it, but has the output layer, in its
backward. The vocabulary is chosen so that the two take about as long: where a stage's forwards and backwards share
ticks the sum is that of the other stages. Elsewhere (gpipe, and zb, which runs the output layer twice) it is not:
`bubble_by_stage` is what the same table gives at costs fitted to each stage, and `ratio_by_stage` the bubble over it.

Zero bubble: time of a step, the FLOPs of the matrix products that ran, and the simulator's time on more stages.

Clock times need two cores that nobody else uses.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
import report
from beside import random_batch
from recorded import Event, executions, matmul_flops, record

from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.parallel import hlo
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.schedules import Table, build
from jaxlm.parallel.schedules.simulate import Costs, simulate
from jaxlm.train import stages
from jaxlm.train.assemble import Assembly, assemble

MODEL = ("--model.embed=256", "--model.mlp=1024")
VOCABULARY = 2048
"""With which the output layer, forward and backward, takes as long as the forward of two layers."""
PARTS = ("memory", "bubble")
ONE_THREAD = {"NPROC": "1", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
"""Of each device: else a stage that waits lends its core to the one that works."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/pipeline.py: memory, bubble and step time of the pipeline schedules."""

    out: str | None = None
    """JSON file to write the figures to."""
    schedules: tuple[str, ...] = ("1f1b", "interleaved", "zb", "gpipe")
    """Schedules to measure."""
    memory_microbatches: tuple[int, ...] = (8, 32)
    """Microbatches of the memory table; the last is compared with the first."""
    microbatches: tuple[int, ...] = (4, 8)
    """Microbatches of the bubble table."""
    rows: int = 2
    """Sequences of a microbatch."""
    turns: int = 15
    """Steps that are recorded, and as many that are timed."""
    part: Literal["all", "memory", "bubble"] = "all"
    """Measure one part in this process (what the others are started with)."""


def assembled(mesh: str, layers: int, schedule: str, microbatches: int, rows: int) -> Assembly:
    """A run on simulated devices; without pp, as many microbatches are accumulated."""
    spec = parse(mesh)
    of_run = (f"--pipeline.schedule={schedule}", f"--pipeline.microbatches={microbatches}")
    flags = of_run if spec.sizes["pp"] > 1 else (f"--train.microbatches={microbatches}",)
    vocabulary = VOCABULARY // (2 if schedule == "interleaved" else 1)
    size = (f"--model.layers={layers}", f"--model.vocabulary={vocabulary}", f"--data.batch-size={rows * microbatches}")
    config = load(RunConfig, [f"--mesh={mesh}", *MODEL, *size, *flags])[0]
    return assemble(config, meshes.from_devices(spec, jax.devices()[: spec.device_count]), None)


def memory(options: Options) -> dict[str, Any]:
    """Compiled temporary bytes of a device, by schedule and microbatches."""
    meshes.build(parse("pp4"))
    found = {}
    for schedule in options.schedules:
        row: dict[str, Any] = {}
        for count in options.memory_microbatches:
            compiled = assembled("pp4", 8, schedule, count, options.rows).compile()
            row[f"{count} microbatches"] = compiled.memory_analysis().temp_size_in_bytes
        sizes = list(row.values())
        row["ratio"] = round(sizes[-1] / sizes[0], 4)
        found[schedule] = row
        print(f"memory  {schedule:12} {json.dumps(row)}", file=sys.stderr, flush=True)
    return found


class Program:
    """A compiled step with its state, to be run again and again."""

    def __init__(self, assembly: Assembly):
        self.assembly, self.compiled = assembly, assembly.compile()
        self.hlo = hlo.parse(self.compiled.as_text() or "")
        arrays = random_batch(assembly.config, assembly.model.vocabulary)
        self.batch = {name: jax.device_put(x, assembly.batch[name].sharding) for name, x in arrays.items()}
        self.state = assembly.init()
        self()

    def __call__(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return jax.block_until_ready((self.state, metrics))

    def seconds(self) -> tuple[float, float]:
        """Clock and CPU milliseconds of a step."""
        clock, cpu = time.perf_counter(), time.process_time()
        self()
        return (time.perf_counter() - clock) * 1e3, (time.process_time() - cpu) * 1e3


def work(program: hlo.Program, events: list[Event], table: Table) -> np.ndarray:
    """Milliseconds that each stage worked in each tick [ticks, stages], from a record of a step on pp2."""
    permutes, loop = set(), ""
    for computation in program.computations.values():
        permutes |= {n for n, i in computation.instructions.items() if i.opcode == "collective-permute"}
    for computation in program.computations.values():
        for name, instruction in computation.instructions.items():
            if instruction.opcode == "while":
                (body,) = instruction.called("body")
                loop = name if permutes & program.computations[body].instructions.keys() else loop
    found = np.zeros((table.ticks, table.stages))
    for stage in range(table.stages):
        own = [event for event in events if event.device == stage]
        ends = [event for event in own if event.name in permutes]
        assert len(ends) == 2 * table.ticks, f"{len(ends)} permutes in {table.ticks} ticks"
        began = next(event.start for event in own if event.name == loop)
        for tick in range(table.ticks):
            first, last = ends[2 * tick : 2 * tick + 2]
            found[tick, stage] = first.start - began
            began = last.end
    return found


def fitted(found: np.ndarray, table: Table) -> tuple[dict[str, float], np.ndarray]:
    """What an action of each kind costs, in milliseconds of a whole stage, fitted to the work of all stages together;
    and the work [ticks, stages] that there would be at costs fitted to each stage."""
    kinds = [kind for kind in "fbw" if (getattr(table, f"{kind}_microbatch") >= 0).any()]
    # [ticks, stages, kinds]; of more chunks a stage runs at most one of a kind in a tick.
    runs = np.stack([getattr(table, f"{kind}_microbatch") >= 0 for kind in kinds], axis=2).astype(float)
    together = np.linalg.lstsq(runs.reshape(-1, len(kinds)), found.reshape(-1), rcond=None)[0]
    each = [np.linalg.lstsq(runs[:, s], found[:, s], rcond=None)[0] for s in range(table.stages)]
    by_stage = np.stack([runs[:, s] @ costs for s, costs in enumerate(each)], axis=1)
    return dict(zip(kinds, (together * table.chunks).tolist(), strict=True)), by_stage


def bubble(found: np.ndarray) -> float:
    """The share of all stages' time in which they have no work, where a tick lasts as long as its busiest stage."""
    return 1 - found.sum() / (found.shape[1] * found.max(axis=1).sum())


def simulated(costs: dict[str, float], table: Table) -> float:
    """The simulator's bubble at measured costs."""
    if "w" in costs:
        priced = Costs(forward=costs["f"], input_backward=costs["b"], weights=costs["w"])
    else:
        priced = Costs(forward=costs["f"], backward=costs["b"])
    return simulate(table, priced).bubble


def bubbles(options: Options) -> dict[str, Any]:
    """Bubble, costs, step time and FLOPs on pp2 by schedule and microbatches, beside dp1."""
    meshes.build(parse("pp2"))
    cases = [(schedule, count) for count in options.microbatches for schedule in ("dp1", *options.schedules)]
    found: dict[str, Any] = {}
    for schedule, count in cases:
        mesh = "dp1" if schedule == "dp1" else "pp2"
        program = Program(assembled(mesh, 4, schedule, count, options.rows))
        times = [program.seconds() for _ in range(options.turns)]
        records = [record(program) for _ in range(options.turns if mesh == "pp2" else 1)]
        row = {
            "clock_milliseconds": round(statistics.median(clock for clock, _ in times), 1),
            "cpu_milliseconds": round(statistics.median(cpu for _, cpu in times), 1),
            "matmul_gigaflops": round(matmul_flops(program.hlo, executions(records[-1])) / 1e9, 2),
        }
        if mesh == "pp2":
            table = stages.table(program.assembly.config, program.assembly.runtime.layout)
            row |= compared(np.min([work(program.hlo, events, table) for events in records], axis=0), table)
        found.setdefault(schedule, {})[f"{count} microbatches"] = row
        print(f"bubble  {schedule:12} {count:3} {json.dumps(row)}", file=sys.stderr, flush=True)
    return found


def compared(found: np.ndarray, table: Table) -> dict[str, Any]:
    """Measured work beside the simulator's."""
    costs, by_stage = fitted(found, table)
    predicted = simulated(costs, table)
    return {
        "bubble": round(bubble(found), 4),
        "simulated_bubble": round(predicted, 4),
        "ratio": round(bubble(found) / predicted, 3),
        "bubble_by_stage": round(bubble(by_stage), 4),
        "ratio_by_stage": round(bubble(found) / bubble(by_stage), 3),
        "bubble_at_default_costs": round(simulate(table).bubble, 4),
        "cost_milliseconds": {kind: round(cost, 2) for kind, cost in costs.items()},
        "stage_milliseconds": (found.sum(axis=0) / table.microbatches).round(2).tolist(),
    }


def zero_bubble() -> dict[str, dict[str, float]]:
    """The simulator's time of zb over that of 1f1b, by stages and microbatches.

    As the engine runs them (whatever goes backward makes the stage's forward again); and were everything kept that the
    backward needs, in lockstep and where stages do not wait for each other's ticks.
    """
    kept = Costs(forward=1, backward=2, input_backward=1, weights=1)
    ways: dict[str, Callable[[Table], float]] = {
        "as run": lambda table: simulate(table).time,
        "nothing made again": lambda table: simulate(table, kept).time,
        "nothing made again, no lockstep": lambda table: simulate(table, kept).loose_time,
    }
    found: dict[str, dict[str, float]] = {}
    for p in (2, 4, 8, 16):
        for count in (p, 2 * p, 4 * p):
            tables = [build(schedule, p, count) for schedule in ("zb", "1f1b")]
            row = {}
            for way, seconds in ways.items():
                zb, base = (seconds(table) for table in tables)
                row[way] = round(zb / base, 3)
            found[f"{p} stages, {count} microbatches"] = row
    return found


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    if options.part != "all":
        print(json.dumps({"memory": memory, "bubble": bubbles}[options.part](options)))
        return
    figures: dict[str, Any] = {"model": list(MODEL), "rows of a microbatch": options.rows}
    for part in PARTS:
        flags = ONE_THREAD if part == "bubble" else {}
        command = [sys.executable, __file__, *argv, f"--part={part}"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | flags)
        figures[part] = json.loads(child.stdout.splitlines()[-1])
    figures["zb over 1f1b, simulated"] = zero_bubble()
    for case, row in figures["zb over 1f1b, simulated"].items():
        print(f"zb over 1f1b, {case}: {json.dumps(row)}")
    report.write(options.out, "pipeline.py", argv, figures)


if __name__ == "__main__":
    run(main)
