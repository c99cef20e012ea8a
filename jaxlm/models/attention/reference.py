"""What attention means: the plain definition that every backend is tested against, and the visibility rule they share.

Legend: B batch, T target length, S source length, N query heads, K kv heads, G query heads of one kv head, H head size.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -1e30
"""Logit of a key that must not be seen: finite, so that a query that sees nothing yields a mean and never NaN."""


def visible(
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_positions_BT: Int[Array, "B T"],
    kv_positions_BS: Int[Array, "B S"] | None,
    window: int,
    causal: bool = True,
) -> Bool[Array, "B T S"]:
    """Which query sees which key: same segment; where `causal`, also not later, and fewer than `window` tokens back (0:
    any distance). Keys of another sequence have no positions to compare."""
    same_BTS = q_segments_BT[:, :, None] == kv_segments_BS[:, None, :]
    if not causal or kv_positions_BS is None:
        return same_BTS
    distance_BTS = q_positions_BT[:, :, None] - kv_positions_BS[:, None, :]
    seen_BTS = same_BTS & (distance_BTS >= 0)
    return seen_BTS & (distance_BTS < window) if window else seen_BTS


def soft_cap(logits: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Logits squashed smoothly into (-cap, cap) (Gemma 2, https://arxiv.org/abs/2408.00118)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def reference_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Softmax attention in float32, with each kv head repeated for the query heads that share it."""
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    q_BTNH32 = q_BTNH.astype(jnp.float32) * scale
    k_BSNH = jnp.repeat(k_BSKH.astype(jnp.float32), group, axis=2)
    v_BSNH = jnp.repeat(v_BSKH.astype(jnp.float32), group, axis=2)
    logits_BNTS = soft_cap(jnp.einsum("btnh,bsnh->bnts", q_BTNH32, k_BSNH), softcap)
    logits_BNTS = logits_BNTS if bias_BNTS is None else logits_BNTS + bias_BNTS
    weights_BNTS = jax.nn.softmax(jnp.where(visible_BTS[:, None], logits_BNTS, HIDDEN), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights_BNTS, v_BSNH).astype(q_BTNH.dtype)
