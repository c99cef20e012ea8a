"""Draws what each axis of the mesh cuts, as the rules of `jaxlm.parallel` place it on simulated devices.

    python docs/pictures/axes.py

writes a picture of each of MESHES beside this file.
"""

import colorsys
import os
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from jaxlm.config.mesh_spec import parse  # noqa: E402
from jaxlm.parallel import rules, zigzag  # noqa: E402
from jaxlm.parallel.mesh import from_devices  # noqa: E402

MESHES = {
    "dp": "dp4",
    "fsdp": "fsdp4",
    "rep": "rep2,fsdp2",
    "tp": "tp4",
    "pp": "pp4",
    "cp": "cp4",
    "ep": "ep4",
}
"""Name of the picture -> mesh."""

ARRAYS = {
    "tokens": ("batch", "sequence"),
    "residual stream": ("batch", "residual"),
    "heads": ("batch", "heads"),
    "weights, of its layers": ("embed", "mlp"),
    "layers": ("layers", None),
    "experts": ("experts", None),
}
"""Title -> the dims drawn, down and across."""

CELLS = 8


def owners(layout: rules.Layout, dims: rules.Dims) -> np.ndarray:
    """For each cell of [8, 8] the devices that hold it, as text; "all" where every one does."""
    devices = list(layout.mesh.devices.flat)
    held: np.ndarray = np.empty((CELLS, CELLS), object)
    held.fill(())
    for device, index in layout.sharding(dims).devices_indices_map(held.shape).items():
        for cell in np.ndindex(held[index].shape):
            held[index][cell] = (*held[index][cell], devices.index(device))
    if dims[1] in ("sequence", "residual") and layout.axis_size("sequence") > 1:
        held = held[:, np.argsort(zigzag.order(CELLS, layout.axis_size("sequence")))]
    return held


def colour(held: tuple[int, ...], devices: int) -> tuple[float, float, float]:
    if len(held) == devices:
        return (0.88, 0.88, 0.88)
    return colorsys.hls_to_rgb(min(held) / devices, 0.75, 0.6)


def draw(mesh: str, path: Path) -> None:
    spec = parse(mesh)
    layout = rules.layout(
        from_devices(spec, jax.devices()[: spec.device_count]), sequence_parallel=spec.sizes["tp"] > 1
    )
    figure = Figure(figsize=(11, 2.3), layout="constrained")
    heading = f"--mesh={mesh}: which of {spec.device_count} devices holds what (grey: all)"
    figure.suptitle(heading, fontsize=9, x=0.01, ha="left")
    for axes, (title, dims) in zip(figure.subplots(1, len(ARRAYS)), ARRAYS.items(), strict=True):
        held = owners(layout, dims)
        axes.imshow([[colour(cell, spec.device_count) for cell in row] for row in held], aspect="auto")
        for part in set(held.flat):
            rows, columns = np.nonzero([[cell == part for cell in row] for row in held])
            label = "all" if len(part) == spec.device_count else ",".join(map(str, part))
            for column in _runs(sorted(set(columns))):
                axes.text(np.mean(column), rows.mean(), label, ha="center", va="center", fontsize=7)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel((dims[1] or "").replace("residual", "sequence"), fontsize=7)
        axes.set_ylabel(dims[0], fontsize=7)
        axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def _runs(numbers: list[int]) -> list[list[int]]:
    """Consecutive numbers together."""
    cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    return [list(part) for part in np.split(numbers, cuts)]


def main() -> None:
    for name, mesh in MESHES.items():
        draw(mesh, Path(__file__).parent / f"{name}.png")


if __name__ == "__main__":
    main()
