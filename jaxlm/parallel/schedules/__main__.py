"""`python -m jaxlm.parallel.schedules`: a pipeline's schedule in the terminal and as a picture, and what it costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.values import option
from jaxlm.parallel.schedules import draw
from jaxlm.parallel.schedules.build import CHUNKED, build, check
from jaxlm.parallel.schedules.simulate import simulate

MOST_ACTIONS = 20_000
"""Forwards of a table: enough for any pipeline, and drawn in seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m jaxlm.parallel.schedules: who does what in which tick of a pipeline, and how long stages wait."""

    schedule: Literal["gpipe", "1f1b", "interleaved", "zb"] = "1f1b"
    """Order of forward and backward work."""
    stages: int = 4
    """Parts of the model, each on its own devices (pp of a mesh)."""
    microbatches: int = 8
    """Parts of a batch that are in the pipeline together, at least one a stage."""
    chunks: int | None = None
    """Pieces of the model that each stage holds (interleaved; default: 2)."""
    input_bytes: int | None = None
    """Size of a stage's input for one microbatch: rows x tokens x embed x bytes of a number."""
    out: str | None = None
    """Picture to write (png, svg, pdf; extra: plot)."""


def main(argv: list[str]) -> None:
    """Print the table with the figures of the simulator, and draw it where --out asks for it."""
    options, _ = load(Options, argv)
    if options.chunks is not None and options.schedule not in CHUNKED:
        raise UserError(
            f"--chunks={options.chunks} has no effect with --schedule={options.schedule}; "
            "use --schedule=interleaved, or leave it out"
        )
    for name, number in (("stages", options.stages), ("input_bytes", options.input_bytes)):
        if number is not None and number < 1:
            raise UserError(f"{option(name)}={number}: must be 1 or more")
    chunks = 2 if options.chunks is None else options.chunks
    check(options.schedule, options.stages, options.microbatches, chunks, prefix="--")
    actions = options.stages * options.microbatches * (chunks if options.schedule in CHUNKED else 1)
    if actions > MOST_ACTIONS:
        raise UserError(
            f"--microbatches={options.microbatches}: a table of {actions:,} forwards is too large to read; "
            f"use up to {MOST_ACTIONS:,}"
        )
    table = build(options.schedule, options.stages, options.microbatches, chunks)
    simulation = simulate(table)
    console = Console(highlight=False)
    console.print(draw.title(table), style="bold", soft_wrap=True)
    for line in draw.cells(table, console.width):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(draw.figures(simulation, options.input_bytes), soft_wrap=True)
    if options.out:
        draw.picture(table, simulation, Path(options.out))
        console.print(f"wrote {options.out}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run(main)
