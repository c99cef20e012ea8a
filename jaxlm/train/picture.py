"""The sharding map: every parameter as a rectangle, cut where the mesh cuts it, each part labelled with its devices."""

import colorsys
from pathlib import Path

from jaxlm.config.errors import UserError
from jaxlm.train.explain import Placed


def sharding_map(rows: list[Placed], title: str, path: Path) -> None:
    """Draw `rows` to `path` (PNG or SVG, by its ending).

    A part's colour is the first of the devices that hold it; its label is all of them. A parameter held whole by
    every device is grey. Stacked layers are drawn as one matrix; of more than two cut dims the largest two are drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise UserError("the sharding map needs matplotlib; pip install 'jaxlm[plot]'") from error
    devices = rows[0].sharding.mesh.size
    figure = Figure(figsize=(11, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.set_xlim(-0.005, 1.005)
    axes.set_ylim(len(rows), 0)
    axes.set_axis_off()
    axes.set_title(title, loc="left", fontsize=11)
    for index, row in enumerate(rows):
        text = f"{row.name}  {'x'.join(map(str, row.shape))}  {row.dtype}  [{row.spec}]"
        axes.text(0.0, index + 0.5, text, va="center", fontsize=7.5, family="monospace")
        for left, width, top, height, held in _parts(row):
            whole = len(held) == devices
            colour = "0.88" if whole else _colour(min(held), devices)
            corner = (0.46 + 0.54 * left, index + 0.08 + 0.84 * top)
            axes.add_patch(Rectangle(corner, 0.54 * width, 0.84 * height, facecolor=colour, edgecolor="white", lw=0.8))
            label = "all" if whole else ",".join(map(str, held))
            if 0.54 * width * 130 > len(label):
                axes.text(
                    corner[0] + 0.27 * width, corner[1] + 0.42 * height, label, ha="center", va="center", fontsize=6
                )
    figure.savefig(path, dpi=150)


def _parts(row: Placed) -> list[tuple[float, float, float, float, list[int]]]:
    """Rectangles (left, width, top, height as fractions) of the parts of an array, with the devices that hold each."""
    ids = {device: i for i, device in enumerate(row.sharding.mesh.devices.flat)}
    shard = row.sharding.shard_shape(row.shape)
    cut = [i for i, (a, b) in enumerate(zip(row.shape, shard, strict=True)) if a != b]
    cut = sorted(sorted(cut, key=lambda i: -row.shape[i])[:2])
    across = cut[-1] if cut else None
    down = cut[0] if len(cut) == 2 else None
    parts: dict[tuple[float, float, float, float], list[int]] = {}

    def extent(dim: int | None, index: tuple[slice, ...]) -> tuple[float, float]:
        if dim is None:
            return 0.0, 1.0
        start, stop, _ = index[dim].indices(row.shape[dim])
        return start / row.shape[dim], (stop - start) / row.shape[dim]

    for device, index in row.sharding.devices_indices_map(row.shape).items():
        parts.setdefault((*extent(across, index), *extent(down, index)), []).append(ids[device])
    return [(*box, sorted(held)) for box, held in parts.items()]


def _colour(device: int, devices: int) -> tuple[float, float, float]:
    """Evenly spaced soft hues."""
    return colorsys.hls_to_rgb(device / devices, 0.78, 0.6)
