"""Rotary position embedding (Su et al. 2021) and its stretches to longer contexts.

Legend: B batch, T length, N heads, H head size.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig

Rotation = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


def frequencies(config: ModelConfig, head_size: int) -> tuple[np.ndarray, float]:
    """Angle per position of each pair of channels, shape [H / 2] float64, and the factor on queries and keys.

    linear: Chen et al. 2023 (positions over factor). llama3: Llama 3.1 (long wavelengths stretched, short ones kept).
    yarn: Peng et al. 2023 (a ramp between the two over the channel index, and a temperature).
    """
    theta = config.rope_theta
    base = theta ** (-np.arange(0, head_size, 2) / head_size)
    factor, original = config.rope_factor, config.rope_original_length
    low, high = config.rope_frequencies
    if config.rope_scaling == "linear":
        return base / factor, 1.0
    if config.rope_scaling == "llama3":
        turns = original * base / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return base * (keep + (1 - keep) / factor), 1.0
    if config.rope_scaling == "yarn":

        def channel(turns: float) -> float:
            return head_size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = max(math.floor(channel(high)), 0), min(math.ceil(channel(low)), head_size - 1)
        stretched = np.clip((np.arange(head_size // 2) - first) / max(last - first, 1e-3), 0.0, 1.0)
        return base * ((1 - stretched) + stretched / factor), 0.1 * math.log(factor) + 1.0
    return base, 1.0


def rotation(config: ModelConfig, head_size: int, positions_BT: Int[Array, "B T"]) -> Rotation:
    """Cosine and sine of each token's angles, float32 [B, T, H / 2]."""
    angles, factor = frequencies(config, head_size)
    angle_BTh = positions_BT.astype(jnp.float32)[:, :, None] * jnp.asarray(angles, jnp.float32)[None, None, :]
    return jnp.cos(angle_BTh) * factor, jnp.sin(angle_BTh) * factor


def rotate(x_BTNH: Float[Array, "B T N H"], turn: Rotation) -> Float[Array, "B T N H"]:
    """Rotate channel pairs (i, i + H / 2), the pairing of Hugging Face's Llama weights."""
    cos, sin = (part[:, :, None, :] for part in turn)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTNH.dtype)
