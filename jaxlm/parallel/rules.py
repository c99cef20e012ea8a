"""The one table from logical dimension names to mesh axes, and the shardings that follow from it."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import AXES

Dims = tuple[str | None, ...]
"""A logical name for each dim of an array; None is never sharded."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("replica", "data", "fsdp", "expert"),
    "sequence": ("context",),
    "residual": ("context",),
    "embed": ("fsdp",),
    "heads": ("model",),
    "kv_heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "shards": ("model",),
    "layers": ("pipeline",),
    "experts": ("expert",),
}
"""Logical dim -> the mesh axes it is split over. `embed` is of parameters: activations keep it whole. `residual` is the
sequence between the blocks' halves, where norms and sums are: sequence parallelism cuts it over `model` too. `shards`
has an entry for each device of `model`: its own copy of something, or what it adds to a sum."""

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

    def within(self, manual: frozenset[str]) -> "Layout":
        """The layout inside a `jax.shard_map` over the `manual` axes, where a stage has its layers to itself."""
        rules = {dim: tuple(axis for axis in axes if axis != "pipeline") for dim, axes in self.rules.items()}
        return Layout(mesh=self.mesh, rules=rules, manual=manual)

    def axes(self, dim: str | None) -> tuple[str, ...]:
        """The mesh axes that cut `dim`, without those that are manual."""
        return self._axes(dim, "array")

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

    def relay(self, x: jax.Array, was: Dims, becomes: Dims) -> jax.Array:
        """`x` laid out by other dims, and its gradient laid out as `x` was: collectives that mirror each other.

        A constraint alone would hold the gradient to `becomes` as well: summed whole where a part is wanted.
        """

        @jax.custom_vjp
        def move(x: jax.Array) -> jax.Array:
            return self.constrain(self.constrain(x, *was), *becomes)

        def back(_: None, g: jax.Array) -> tuple[jax.Array]:
            return (self.constrain(self.constrain(g, *becomes), *was),)

        move.defvjp(lambda x: (move(x), None), back)
        return move(x)

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


def across(run: Callable[[jax.Array], jax.Array], x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`run(x)`, a collective over manual axes, of an array that automatic axes cut as `spec`, as they cut the result.

    Left to itself, XLA's partitioner gathers `x` over the automatic axes first: so they are made manual too.
    """
    automatic = frozenset(axis for dim in range(len(spec)) for axis in axes_of(spec, dim))
    if not automatic:
        return run(x)
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=automatic, check_vma=False)(x)


def sum_scatter(x: jax.Array, axes: str | tuple[str, ...], dim: int) -> jax.Array:
    """Within a `jax.shard_map`: the sum of `x` over the devices along `axes`, of `dim` the part that is this one's."""
    # The devices are a dim of their own that comes first: where a dim of size 1 does, TPU's compiler makes an
    # all-reduce of it, at twice the bytes.
    devices = jax.lax.axis_size(axes)
    parts = x.reshape(*x.shape[:dim], devices, x.shape[dim] // devices, *x.shape[dim + 1 :])
    return jax.lax.psum_scatter(jnp.moveaxis(parts, dim, 0), axes)


def cut_by(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
    """What of `spec` is about `axes`."""
    kept = (tuple(name for name in axes_of(spec, dim) if name in axes) for dim in range(len(spec)))
    return PartitionSpec(*(names or None for names in kept))


def axes_of(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """The mesh axes that cut dim `dim`, outermost first."""
    entry = spec[dim] if dim < len(spec) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "stages": {},
    "dealt": {"layers": (), "embed": ("fsdp", "pipeline")},
    "forward": {"layers": (), "embed": ("fsdp", "pipeline"), "batch": (*RULES["batch"], "pipeline")},
    "decode": {
        "layers": (),
        "embed": ("fsdp", "pipeline"),
        "batch": (*RULES["batch"], "pipeline", "context"),
        "sequence": (),
        "residual": (),
    },
}
"""What differs from RULES, by what the arrays are for. stages: training where each stage holds its consecutive layers.
dealt: training where stages hold layers from all over the model, which are exchanged when a step begins. forward: no
pipeline at all, its axis is one more of fsdp; decode: nor sequences to cut, so context takes rows too."""


def layout(
    mesh: Mesh, *, kv_heads: int | None = None, variant: str = "stages", sequence_parallel: bool = False
) -> Layout:
    """The rules on `mesh`. With fewer key and value heads than `tp` needs, those heads are kept whole on each device.

    Args:
        kv_heads: heads of keys and values; a count that divides `tp` (multi-query attention) cannot be split by it.
        variant: one of VARIANTS.
        sequence_parallel: norms and residuals cut over `model` by sequence (Korthikanti et al. 2022), where the
            variant has sequences to cut.
    """
    rules = RULES | VARIANTS[variant]
    if sequence_parallel and rules["residual"]:
        rules["residual"] = (*rules["residual"], "model")
    model = mesh.shape["model"]
    if kv_heads is not None and kv_heads % model and model % kv_heads == 0:
        rules["kv_heads"] = ()
    return Layout(mesh=mesh, rules=rules)


def spread(spec: PartitionSpec, shape: Sequence[int], mesh: Mesh, axis: str, name: str) -> PartitionSpec:
    """`spec` with one dim that can take it also split over mesh `axis`: how ZeRO shards optimizer state.

    A dim can take the axis where its size divides by all its axes together; one that is whole comes first, one that
    `model` cuts last, because what a shard_map scatters must not be cut by an axis that it left automatic. Of several
    the largest: were layers dealt out, each gradient would be summed whole for the one device that keeps it. An array
    with no such dim keeps `spec` if it is small (under 2 ** 14 elements); otherwise that is an error naming the array.
    """
    ways = mesh.shape[axis]
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    if ways == 1:
        return spec
    held = [axes_of(spec, dim) for dim in range(len(shape))]
    for dim in sorted(range(len(shape)), key=lambda dim: ("model" in held[dim], len(held[dim]), -shape[dim])):
        if shape[dim] % (math.prod(mesh.shape[name] for name in held[dim]) * ways) == 0:
            entries[dim] = (*held[dim], axis)
            return PartitionSpec(*entries)
    if math.prod(shape) < 2**14:
        return spec
    raise UserError(
        f"{name} {tuple(shape)}: no dim divides by {FLAG[axis]}{ways}, so its optimizer state cannot be sharded; "
        "use another --mesh or --optimizer.shard=none"
    )
