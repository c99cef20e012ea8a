"""The mesh grammar: `dp4,tp2` names how many devices each kind of parallelism gets.

Axes stand outermost (slowest network) first; the right-hand names are those of the device mesh.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches

from jaxlm.config.errors import UserError
from jaxlm.config.values import shown

AXES = {
    "rep": "replica",
    "pp": "pipeline",
    "dp": "data",
    "fsdp": "fsdp",
    "ep": "expert",
    "cp": "context",
    "tp": "model",
}
"""Axis of the command line -> axis of the device mesh, outermost first."""


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Sizes of the seven axes, by command-line name; at most one is -1 (the rest of the devices)."""

    sizes: dict[str, int]

    @property
    def inferred(self) -> str | None:
        """The axis whose size is -1, if any."""
        return next((axis for axis, size in self.sizes.items() if size == -1), None)

    @property
    def device_count(self) -> int:
        """Devices the sizes multiply to, the inferred axis counted as 1."""
        return math.prod(abs(size) for size in self.sizes.values())

    def __str__(self) -> str:
        return ",".join(f"{a}{n}" for a, n in self.sizes.items() if n != 1) or "dp1"

    def resolve(self, device_count: int) -> "MeshSpec":
        """Fill in the inferred size and check the product against `device_count` devices."""
        sizes = dict(self.sizes)
        if self.inferred:
            sizes[self.inferred] = device_count // self.device_count
        if math.prod(sizes.values()) == device_count:
            return MeshSpec(sizes=sizes)
        arithmetic = " x ".join(f"{a} {n}" for a, n in self.sizes.items() if n not in (1, -1)) or "1"
        relation = "does not divide" if self.inferred else "is not"
        raise UserError(
            f"mesh {self}: {arithmetic} = {self.device_count} {relation} the {device_count} devices there are; "
            f"use {nearest(self, device_count)} (--mesh)"
        )


def nearest(spec: MeshSpec, device_count: int) -> MeshSpec:
    """The mesh on `device_count` devices whose sizes stand nearest (in ratio) to those asked for."""
    asked = [a for a, n in spec.sizes.items() if n != 1] or ["dp"]

    def candidates(axes: list[str], devices: int) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: devices}
            return
        for size in (d for d in range(1, devices + 1) if devices % d == 0):
            for rest in candidates(axes[1:], devices // size):
                yield {axes[0]: size, **rest}

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(math.log(sizes[a] / n)) for a, n in spec.sizes.items() if a in sizes and n > 0)

    best = min(candidates(asked, device_count), key=distance)
    return MeshSpec(sizes={axis: best.get(axis, 1) for axis in AXES})


def parse(text: str) -> MeshSpec:
    """Read a mesh from the command line; an axis that is not named has size 1."""
    sizes = dict.fromkeys(AXES, 1)
    named: set[str] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([a-z]+)(-?\d{1,9})\s*", part)
        if not match:
            raise UserError(f"mesh {shown(text)}: {shown(part)} is not an axis and a size; write dp4,tp2 (--mesh)")
        axis, size = match[1], int(match[2])
        if axis not in AXES:
            near = get_close_matches(axis[:80], [*AXES, *AXES.values()], n=1, cutoff=0.0)[0]
            near = next((a for a, name in AXES.items() if near in (a, name)), near)
            raise UserError(
                f"mesh {shown(text)}: no axis {shown(axis)}; nearest is {near!r}, all are {' '.join(AXES)} (--mesh)"
            )
        if axis in named:
            raise UserError(f"mesh {shown(text)}: axis {axis!r} stands twice; give it one size (--mesh)")
        if size < 1 and size != -1:
            raise UserError(f"mesh {shown(text)}: size {size} of {axis!r}; use 1 or more, or -1 for the rest (--mesh)")
        named.add(axis)
        sizes[axis] = size
    if sum(size == -1 for size in sizes.values()) > 1:
        raise UserError(f"mesh {shown(text)}: two sizes are -1; give all but one a number (--mesh)")
    return MeshSpec(sizes=sizes)
