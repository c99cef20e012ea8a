"""The order of a sequence over the devices of `context` that gives all of them the same work under a causal mask.

Of a sequence in 2n pieces, device i of n holds pieces i and 2n - 1 - i. Nothing but attention needs to know: tokens,
targets, positions, segments and masks are put in this order once, at the start of a step, and the loss is a sum.

Legend: B batch, T length.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from jaxlm.parallel.rules import Layout

AXIS = "context"


def order(length: int, devices: int) -> np.ndarray:
    """Number of the token that stands at each place, where the devices' parts stand one after the other."""
    pieces = np.arange(length).reshape(2 * devices, -1)
    return np.concatenate([pieces[[i, 2 * devices - 1 - i]].ravel() for i in range(devices)])


def zigzag(arrays: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Arrays [B, T] of a batch, cut over `context`, in the order that this module is about; each token moves once."""
    devices = layout.axis_size("sequence")
    if devices == 1:
        return arrays
    spec = layout.spec(("batch", "sequence"))
    move = jax.shard_map(_exchange, mesh=layout.mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return {name: move(x_BT) for name, x_BT in arrays.items()}


def _exchange(x_BT: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
    """This device's pieces 2i and 2i + 1 go where they belong; each device is sent one even piece and one odd one."""
    devices = jax.lax.axis_size(AXIS)
    home = [min(piece, 2 * devices - 1 - piece) for piece in range(2 * devices)]
    even, odd = (
        jax.lax.ppermute(part, AXIS, [(i, home[2 * i + first]) for i in range(devices)])
        for first, part in enumerate(jnp.split(x_BT, 2, axis=1))
    )
    # Device i's own piece i comes before its piece 2n - 1 - i.
    first_is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.concatenate([jnp.where(first_is_even, even, odd), jnp.where(first_is_even, odd, even)], axis=1)
