"""The two collectives of sequence parallelism (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198).

Written out and each the other's transpose, because left to a change of layout XLA sums everything on every device where
a torus has more axes than the one summed over, and then takes a part of it: twice the bytes.

Legend: B batch, T length, S devices along `model`, D embed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlm.parallel import rules
from jaxlm.parallel.rules import Dims, Layout

PARTS: Dims = ("batch", "residual", None)
COPIES: Dims = ("batch", "sequence", "shards", None)

Collective = Callable[[jax.Array, Layout], jax.Array]


def gather_copies(x_BTD: Float[Array, "B T D"], layout: Layout) -> Float[Array, "B T S D"]:
    """The residual stream, cut over `model` by sequence, whole on each of those devices: an all-gather."""
    return _pair(_gather, _scatter, layout)(x_BTD)


def sum_copies(y_BTSD: Float[Array, "B T S D"], layout: Layout) -> Float[Array, "B T D"]:
    """The sum of what the devices of `model` computed, each with its part of the sequence: a reduce-scatter."""
    return _pair(_scatter, _gather, layout)(y_BTSD)


def _pair(run: Collective, transpose: Collective, layout: Layout) -> Callable[[jax.Array], jax.Array]:
    """`run`, with `transpose` as its backward."""

    @jax.custom_vjp
    def apply(x: jax.Array) -> jax.Array:
        return run(x, layout)

    apply.defvjp(lambda x: (apply(x), None), lambda _, g: (transpose(g, layout),))
    return apply


def gathered(x_BTD: jax.Array) -> jax.Array:
    """Within a shard_map: the tokens of all devices of `model`."""
    return jax.lax.all_gather(x_BTD, "model", axis=1, tiled=True)


def scattered(y_BTD: jax.Array, platform: str) -> jax.Array:
    """Within a shard_map: the sum over the devices of `model`, of this one's tokens."""
    # XLA:CPU aborts on a reduce-scatter of bfloat16 that a shard_map asks for.
    dtype = jnp.float32 if platform == "cpu" else y_BTD.dtype
    return rules.sum_scatter(y_BTD.astype(dtype), "model", 1).astype(y_BTD.dtype)


def _gather(x_BTD: jax.Array, layout: Layout) -> jax.Array:
    return _on_devices(lambda x: gathered(x)[:, :, None], x_BTD, layout, PARTS, COPIES)


def _scatter(y_BTSD: jax.Array, layout: Layout) -> jax.Array:
    platform = layout.mesh.devices.flat[0].platform
    return _on_devices(lambda y: scattered(y[:, :, 0], platform), y_BTSD, layout, COPIES, PARTS)


def _on_devices(
    run: Callable[[jax.Array], jax.Array], x: jax.Array, layout: Layout, was: Dims, becomes: Dims
) -> jax.Array:
    """`run` on each device's part. Over every axis that cuts it: XLA would gather it over those left automatic."""
    return jax.shard_map(
        run,
        mesh=jax.sharding.get_abstract_mesh() if layout.manual else layout.mesh,
        in_specs=layout.spec(was),
        out_specs=layout.spec(becomes),
        axis_names=frozenset(axis for dim in (*was, *becomes) for axis in layout.axes(dim)),
        check_vma=False,
    )(x)
