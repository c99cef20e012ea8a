"""Attention: one function, four backends, three ways over a cut sequence. `choose` picks the backend, `attend` runs it.

Legend: B batch, T target length, S source length, N query heads, K kv heads, H head size.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxlm.config.errors import UserError
from jaxlm.models.attention import xla
from jaxlm.models.attention.kernels import cudnn_attention, splash_attention
from jaxlm.models.attention.reference import reference_attention, visible
from jaxlm.models.attention.ring import Terms, can_permute, ring_attention
from jaxlm.models.attention.select import Choice, choose
from jaxlm.models.attention.shards import HEAD_AXIS, SEQUENCE_AXIS, Local, on_shards, parts
from jaxlm.models.attention.ulysses import heads_for_tokens
from jaxlm.models.attention.xla import SAVED_NAME, xla_attention, xla_self_attention

__all__ = ["SAVED_NAME", "Choice", "attend", "choose"]


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segments_BT: Int[Array, "B T"],
    q_positions_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"] | None = None,
    kv_positions_BS: Int[Array, "B S"] | None = None,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float | None = None,
    bias_BNTS: Float[Array, "#B N T S"] | None = None,
    backend: str,
    mesh: Mesh | None = None,
    context: str = "ring",
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention within segments: softmax(q k^T * scale) v over the keys that a query sees.

    A query sees the keys of its own segment; where `causal`, those at its own position or before, fewer than `window`
    positions back (0: any number). Segment 0 is padding: it attends to itself and stays finite. Query head n reads kv
    head n // (N / K).

    Without `kv_segments_BS` and `kv_positions_BS` this is self-attention: T equals S and, within a segment, positions
    count up by one from token to token, which lets every backend skip what causality hides. With both it is attention
    to a cache, in any order of positions, and with `kv_segments_BS` alone to another sequence, which is not causal:
    those by reference or xla.

    Logits become softcap * tanh(logits / softcap), and `bias_BNTS` is added, before the mask (reference and xla; to a
    sequence, one for all rows). Statistics are float32, the output has q's dtype. `mesh` may be None on one device; its
    "model" axis shards the heads, its "context" axis the tokens of self-attention by the method `context`: "ring" and
    "allgather" expect them in the order of `parallel.zigzag`, "ulysses" in their own. `interpret` is for tests.
    """
    cached, other = kv_positions_BS is not None, kv_segments_BS is not None
    _check(cached, other, causal, window)
    tp, cuts = parts(mesh, HEAD_AXIS), parts(mesh, SEQUENCE_AXIS)
    ways = tp * cuts if cuts > 1 and context == "ulysses" else tp
    k_BSKH, v_BSKH = _kv_heads_for_shards(q_BTNH.shape[2], k_BSKH, v_BSKH, tp if cached else ways)
    kv_segments = q_segments_BT if kv_segments_BS is None else kv_segments_BS
    if cached or backend == "reference":
        kv_positions = kv_positions_BS if other else q_positions_BT
        visible_BTS = visible(q_segments_BT, kv_segments, q_positions_BT, kv_positions, window, causal)
        if backend not in ("reference", "xla"):
            raise UserError(f"attention {backend}: it cannot read a key-value cache; use --attention=auto")
        run = reference_attention if backend == "reference" else xla_attention
        return run(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=scale, softcap=softcap, bias_BNTS=bias_BNTS)
    if cuts == 1 and backend == "xla":  # which the partitioner understands
        bias_NTS = None if bias_BNTS is None else bias_BNTS.squeeze(0)
        terms = xla.Terms(scale, window, softcap, causal)
        return xla.xla_sequence_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments, bias_NTS, terms)
    if other or bias_BNTS is not None:
        raise UserError(f"attention {backend}: it knows one sequence, whole, and no bias; use --attention=auto, not cp")
    local = _whole_sequence(backend, scale, causal, window, softcap, interpret)
    if cuts > 1 and context == "ulysses":
        local = heads_for_tokens(local)
    elif cuts > 1:
        local = partial(ring_attention, terms=Terms(context, scale, causal, window, softcap, can_permute(mesh)))
    return on_shards(local, mesh, q_BTNH, k_BSKH, v_BSKH, q_segments_BT)


def _check(cached: bool, other: bool, causal: bool, window: int) -> None:
    """That the arguments of `attend` go together."""
    if (cached and not other) or (other and not cached and causal):
        raise ValueError("attend: kv_segments_BS come with kv_positions_BS (a cache) or without causality (a sequence)")
    if window and not causal:
        raise ValueError(f"attend: a window of {window} counts back from a query, and this attention is not causal")


def _whole_sequence(
    backend: str, scale: float, causal: bool, window: int, softcap: float | None, interpret: bool
) -> Local:
    """Self-attention by `backend` where a device holds its heads' whole sequence."""
    if backend == "xla":
        return lambda q, k, v, segments: xla_self_attention(q, k, v, segments, scale, window, softcap, causal)
    if backend == "splash":
        return partial(
            splash_attention, scale=scale, causal=causal, window=window, softcap=softcap, interpret=interpret
        )
    if backend == "cudnn" and softcap is None:
        return partial(cudnn_attention, scale=scale, causal=causal, window=window)
    raise UserError(f"attention {backend}: it has no soft cap or no such backend exists; use --attention=auto")


def _kv_heads_for_shards(heads: int, k_BSKH: jax.Array, v_BSKH: jax.Array, shards: int) -> tuple[jax.Array, jax.Array]:
    """Enough kv heads for every shard of the query heads to own the ones it reads.

    Where "model" does not divide the kv heads they are replicated; repeating them is then local, and the fewest copies
    that divide keep each query head beside its kv head.
    """
    kv_heads = k_BSKH.shape[2]
    if kv_heads % shards == 0:
        return k_BSKH, v_BSKH
    copies = shards // kv_heads if shards % kv_heads == 0 else heads // kv_heads
    return jnp.repeat(k_BSKH, copies, axis=2), jnp.repeat(v_BSKH, copies, axis=2)
