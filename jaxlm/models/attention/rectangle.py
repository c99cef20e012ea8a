"""Attention of one stretch of queries to another stretch of keys, as one part of a longer softmax.

The forward pass returns its log-sum-exp, so that parts can be merged (`merge`); the backward pass takes that of the
whole softmax and gives this part's gradients (as in FlashAttention, https://arxiv.org/abs/2307.08691). Both walk
through blocks of queries: no more than a block's logits exist at a time, and under a window a block reads only the keys
it can reach.

Legend: B batch, T queries, S keys, K kv heads, G query heads of one kv head, H head size; t and s are the lengths of
one block of queries and of the keys it reads.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.attention.reference import HIDDEN

BLOCK_LOGITS = 1 << 20
"""Logits of one head and row that exist at a time (4 MiB) ..."""
SMALLEST_BLOCK = 64
"""... but no fewer queries than this, which keep a matmul worth its while."""

Distance = int | Int[Array, ""]
"""How many tokens after the first key the first query stands."""


class Rule(NamedTuple):
    """Which of the keys of its own segment a query sees, and how logits become what the softmax takes."""

    causal: bool
    """Whether a key may stand after a query at all: else none does, and that is not checked."""
    window: int
    softcap: float | None


def forward(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    distance: Distance,
    rule: Rule,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """The output and the log-sum-exp, float32; `q_BKGTH` is scaled already.

    A query that sees no key gets an arbitrary output and a log-sum-exp so low that merging forgets it.
    """
    arrays = (q_BKGTH, k_BKSH, v_BKSH, q_segments_BT, kv_segments_BS)

    def block(nothing: None, first: Any, size: int) -> tuple[None, tuple[jax.Array, ...]]:
        logits, _, at = _logits(arrays, first, size, distance, rule)
        peak = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        total = weights.sum(axis=-1, keepdims=True)
        v = _cut(v_BKSH, at, logits.shape[-1], axis=2)
        return nothing, (_matmul("bkgts,bksh->bkgth", weights.astype(v.dtype), v) / total, peak + jnp.log(total))

    o_BKGTH, lse_BKGT1 = _walk(block, None, q_BKGTH.shape[3], _block_size(arrays, rule))[1]
    return o_BKGTH, lse_BKGT1


def backward(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    distance: Distance,
    rule: Rule,
    do_BKGTH: Float[Array, "B K G T H"],
    lse_BKGT1: Float[Array, "B K G T 1"],
    delta_BKGT1: Float[Array, "B K G T 1"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Gradients of the (scaled) queries, the keys and the values, float32.

    `lse_BKGT1` is of the whole softmax, `delta_BKGT1` the sum over H of the output times its gradient `do_BKGTH`.
    """
    arrays = (q_BKGTH, k_BKSH, v_BKSH, q_segments_BT, kv_segments_BS)

    def block(carry: tuple[jax.Array, jax.Array], first: Any, size: int) -> tuple[Any, tuple[jax.Array, ...]]:
        q, do, lse, delta = (_cut(x, first, size, axis=3) for x in (q_BKGTH, do_BKGTH, lse_BKGT1, delta_BKGT1))
        logits, slope, at = _logits(arrays, first, size, distance, rule)
        k, v = (_cut(x, at, logits.shape[-1], axis=2) for x in (k_BKSH, v_BKSH))
        weights = jnp.exp(logits - lse)
        dlogits = weights * (_matmul("bkgth,bksh->bkgts", do, v) - delta)
        dlogits = (dlogits if slope is None else dlogits * slope).astype(q.dtype)
        dk = _matmul("bkgts,bkgth->bksh", dlogits, q)
        dv = _matmul("bkgts,bkgth->bksh", weights.astype(do.dtype), do)
        carry = (_add(carry[0], dk, at), _add(carry[1], dv, at))
        return carry, (_matmul("bkgts,bksh->bkgth", dlogits, k),)

    zeros = (jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSH.shape, jnp.float32))
    (dk_BKSH, dv_BKSH), (dq_BKGTH,) = _walk(block, zeros, q_BKGTH.shape[3], _block_size(arrays, rule))
    return dq_BKGTH, dk_BKSH, dv_BKSH


def merge(
    o_BKGTH: Float[Array, "B K G T H"],
    lse_BKGT1: Float[Array, "B K G T 1"],
    more_BKGTH: Float[Array, "B K G T H"],
    more_lse_BKGT1: Float[Array, "B K G T 1"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """Output and log-sum-exp over the keys of two parts."""
    both_BKGT1 = jnp.logaddexp(lse_BKGT1, more_lse_BKGT1)
    share, more_share = (jnp.exp(lse - both_BKGT1) for lse in (lse_BKGT1, more_lse_BKGT1))
    return share * o_BKGTH + more_share * more_BKGTH, both_BKGT1


def _logits(arrays, first, size, distance, rule):
    """Masked logits of a block of queries, the derivative of the soft cap there (None without one), the first key."""
    q_BKGTH, k_BKSH, _, q_segments_BT, kv_segments_BS = arrays
    span, at = _reach(k_BKSH.shape[2], first, size, distance, rule)
    q, k = _cut(q_BKGTH, first, size, axis=3), _cut(k_BKSH, at, span, axis=2)
    logits, slope = _matmul("bkgth,bksh->bkgts", q, k), None
    if rule.softcap is not None:
        squashed = jnp.tanh(logits / rule.softcap)
        logits, slope = rule.softcap * squashed, 1.0 - squashed * squashed
    q_segments, kv_segments = _cut(q_segments_BT, first, size, axis=1), _cut(kv_segments_BS, at, span, axis=1)
    seen_Bts = q_segments[:, :, None] == kv_segments[:, None, :]
    if rule.causal or rule.window:
        back_ts = _count(size)[:, None] - _count(span)[None, :] + (distance + first - at)
        seen_ts = back_ts >= 0 if rule.causal else jnp.ones_like(back_ts, bool)
        seen_ts = seen_ts & (back_ts < rule.window) if rule.window else seen_ts
        seen_Bts &= seen_ts[None]
    return jnp.where(seen_Bts[:, None, None], logits, HIDDEN), slope, at


def _reach(keys: int, first: Any, size: int, distance: Distance, rule: Rule) -> tuple[int, Any]:
    """How many keys a block of queries can reach, a static number, and the first of them."""
    span = min(keys, rule.window + size - 1) if rule.window else keys
    if span == keys:
        return keys, 0
    return span, jnp.clip(distance + first - (rule.window - 1), 0, keys - span)


def _block_size(arrays, rule: Rule) -> int:
    length, keys = arrays[0].shape[3], arrays[1].shape[2]
    size = max(SMALLEST_BLOCK, BLOCK_LOGITS // keys)
    return min(length, size, max(SMALLEST_BLOCK, rule.window)) if rule.window else min(length, size)


def _walk(block: Callable, carry: Any, length: int, size: int) -> tuple[Any, tuple[jax.Array, ...]]:
    """carry, outputs = block(carry, first, size) through the queries: whole blocks in a loop, then the rest. The
    outputs are joined along the queries (dim 3)."""
    whole, rest = divmod(length, size)
    if whole == 1 and not rest:
        return block(carry, 0, size)
    carry, outs = jax.lax.scan(lambda c, first: block(c, first, size), carry, _count(whole) * size)
    outs = tuple(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], whole * size, x.shape[-1]) for x in outs)
    if rest:
        carry, more = block(carry, whole * size, rest)
        outs = tuple(jnp.concatenate(pair, axis=3) for pair in zip(outs, more, strict=True))
    return carry, outs


def _cut(x: jax.Array, first: Any, size: int, *, axis: int) -> jax.Array:
    return x if x.shape[axis] == size else jax.lax.dynamic_slice_in_dim(x, first, size, axis=axis)


def _add(whole_BKSH: jax.Array, part_BKsH: jax.Array, at: Any) -> jax.Array:
    """`part` added to the keys from `at` on."""
    if whole_BKSH.shape == part_BKsH.shape:
        return whole_BKSH + part_BKsH
    sum_BKsH = _cut(whole_BKSH, at, part_BKsH.shape[2], axis=2) + part_BKsH
    return jax.lax.dynamic_update_slice_in_dim(whole_BKSH, sum_BKsH, at, axis=2)


def _count(length: int) -> jax.Array:
    return jnp.arange(length, dtype=jnp.int32)


def _matmul(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
