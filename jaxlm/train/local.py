"""Gradients of each device's own rows and tokens, summed by hand: what travels, when and in which order is written.

Left to XLA's partitioner, what `fsdp` scatters is often summed whole and then sliced, and the sums of a replica are
merged with those across replicas.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.models.runtime import Runtime
from jaxlm.parallel import pipeline
from jaxlm.parallel.rules import cut_by

Tree = Any


class Cut(NamedTuple):
    """What a device knows of how parameters and gradients are cut."""

    held: Tree
    """Partition specs of the parameters."""
    automatic: frozenset[str]
    """Mesh axes that are left to the partitioner."""
    reduce: Callable[[Tree], Tree]
    """A device's gradients, summed over the others: inside a replica first, then across replicas."""


def summed(
    gradients: Callable[..., tuple[Tree, Tree]],
    params: Tree,
    batch: dict[str, jax.Array],
    runtime: Runtime,
    *,
    dims: Tree,
    shardings: Tree,
    **arguments: Any,
) -> tuple[Tree, Tree]:
    """`gradients(params, batch, runtime, cut=..., ...)` of what each device has, placed as `shardings`, and the other
    sums that it returns, over all devices.

    It calls `cut.reduce` on gradients before it returns them. Here is the place to synchronise replicas less often, or
    to send less.

    Args:
        dims: logical dims of the parameters.
    """
    layout = runtime.layout
    mesh = layout.mesh
    # All but `model`, whose collectives are within the layers. An axis of one device would cost nothing as automatic,
    # but all manual is the simpler program.
    names = tuple(axis for axis in mesh.axis_names if axis != "model" or mesh.shape[axis] == 1)
    manual, others = frozenset(names), tuple(axis for axis in names if mesh.shape[axis] > 1)
    automatic = frozenset(mesh.axis_names) - manual
    inner = replace(runtime, layout=layout.within(manual))
    held = jax.tree.map(lambda leaf, of: layout.spec(of, leaf.shape), params, dims)
    wanted = jax.tree.map(lambda to, spec: pipeline.scattered(spec, to.spec, automatic), shardings, held)

    def by_hand(specs: Tree) -> Tree:
        return jax.tree.map(lambda spec: cut_by(spec, manual), specs)

    def reduce(grads: Tree) -> Tree:
        if runtime.platform == "cpu":  # XLA:CPU aborts on a sum of bfloat16 that a shard_map asks for
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        return pipeline.reduce_gradients(grads, held, wanted, others, automatic)

    def on_device(params: Tree, batch: dict[str, jax.Array], arguments: dict[str, Any]) -> tuple[Tree, Tree]:
        grads, sums = gradients(params, batch, inner, cut=Cut(held, automatic, reduce), **arguments)
        return grads, jax.lax.psum(sums, others) if others else sums

    grads, sums = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(by_hand(held), cut_by(layout.spec(("batch", "sequence")), manual), PartitionSpec()),
        out_specs=(by_hand(wanted), PartitionSpec()),
        axis_names=manual,
        check_vma=False,
    )(params, batch, arguments)
    return jax.lax.with_sharding_constraint(grads, shardings), sums


def microbatches(batch: dict[str, jax.Array], parts: int) -> dict[str, jax.Array]:
    """A device's rows [B, T] as [M, B / M, T]: microbatch m takes every M-th row from row m, whatever the mesh."""
    return {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
