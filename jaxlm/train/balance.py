"""How evenly experts are chosen: what a step reports of it, and balancing without a loss.

Legend: L layers, E experts.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config.schema import ModelConfig
from jaxlm.models.router import Load


def summary(loads: Load, config: ModelConfig) -> dict[str, jax.Array]:
    """Of a step's loads [L, ...], float32 scalars.

    expert_load_max_over_mean: tokens of the expert most chosen, over the mean of its layer; the largest of all layers.
    balance_loss: the load-balancing loss, unweighted, a token and layer; 1 where all is even.
    dropped_tokens: choices, over all layers, that found their expert's capacity used up.
    """
    tokens_LE = loads.tokens_E
    means_L = tokens_LE.mean(axis=1)
    tokens_L = tokens_LE.sum(axis=1) / config.experts_per_token
    return {
        "expert_load_max_over_mean": (tokens_LE.max(axis=1) / jnp.maximum(means_L, 1e-9)).max(),
        "balance_loss": (loads.balance / jnp.maximum(tokens_L, 1.0)).mean(),
        "dropped_tokens": loads.dropped.sum(),
    }


def rebalanced(params: dict[str, Any], loads: Load, rate: float) -> dict[str, Any]:
    """`params` with each expert's routing bias moved by `rate`: up where fewer tokens than the mean chose it in this
    step, down where more did (https://arxiv.org/abs/2408.15664)."""
    tokens_LE = loads.tokens_E
    step_LE = rate * jnp.sign(tokens_LE.mean(axis=1, keepdims=True) - tokens_LE)
    mlp = params["blocks"]["mlp"]
    bias_LE = mlp["routing_bias"]
    mlp = mlp | {"routing_bias": bias_LE + step_LE.astype(bias_LE.dtype)}
    return params | {"blocks": params["blocks"] | {"mlp": mlp}}
