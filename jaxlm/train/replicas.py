"""Gradients of replicas: each sums its own over its fast network first, then one sum goes across the slow one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.models.runtime import Runtime
from jaxlm.parallel.rules import cut_by

AXIS = "replica"


def summed_across(
    gradients: Callable[..., tuple[Any, Any]],
    params: Any,
    batch: dict[str, jax.Array],
    runtime: Runtime,
    *,
    shardings: Any,
    **arguments: Any,
) -> tuple[Any, Any]:
    """`gradients(params, batch, runtime, ...)`, which returns sums over tokens, of each replica's rows; then their sum.

    Under a `jax.shard_map` over `replica` alone the partitioner cannot merge the two reductions into one over all
    devices, and what travels between replicas is each device's own part. Here is the place to synchronise less often,
    or to send less.
    """
    layout = runtime.layout
    inner = replace(runtime, layout=layout.within(frozenset([AXIS])))

    def across(x: jax.Array) -> jax.Array:
        wide = runtime.platform == "cpu" and x.dtype == jnp.bfloat16  # whose sum XLA:CPU aborts on
        x = jax.lax.optimization_barrier(x)  # or XLA folds a sum of sums into one
        return jax.lax.psum(x.astype(jnp.float32) if wide else x, AXIS).astype(x.dtype)

    def local(params: Any, batch: dict[str, jax.Array], arguments: dict[str, Any]) -> tuple[Any, Any]:
        mesh = jax.sharding.get_abstract_mesh()
        own = jax.tree.map(lambda sharding: NamedSharding(mesh, sharding.spec), shardings)
        return jax.tree.map(across, gradients(params, batch, inner, shardings=own, **arguments))

    rows = cut_by(layout.spec(("batch",)), [AXIS])
    whole = PartitionSpec()
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(whole, rows, whole),
        out_specs=whole,
        axis_names=frozenset([AXIS]),
        check_vma=False,
    )(params, batch, arguments)
