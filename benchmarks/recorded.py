"""What a compiled program really ran: the profiler's record of every operation on every simulated CPU device."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.parallel.hlo import Instruction, Program


class Event(NamedTuple):
    """One operation, once, on one device."""

    device: int
    name: str
    """The instruction's, as the compiled program has it."""
    start: float
    """Milliseconds, as `end`."""
    end: float


def record(run: Callable[[], Any]) -> list[Event]:
    """Every operation that `run` executes on the devices, in the order in which they began."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(run())
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    found = []
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    start, end = event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6
                    found.append(Event(stats["device_ordinal"], stats["hlo_op"], start, end))
    return sorted(found, key=lambda event: event.start)


def executions(events: Iterable[Event]) -> Counter[str]:
    """How often each instruction ran, on all devices together."""
    return Counter(event.name for event in events)


def matmul_flops(program: Program, runs: Counter[str]) -> int:
    """Floating-point operations of the matrix products that ran, a multiply-add counted as two."""
    total = 0
    for computation in program.computations.values():
        for name in computation.instructions.keys() & runs.keys():
            instruction = computation.instructions[name]
            total += runs[name] * _flops(program, computation.instructions, instruction)
    return total


def _flops(program: Program, beside: dict[str, Instruction], instruction: Instruction) -> int:
    """Of one execution; a fusion's are those of the products in it."""
    if instruction.opcode == "dot":
        left = _shape(beside[instruction.operands[0]].result)
        summed = instruction.rest.partition("lhs_contracting_dims={")[2].partition("}")[0]
        return 2 * int(np.prod(_shape(instruction.result)) * np.prod([left[int(dim)] for dim in summed.split(",")]))
    if instruction.opcode != "fusion":
        return 0
    inside = program.computations[instruction.called("calls")[0]].instructions
    return sum(_flops(program, inside, inner) for inner in inside.values())


def _shape(result: str) -> list[int]:
    """Of an array's type such as `f32[8,128]{1,0}`."""
    return [int(size) for size in result.partition("[")[2].partition("]")[0].split(",") if size]
