"""A table for people: cells in the terminal, a picture on the clock of the simulator."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from jaxlm.config.errors import UserError
from jaxlm.parallel.schedules.simulate import Simulation
from jaxlm.parallel.schedules.table import Action, Table
from jaxlm.parallel.schedules.validate import KINDS, NAMES

HUES = {"f": "#0072b2", "b": "#e69f00", "w": "#009e73"}
"""Blue, orange and green that people of any colour vision tell apart (Okabe and Ito 2008)."""

LETTERS = "abcdefghijklmnopqrstuvwxyz"

UNIT_INCHES, LEAST_INCHES, MOST_INCHES = 0.24, 8.0, 16.0
"""Of a picture's width: of a unit of time, and in all; longer tables are drawn smaller."""

ROW_INCHES, MARGIN_INCHES = 0.42, 1.7
LARGEST_FONT, SMALLEST_FONT = 9.0, 4.0
"""Of a microbatch's number in points; where even the smallest does not fit, there is none."""
POINTS, DIGIT = 72, 0.75
"""Points of an inch; width of a digit and its share of the margin, in sizes of its font."""
FINE_INCHES = 0.08
"""Bars and ticks that are narrower have no lines between them, which would cover them."""


def title(table: Table) -> str:
    """What a table is, in a line."""
    stages = _count(table.stages, "stage") + (f" of {table.chunks} chunks" if table.chunks > 1 else "")
    return f"{table.name}: {stages}, {_count(table.microbatches, 'microbatch', 'es')}, {_count(table.ticks, 'tick')}"


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def figures(simulation: Simulation, value_bytes: int | None = None) -> str:
    """What the simulator found, in a few lines; `value_bytes` is the size of a stage's input for one microbatch."""
    stash, cotangents = max(simulation.stash), max(simulation.cotangents)
    lines = [
        f"time    {simulation.time:g}, of which {simulation.ideal_time:g} work (1: a forward through a whole stage)",
        f"bubble  {simulation.bubble:.1%}; {simulation.loose_bubble:.1%} if a stage waited for its inputs alone",
        f"stash   {_count(stash, 'stage input')} (by stage: {' '.join(map(str, simulation.stash))}), "
        f"{_count(cotangents, 'cotangent')}",
    ]
    if value_bytes is not None:
        total = simulation.stash_bytes(value_bytes)
        lines.append(f"        ({stash} + {cotangents}) x {value_bytes:,} bytes = {total:,} bytes on each stage")
    return "\n".join(lines)


def colour(kind: str, chunk: int, chunks: int) -> str:
    """Of an action's cell: the hue is the kind, later chunks are lighter."""
    white = 0.6 * chunk / max(chunks - 1, 1)
    return "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in _parts(HUES[kind]))


def ink(background: str) -> str:
    """Black or white, whichever is easier to read on `background`."""
    red, green, blue = _parts(background)
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 135 else "white"


def _parts(shade: str) -> list[int]:
    """Red, green and blue of #rrggbb."""
    return [int(shade[at : at + 2], 16) for at in (1, 3, 5)]


def _letter(chunk: int, chunks: int) -> str:
    """What follows a microbatch's number where stages hold several chunks."""
    return "" if chunks == 1 else LETTERS[chunk] if chunks <= len(LETTERS) else f".{chunk}"


def _shown_chunks(chunks: int) -> Sequence[int]:
    """Those that a legend names: the first and the last of many."""
    return range(chunks) if chunks <= 4 else (0, chunks - 1)


def cells(table: Table, width: int) -> Iterator[Text]:
    """The table in lines of at most `width` columns, where that is possible: for each stage a line of its forwards, one
    of its backwards, and so on.

    A cell is the number of a microbatch, with a letter for the chunk where stages hold several.
    """
    done = {(tick, a.stage, a.kind): a for tick, actions in enumerate(table.actions()) for a in actions}
    yield _legend(table)
    size = len(f"{table.microbatches - 1}{_letter(table.chunks - 1, table.chunks)}")
    size = max(size, len(str(table.ticks - 1)))
    head = len(f"stage {table.stages - 1} F ")
    most = max(1, (width - head + 1) // (size + 1))
    columns = -(-table.ticks // -(-table.ticks // most))  # as many in each block, rather than a few in the last
    for first in range(0, table.ticks, columns):
        ticks = range(first, min(first + columns, table.ticks))
        yield Text()
        yield Text("tick".ljust(head) + " ".join(f"{tick:>{size}}" for tick in ticks), style="dim")
        for stage in range(table.stages):
            for kind in KINDS[table.name]:
                name = f"stage {stage}" if kind == "f" else ""
                line = Text(f"{name:<{head - 2}}{kind.upper()}")
                for tick in ticks:
                    line.append(" ")
                    line.append_text(_cell(table, done.get((tick, stage, kind)), size))
                yield line


def _cell(table: Table, action: Action | None, size: int) -> Text:
    if action is None:
        return Text(f"{'.':>{size}}", style="dim")
    chunk = action.virtual // table.stages
    shade = colour(action.kind, chunk, table.chunks)
    label = f"{action.microbatch}{_letter(chunk, table.chunks)}"
    return Text(f"{label:>{size}}", style=f"{ink(shade)} on {shade}")


def _legend(table: Table) -> Text:
    line = Text()
    for kind in KINDS[table.name]:
        line.append("   " if line else "")
        for chunk in _shown_chunks(table.chunks):
            shade = colour(kind, chunk, table.chunks)
            line.append(f" {_letter(chunk, table.chunks) or kind.upper()} ", style=f"{ink(shade)} on {shade}")
        line.append(f" {_name(table, kind)}" + (", by chunk" if table.chunks > 1 else ""))
    return line


def _name(table: Table, kind: str) -> str:
    return "input gradients" if kind == "b" and "w" in KINDS[table.name] else NAMES[kind]


def picture(table: Table, simulation: Simulation, out: Path) -> Any:
    """Write the table on the clock: a row for each stage, a bar for each action; the suffix of `out` is the format.

    Returns:
        The figure.

    Raises:
        UserError: matplotlib is missing, it knows no such format, or `out` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'jaxlm[plot]'") from error
    width = min(max(simulation.time * UNIT_INCHES + MARGIN_INCHES, LEAST_INCHES), MOST_INCHES)
    height = min(table.stages * ROW_INCHES + MARGIN_INCHES, MOST_INCHES)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    formats = canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in formats:
        raise UserError(f"--out={out}: no picture format {out.suffix!r}; use one of {' '.join(sorted(formats))}")
    axes = figure.subplots()
    inches = (width - MARGIN_INCHES / 2) / simulation.time
    ruled = width / table.ticks > 2 * FINE_INCHES
    _bars(axes, table, simulation, inches)
    axes.set(
        xlim=(0, simulation.time),
        ylim=(table.stages - 0.5, -0.5),
        yticks=range(table.stages),
        ylabel="stage",
        xlabel=f"time (1: a forward of a microbatch through a whole stage; grey: idle{'; dotted: ticks' * ruled})",
        facecolor="#e4e4e4",
    )
    axes.set_title(f"{title(table)}; bubble {simulation.bubble:.1%}", loc="left")
    if ruled:
        axes.vlines(simulation.starts, *axes.get_ylim(), color="black", linewidth=0.5, linestyle=":", alpha=0.6)
    handles = [
        Patch(
            color=colour(kind, chunk, table.chunks),
            label=_name(table, kind) + (f", chunk {chunk}" if table.chunks > 1 else ""),
        )
        for kind in KINDS[table.name]
        for chunk in _shown_chunks(table.chunks)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    try:
        figure.savefig(out)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise UserError(f"--out={out} cannot be written: {(error.strerror or '').lower()}; use another path") from None
    return figure


def _bars(axes: Any, table: Table, simulation: Simulation, inches: float) -> None:
    """A bar for each action, with the microbatch's number where it fits; a unit of time is `inches` wide."""
    spans: dict[tuple[int, str, int], list[tuple[float, float]]] = {}
    for tick, actions in enumerate(table.actions()):
        clock = [simulation.starts[tick]] * table.stages
        for stage, kind, microbatch, virtual, *_ in actions:
            start, duration = clock[stage], simulation.prices[kind]
            clock[stage] += duration
            spans.setdefault((stage, kind, virtual // table.stages), []).append((start, duration))
            digits = len(str(table.microbatches - 1))
            font = min(LARGEST_FONT, duration * inches * POINTS / (digits * DIGIT))
            if font >= SMALLEST_FONT:
                shade = colour(kind, virtual // table.stages, table.chunks)
                middle = {"ha": "center", "va": "center_baseline"}
                axes.text(start + duration / 2, stage, str(microbatch), color=ink(shade), fontsize=font, **middle)
    for (stage, kind, chunk), bars in spans.items():
        edge = 0.4 if simulation.prices[kind] * inches > FINE_INCHES else 0.0
        shade = colour(kind, chunk, table.chunks)
        axes.broken_barh(bars, (stage - 0.42, 0.84), facecolor=shade, edgecolor="white", linewidth=edge)
