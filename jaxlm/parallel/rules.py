"""The one table from logical dimension names to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import AXES

Dims = tuple[str | None, ...]
"""A logical name for each dim of an array; None is never sharded."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "sequence": ("context",),
    "embed": ("fsdp",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "columns": ("model",),
    "layers": ("pipeline",),
    "experts": ("expert",),
}
"""Logical dim -> the mesh axes it is split over. `embed` is of parameters: activations keep it whole. `columns` are
those of a table that may not be cut by rows."""

FLAG = {mesh_axis: axis for axis, mesh_axis in AXES.items()}
"""Mesh axis -> its name on the command line."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A mesh with the rules that hold on it: answers where every array lives."""

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    manual: frozenset[str] = frozenset()
    """Mesh axes that a `jax.shard_map` around the computation took over: arrays are cut over them already, and only
    collectives written out reach across them."""

    def axis_size(self, *dims: str) -> int:
        """Parts into which the logical `dims` of an array are cut, where axes that are manual have cut it already."""
        return math.prod(self.mesh.shape[axis] for dim in dims for axis in self._axes(dim, "array"))

    def manual_axes(self, dim: str) -> tuple[str, ...]:
        """Of the mesh axes that cut `dim`, those that are manual."""
        return tuple(axis for axis in self.rules[dim] if axis in self.manual and self.mesh.shape[axis] > 1)

    def spec(self, dims: Dims, shape: Sequence[int] | None = None, name: str = "array") -> PartitionSpec:
        """The partition spec of an array with logical `dims`; `shape`, where given, is checked to divide.

        Raises:
            UserError: naming the array: an unknown dim, two dims on one mesh axis, a size that does not divide.
        """
        used: dict[str, str] = {}
        entries: list[tuple[str, ...] | None] = []
        for position, dim in enumerate(dims):
            axes = self._axes(dim, name)
            for axis in axes:
                if axis in used:
                    raise UserError(f"{name}: dims {used[axis]!r} and {dim!r} both map to mesh axis {axis!r} (rules)")
                used[axis] = str(dim)
            if shape is not None and axes:
                self._check_divides(name, str(dim), shape[position], axes)
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def sharding(self, dims: Dims, shape: Sequence[int] | None = None, name: str = "array") -> NamedSharding:
        """`spec` on this mesh."""
        # Inside a shard_map arrays live on its own view of the mesh, which knows the manual axes.
        mesh = jax.sharding.get_abstract_mesh() if self.manual else self.mesh
        return NamedSharding(mesh, self.spec(dims, shape, name))

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """Pin an activation, inside jit, to the sharding its logical `dims` ask for."""
        return jax.lax.with_sharding_constraint(x, self.sharding(dims))

    def _axes(self, dim: str | None, name: str) -> tuple[str, ...]:
        if dim is None:
            return ()
        if dim not in self.rules:
            raise UserError(f"{name}: no rule for dim {dim!r}; the dims are {' '.join(self.rules)} (parallel/rules.py)")
        return tuple(axis for axis in self.rules[dim] if axis not in self.manual and self.mesh.shape[axis] > 1)

    def _check_divides(self, name: str, dim: str, size: int, axes: tuple[str, ...]) -> None:
        ways = 1
        for axis in axes:
            ways *= self.mesh.shape[axis]
        if size % ways:
            near = sorted({max(ways, size // ways * ways), (size // ways + 1) * ways})
            flags = ",".join(f"{FLAG[axis]}{self.mesh.shape[axis]}" for axis in axes)
            raise UserError(
                f"{name}: {dim} {size} does not divide over {flags} ({ways} devices); "
                f"use {' or '.join(map(str, near))}, or another --mesh"
            )


def layout(mesh: Mesh, *, kv_heads: int | None = None) -> Layout:
    """The rules on `mesh`. With fewer key and value heads than `tp` needs, those heads are kept whole on each device.

    Args:
        kv_heads: heads of keys and values; a count that divides `tp` (multi-query attention) cannot be split by it.
    """
    rules = dict(RULES)
    model = mesh.shape["model"]
    if kv_heads is not None and kv_heads % model and model % kv_heads == 0:
        rules["kv_heads"] = ()
    return Layout(mesh=mesh, rules=rules)


def spread(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh, axis: str, name: str) -> PartitionSpec:
    """`spec` with the first dim that can take it also split over mesh `axis`: how ZeRO shards optimizer state.

    A dim can take the axis where its size divides by all its axes together. An array with no such dim keeps `spec`
    if it is small (under 2 ** 14 elements); otherwise that is an error naming the array.
    """
    ways = mesh.shape[axis]
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    if ways == 1:
        return spec
    for position, entry in enumerate(entries):
        axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        already = 1
        for held in axes:
            already *= mesh.shape[held]
        if shape[position] % (already * ways) == 0:
            entries[position] = (*axes, axis)
            return PartitionSpec(*entries)
    size = 1
    for length in shape:
        size *= length
    if size < 2**14:
        return spec
    raise UserError(
        f"{name} {tuple(shape)}: no dim divides by {FLAG[axis]}{ways}, so its optimizer state cannot be sharded; "
        "use another --mesh or --optimizer.shard=none"
    )
