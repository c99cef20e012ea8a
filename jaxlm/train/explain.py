"""`--explain` and `--dry-run`: where every parameter lives, what the compiled step holds and what it sends."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding
from rich import box
from rich.console import Console
from rich.table import Table

from jaxlm.models.build import Model
from jaxlm.parallel import flags
from jaxlm.parallel.collectives import collectives
from jaxlm.train.state import StatePlan


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One array of the state and its place on the mesh."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[str | None, ...]
    sharding: NamedSharding

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * jax.numpy.dtype(self.dtype).itemsize

    @property
    def device_bytes(self) -> int:
        return math.prod(self.sharding.shard_shape(self.shape)) * jax.numpy.dtype(self.dtype).itemsize

    @property
    def spec(self) -> str:
        """The partition spec in the words of the mesh: axis names by dim, `-` for a dim kept whole."""
        entries = [*self.sharding.spec, *[None] * (len(self.shape) - len(self.sharding.spec))]
        return " ".join("-" if e is None else "+".join(e if isinstance(e, tuple) else (e,)) for e in entries)


def placed(model: Model, plan: StatePlan) -> list[Placed]:
    """Every parameter with its place."""
    dims = dict(jax.tree_util.tree_flatten_with_path(model.dims, is_leaf=lambda d: isinstance(d, tuple))[0])
    return [
        Placed(
            name=jax.tree_util.keystr(path, simple=True, separator="."),
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            dims=dims[path],
            sharding=leaf.sharding,
        )
        for path, leaf in jax.tree_util.tree_flatten_with_path(plan.abstract["params"])[0]
    ]


def explain(model: Model, plan: StatePlan, compiled: jax.stages.Compiled, console: Console) -> None:
    """Print the parameters, the memory and the collectives of a compiled step."""
    rows = placed(model, plan)
    table = Table(title="parameters", box=box.SIMPLE_HEAD)
    for column, right in [("name", False), ("shape", True), ("dtype", False), ("dims", False), ("spec", False)]:
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "name")
    table.add_column("bytes/device", justify="right")
    for row in rows:
        shape = "x".join(map(str, row.shape))
        dims = " ".join(dim or "-" for dim in row.dims)
        table.add_row(row.name, shape, row.dtype, dims, row.spec, f"{row.device_bytes:,}")
    count = sum(math.prod(row.shape) for row in rows)
    table.add_section()
    table.add_row("total", f"{count:,}", "", "", f"{sum(r.bytes for r in rows):,} bytes in all", _device_bytes(rows))
    console.print(table)
    memory(plan, compiled, console)
    mesh = cast(Mesh, rows[0].sharding.mesh)
    traffic = Table(title="collectives of one compiled step, per device", box=box.SIMPLE_HEAD)
    device = mesh.devices.flat[0]
    options = flags.options(device.platform, device.device_kind)
    for column in ("kind", "axis", "count", "bytes", *(["overlapped"] if options else [])):
        traffic.add_column(column, justify="left" if column in ("kind", "axis") else "right")
    found = collectives(compiled.as_text() or "", mesh)
    for c in found:
        traffic.add_row(c.kind, c.axes, f"{c.count:,}", f"{c.bytes:,}", *([f"{c.overlapped:,}"] if options else []))
    if not found:
        traffic.add_row("none", "", "0", "0")
    console.print(traffic)
    if options:
        console.print(compiler_options(options))


def compiler_options(options: tuple[flags.Option, ...]) -> Table:
    """What the compiler was told about overlap, and why."""
    table = Table(title="compiler options", box=box.SIMPLE_HEAD)
    for column in ("option", "value", "why"):
        table.add_column(column, no_wrap=column == "option")
    for option in options:
        table.add_row(option.name, str(option.value).lower(), option.why)
    return table


def memory(plan: StatePlan, compiled: jax.stages.Compiled, console: Console) -> None:
    """Print what one device holds: the state by part, and what the compiler says of the step."""
    table = Table(title="memory, bytes per device", box=box.SIMPLE_HEAD)
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for part in ("params", "optimizer"):
        table.add_row(part, f"{sum(_shard_bytes(plan.abstract[part])):,}")
    accumulators = (
        math.prod(sharding.shard_shape(leaf.shape)) * 4
        for leaf, sharding in zip(
            jax.tree.leaves(plan.abstract["params"]), jax.tree.leaves(plan.gradients), strict=True
        )
    )
    table.add_row("gradients (float32)", f"{sum(accumulators):,}")
    stats = compiled.memory_analysis()
    if stats is not None:
        table.add_section()
        table.add_row("arguments of the step", f"{stats.argument_size_in_bytes:,}")
        table.add_row("temporaries of the step", f"{stats.temp_size_in_bytes:,}")
        table.add_row(
            "outputs not in place of arguments", f"{stats.output_size_in_bytes - stats.alias_size_in_bytes:,}"
        )
    console.print(table)


def _shard_bytes(tree: Any) -> Iterator[int]:
    for leaf in jax.tree.leaves(tree):
        yield math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _device_bytes(rows: list[Placed]) -> str:
    return f"{sum(row.device_bytes for row in rows):,}"
