"""Fused attention kernels of one device: cuDNN flash attention on GPU and Splash on TPU.

Legend: B batch, T length, N query heads, K kv heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.attention.xla import SAVED_NAME

SPLASH_LANES = 128
SPLASH_BLOCK = 512


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *,
    scale: float,
    causal: bool,
    window: int,
) -> Float[Array, "B T N H"]:
    """Flash attention by cuDNN through `jax.nn.dot_product_attention`; segments travel as a [B, 1, T, T] mask."""
    same_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
    reach = (window - 1, 0) if window else None
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=same_B1TS, is_causal=causal, local_window_size=reach, scale=scale,
        implementation="cudnn",
    )  # fmt: skip


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention, JAX's Pallas kernel for TPU; `interpret` runs it, slowly, on any platform.

    Blocks that causality or the window hides are skipped; segments mask inside the others.
    """
    # Here, because importing Pallas takes as long as a tenth of a start.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length = q_BTNH.shape[1]
    whole = masks.CausalMask if causal else masks.FullMask
    mask = masks.LocalMask((length, length), (window - 1, 0), 0) if window else whole((length, length))
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * q_BTNH.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**_splash_blocks(length)),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED_NAME,
        interpret=interpret,
    )
    heads_first = [x.transpose(0, 2, 1, 3) for x in (q_BTNH * jnp.asarray(scale, q_BTNH.dtype), k_BTKH, v_BTKH)]
    o_BNTH = jax.vmap(kernel)(*heads_first, splash.SegmentIds(segments_BT, segments_BT))
    return o_BNTH.transpose(0, 2, 1, 3)


def _splash_blocks(length: int) -> dict[str, Any]:
    """The largest multiple of the TPU's lanes, up to SPLASH_BLOCK, that divides the length."""
    block = max(size for size in range(SPLASH_LANES, SPLASH_BLOCK + 1, SPLASH_LANES) if length % size == 0)
    return dict(  # of splash.BlockSizes
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
