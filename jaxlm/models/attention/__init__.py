"""Attention: one function, four backends. `choose` picks the backend, `attend` runs it.

Legend: B batch, T target length, S source length, N query heads, K kv heads, H head size.
"""

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxlm.config.errors import UserError
from jaxlm.models.attention.kernels import HEAD_AXIS, cudnn_attention, splash_attention
from jaxlm.models.attention.reference import reference_attention, visible
from jaxlm.models.attention.select import Choice, choose
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
    window: int = 0,
    softcap: float | None = None,
    backend: str,
    mesh: Mesh | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Causal attention within segments: softmax(q k^T * scale) v over the keys that a query sees.

    A query sees the keys of its own segment at its own position or before, fewer than `window` positions back (0: any
    number). Segment 0 is padding: it attends to itself and stays finite. Query head n reads kv head n // (N / K).

    Without `kv_segments_BS` and `kv_positions_BS` this is self-attention: T equals S and, within a segment, positions
    count up by one from token to token, which lets every backend skip what causality hides. With them it is attention
    to a cache, in any order of positions, by reference or xla.

    Logits become softcap * tanh(logits / softcap) before the mask. Statistics are float32 in every backend; the output
    has q's dtype. `mesh` may be None on one device; its "model" axis shards the heads. `interpret` is for tests.
    """
    cached = kv_segments_BS is not None
    if cached != (kv_positions_BS is not None):
        raise ValueError("attend: give both kv_segments_BS and kv_positions_BS (a cache) or neither (self-attention)")
    k_BSKH, v_BSKH = _kv_heads_for_shards(q_BTNH.shape[2], k_BSKH, v_BSKH, mesh)
    if backend == "xla" and not cached:
        return xla_self_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale, window, softcap)
    if backend in ("reference", "xla"):
        kv_segments = q_segments_BT if kv_segments_BS is None else kv_segments_BS
        kv_positions = q_positions_BT if kv_positions_BS is None else kv_positions_BS
        visible_BTS = visible(q_segments_BT, kv_segments, q_positions_BT, kv_positions, window)
        run = reference_attention if backend == "reference" else xla_attention
        return run(q_BTNH, k_BSKH, v_BSKH, visible_BTS, scale=scale, softcap=softcap)
    if cached:
        raise UserError(f"attention {backend}: it cannot read a key-value cache; use --attention=auto")
    if backend == "splash":
        return splash_attention(
            q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window, softcap=softcap, mesh=mesh,
            interpret=interpret,
        )  # fmt: skip
    if backend == "cudnn" and softcap is None:
        return cudnn_attention(q_BTNH, k_BSKH, v_BSKH, q_segments_BT, scale=scale, window=window, mesh=mesh)
    raise UserError(f"attention {backend}: it has no soft cap or no such backend exists; use --attention=auto")


def _kv_heads_for_shards(heads, k_BSKH, v_BSKH, mesh):
    """Enough kv heads for every shard of the query heads to own the ones it reads.

    Where "model" does not divide the kv heads they are replicated; repeating them is then local, and the fewest copies
    that divide keep each query head beside its kv head.
    """
    shards, kv_heads = (mesh.shape.get(HEAD_AXIS, 1) if mesh is not None else 1), k_BSKH.shape[2]
    if kv_heads % shards == 0:
        return k_BSKH, v_BSKH
    copies = shards // kv_heads if shards % kv_heads == 0 else heads // kv_heads
    return jnp.repeat(k_BSKH, copies, axis=2), jnp.repeat(v_BSKH, copies, axis=2)
