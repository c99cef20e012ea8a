"""The loss of a run at a glance: a line of text in the terminal, a picture for a report."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.config.errors import UserError
from jaxlm.metrics.jsonl import read

_BARS = "▁▂▃▄▅▆▇█"


def losses(folder: Path, file: str = "metrics.jsonl") -> list[tuple[int, float]]:
    """(step, loss) of every line of `file` whose loss is finite."""
    return [(line["step"], line["loss"]) for line in read(folder / file) if _is_number(line.get("loss"))]


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """`values` from first to last in at most `width` characters, each the mean of its share, highest to lowest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [i * len(values) // width for i in range(width + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), max(means) - min(means)
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1)) if span else 0] for mean in means)


def summary(folder: Path) -> str:
    """One line: the loss's first and last value around its curve; empty where nothing was logged."""
    values = [loss for _, loss in losses(folder)]
    return f"loss {values[0]:.3f} {sparkline(values)} {values[-1]:.3f}" if values else ""


def draw(folder: Path, out: Path) -> None:
    """Training and held-out loss by step as a picture; the format is that of the suffix of `out` (png, svg, pdf)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("a picture needs matplotlib: pip install 'jaxlm[plot]'") from error
    curves = {"training": losses(folder), "held out": losses(folder, "eval.jsonl")}
    if not curves["training"]:
        raise UserError(f"no loss in {folder / 'metrics.jsonl'}; pass the folder that --run named")
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    formats = canvas.get_supported_filetypes()
    if out.suffix.lstrip(".") not in formats:
        raise UserError(f"--out={out}: no picture format {out.suffix!r}; use one of {' '.join(sorted(formats))}")
    axes = figure.subplots()
    for name, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
