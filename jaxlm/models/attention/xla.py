"""Attention out of plain XLA operations, arranged so that XLA runs it fast everywhere.

Attention of whole sequences goes through the queries in a few blocks and computes only the keys a block can see:
causality makes that just over half of the logits, a window fewer, and without causality it is all. The softmax divides
the [T, H] output instead of the [T, S] weights, heads are batch dims of plain matmuls, kv heads are shared and never
repeated, and the backward pass recomputes the weights from the log-sum-exp (as FlashAttention does,
https://arxiv.org/abs/2307.08691), so that nothing of size T x S is kept.

Legend: B batch, T target length, S source length, K kv heads, G query heads of one kv head, H head size;
t and s are the lengths of one block of queries and of the keys it can see.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxlm.models.attention.reference import HIDDEN, soft_cap

SAVED_NAME = "attention"
"""Checkpoint name of the output and log-sum-exp: a remat policy that saves it does not run the forward pass twice."""

BLOCK = 64
MAX_BLOCKS = 8


class Block(NamedTuple):
    """Queries, and the keys they can see: the first and one past the last of each."""

    first: int
    end: int
    key_first: int
    key_end: int


def query_blocks(length: int, window: int, causal: bool = True, keys: int | None = None) -> list[Block]:
    """Of a sequence of `length`; under causality a block's keys end where its queries end. Else it has all `keys`.

    At most MAX_BLOCKS, because they are unrolled into the program; BLOCK queries at the least, because smaller matmuls
    lose on CPU what they save.
    """
    count = min(max(length // BLOCK, 1), MAX_BLOCKS)
    edges = [index * length // count for index in range(count + 1)]
    starts = [max(0, first - window + 1) // BLOCK * BLOCK if window else 0 for first in edges[:-1]]
    ends = edges[1:] if causal else [length if keys is None else keys] * count
    return list(map(Block, edges[:-1], edges[1:], starts, ends))


def xla_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    visible_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of any queries to any keys, such as one new token to a cache; statistics in float32."""
    batch, length, heads, head = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).reshape(batch, length, kv_heads, heads // kv_heads, head)
    logits_BKGTS = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    logits_BKGTS = soft_cap(logits_BKGTS, softcap)
    if bias_BNTS is not None:
        logits_BKGTS += bias_BNTS.reshape(-1, kv_heads, heads // kv_heads, *bias_BNTS.shape[2:])
    logits_BKGTS = jnp.where(visible_BTS[:, None, None], logits_BKGTS, HIDDEN)
    weights_BKGTS = jnp.exp(logits_BKGTS - logits_BKGTS.max(axis=-1, keepdims=True))
    total_BTKG = weights_BKGTS.sum(axis=-1).transpose(0, 3, 1, 2)
    o_BTKGH = jnp.einsum(
        "bkgts,bskh->btkgh", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    return (o_BTKGH / total_BTKG[..., None]).astype(q_BTNH.dtype).reshape(q_BTNH.shape)


class Terms(NamedTuple):
    """What is computed."""

    scale: float
    window: int = 0
    softcap: float | None = None
    causal: bool = True


def xla_self_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *terms: Any,
) -> Float[Array, "B T N H"]:
    """Attention of a sequence to itself, within segments; statistics in float32. `terms` are those of Terms."""
    return xla_sequence_attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, segments_BT, None, Terms(*terms))


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def xla_sequence_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    bias_NTS: Float[Array, "N T S"] | None,
    terms: Terms,
) -> Float[Array, "B T N H"]:
    """Attention of a sequence to itself or, not causal, to another one, within segments; statistics in float32.

    The bias is added to the logits of all rows. A query that sees no key has an arbitrary output without gradient.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, bias_NTS, terms)[0]


def _forward(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, bias_NTS, terms):
    kv_heads = k_BSKH.shape[2]
    q_BKGTH = grouped(q_BTNH, kv_heads) * jnp.asarray(terms.scale, q_BTNH.dtype)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    bias_KGTS = None if bias_NTS is None else bias_NTS.reshape(kv_heads, -1, *bias_NTS.shape[1:])
    arrays = (q_BKGTH, k_BKSH, q_segments_BT, kv_segments_BS, bias_KGTS)
    outputs, normalizers = [], []
    for block in query_blocks(q_BTNH.shape[1], terms.window, terms.causal, k_BSKH.shape[1]):
        logits, _ = _block_logits(arrays, block, terms)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = weights.sum(axis=-1, keepdims=True)
        v = v_BKSH[:, :, block.key_first : block.key_end]
        o_BKGtH = _matmul("bkgts,bksh->bkgth", weights.astype(v.dtype), v) / total
        outputs.append(o_BKGtH.astype(q_BTNH.dtype))
        normalizers.append(peak + jnp.log(total))
    o_BTNH = checkpoint_name(ungrouped(jnp.concatenate(outputs, axis=3)), SAVED_NAME)
    lse_BKGT1 = checkpoint_name(jnp.concatenate(normalizers, axis=3), SAVED_NAME)
    return o_BTNH, (arrays, v_BKSH, o_BTNH, lse_BKGT1)


def _backward(terms, residuals, do_BTNH):
    arrays, v_BKSH, o_BTNH, lse_BKGT1 = residuals
    q_BKGTH, k_BKSH, _, _, bias_KGTS = arrays
    dtype, keys = q_BKGTH.dtype, k_BKSH.shape[2]
    do_BKGTH = grouped(do_BTNH, k_BKSH.shape[1])
    # Summed as the arrays lie, then turned: a sum over turned arrays costs XLA:CPU as much as a matmul.
    delta_BTN1 = (do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    delta_BKGT1 = grouped(delta_BTN1, k_BKSH.shape[1])
    dq_blocks: list[jax.Array] = []
    dbias_blocks: list[jax.Array] = []
    dk_BKHS = dv_BKHS = jnp.zeros((), jnp.float32)
    for block in query_blocks(q_BKGTH.shape[3], terms.window, terms.causal, keys):
        first, last, start, end = block
        q, do = q_BKGTH[:, :, :, first:last], do_BKGTH[:, :, :, first:last]
        k, v = k_BKSH[:, :, start:end], v_BKSH[:, :, start:end]
        logits, slope = _block_logits(arrays, block, terms)
        lse = lse_BKGT1[:, :, :, first:last]
        # A query that sees nothing of another sequence has a sum that is lost beside HIDDEN: it gets no weights at all.
        weights = jnp.exp(logits - (lse if terms.causal else jnp.maximum(lse, HIDDEN / 2)))
        dlogits = weights * (_matmul("bkgth,bksh->bkgts", do, v) - delta_BKGT1[:, :, :, first:last])
        around = ((0, 0), (0, 0), (0, 0), (start, keys - end))
        if bias_KGTS is not None:
            dbias_blocks.append(jnp.pad(dlogits.sum(axis=0), around))
        dlogits = (dlogits if slope is None else dlogits * slope).astype(dtype)
        dq_blocks.append((_matmul("bkgts,bksh->bkgth", dlogits, k) * terms.scale).astype(dtype))
        # As [H, S]: a matmul turns its left side around, and q is smaller than the [T, S] weights.
        dk_BKHS += jnp.pad(_matmul("bkgth,bkgts->bkhs", q, dlogits), around)
        dv_BKHS += jnp.pad(_matmul("bkgth,bkgts->bkhs", do, weights.astype(dtype)), around)
    dk_BSKH, dv_BSKH = (grad.transpose(0, 3, 1, 2).astype(dtype) for grad in (dk_BKHS, dv_BKHS))
    dbias_NTS = None
    if bias_KGTS is not None:
        dbias_NTS = jnp.concatenate(dbias_blocks, axis=2).reshape(-1, *bias_KGTS.shape[2:])
    return ungrouped(jnp.concatenate(dq_blocks, axis=3)), dk_BSKH, dv_BSKH, None, None, dbias_NTS


xla_sequence_attention.defvjp(_forward, _backward)


def _block_logits(arrays, block, terms):
    """Masked logits of one block, and the derivative of the soft cap there (None without one)."""
    q_BKGTH, k_BKSH, q_segments_BT, kv_segments_BS, bias_KGTS = arrays
    first, last, start, end = block
    logits = _matmul("bkgth,bksh->bkgts", q_BKGTH[:, :, :, first:last], k_BKSH[:, :, start:end])
    slope = None
    if (softcap := terms.softcap) is not None:
        squashed = jnp.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1.0 - squashed * squashed
    if bias_KGTS is not None:
        logits += bias_KGTS[None, :, :, first:last, start:end]
    seen_Bts = q_segments_BT[:, first:last, None] == kv_segments_BS[:, None, start:end]
    if terms.causal:
        distance_ts = jnp.arange(first, last)[:, None] - jnp.arange(start, end)[None, :]
        seen_ts = (distance_ts >= 0) & (distance_ts < terms.window) if terms.window else distance_ts >= 0
        seen_Bts &= seen_ts[None]
    return jnp.where(seen_Bts[:, None, None], logits, HIDDEN), slope


def _matmul(spec, left, right):
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def grouped(x_BTNH, kv_heads):
    batch, length, heads, head = x_BTNH.shape
    return x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, head).transpose(0, 2, 3, 1, 4)


def ungrouped(x_BKGTH):
    batch, kv_heads, group, length, head = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, head)
