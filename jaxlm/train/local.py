"""Gradients of each device's own rows and tokens, summed by hand: what travels, when and in which order is written.

Left to XLA's partitioner, what `fsdp` scatters is often summed whole and then sliced, and the sums of a replica are
merged with those across replicas.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.models.runtime import Runtime
from jaxlm.parallel import pipeline
from jaxlm.parallel.rules import Layout, cut_by

Tree = Any
Reduce = Callable[[Tree], Tree]


def axes(layout: Layout) -> tuple[str, ...]:
    """The mesh axes that are taken over: all but `model`, whose collectives are within the layers."""
    mesh = layout.mesh
    # An axis of one device would cost nothing as automatic, but all manual is the simpler program.
    return tuple(axis for axis in mesh.axis_names if axis != "model" or mesh.shape[axis] == 1)


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
    """`gradients(params, batch, runtime, reduce=..., ...)` of what each device has, and the other sums it returns, over
    all devices.

    It calls `reduce` on gradients before it returns them: inside a replica first, then across replicas. Here is the
    place to synchronise those less often, or to send less.
    """
    layout = runtime.layout
    mesh, names = layout.mesh, axes(layout)
    manual = frozenset(names)
    automatic = frozenset(mesh.axis_names) - manual
    inner = replace(runtime, layout=layout.within(manual))
    held = jax.tree.map(lambda leaf, of: layout.spec(of, leaf.shape), params, dims)
    wanted = jax.tree.map(lambda to, spec: pipeline.scattered(spec, to.spec, automatic), shardings, held)

    def by_hand(specs: Tree) -> Tree:
        return jax.tree.map(lambda spec: cut_by(spec, manual), specs)

    def reduce(grads: Tree) -> Tree:
        if runtime.platform == "cpu":  # XLA:CPU aborts on a sum of bfloat16 that a shard_map asks for
            grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
        return pipeline.reduce_gradients(grads, held, wanted, [a for a in names if mesh.shape[a] > 1], automatic)

    def local(params: Tree, batch: dict[str, jax.Array], arguments: dict[str, Any]) -> tuple[Tree, Tree]:
        grads, sums = gradients(params, batch, inner, reduce=reduce, **arguments)
        return grads, jax.lax.psum(sums, names)

    grads, sums = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_hand(held), cut_by(layout.spec(("batch", "sequence")), manual), PartitionSpec()),
        out_specs=(by_hand(wanted), PartitionSpec()),
        axis_names=manual,
        check_vma=False,
    )(params, batch, arguments)
    return jax.lax.with_sharding_constraint(grads, shardings), sums
