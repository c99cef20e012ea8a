"""Attention over a cut sequence by exchanging tokens for heads: each device gets all tokens of some heads, and any
kernel of one device does the rest (DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509).
"""

import jax

from jaxlm.models.attention.shards import SEQUENCE_AXIS, Local


def heads_for_tokens(local: Local) -> Local:
    """`local`, which wants whole sequences, where "context" is manual and cuts them; it must divide all heads."""

    def exchanged(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array) -> jax.Array:
        q, k, v = (
            jax.lax.all_to_all(x, SEQUENCE_AXIS, split_axis=2, concat_axis=1, tiled=True)
            for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        segments = jax.lax.all_gather(segments_BT, SEQUENCE_AXIS, axis=1, tiled=True)
        return jax.lax.all_to_all(local(q, k, v, segments), SEQUENCE_AXIS, split_axis=1, concat_axis=2, tiled=True)

    return exchanged
