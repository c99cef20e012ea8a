"""Which experts a token goes to, with what weights, and how evenly that spreads.

Legend: B batch, T length, N tokens (B x T), D embed, E experts, K experts of a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config.schema import ModelConfig


class Routing(NamedTuple):
    """Where each token goes."""

    experts_NK: Int[Array, "N K"]
    """E where a token goes nowhere: padding, or dropped."""
    weights_NK: Float[Array, "N K"]
    """float32, with which the experts' outputs are summed."""
    logits_NE: Float[Array, "N E"]
    """float32."""


class Load(NamedTuple):
    """What routing costs and how it spreads, as float32 sums: over rows, devices and microbatches they add up."""

    loss: Float[Array, "..."]
    """To be added to the token losses of the same rows: balance_loss x balance + router_z_loss x squared log-sum-exps
    of the logits."""
    balance: Float[Array, "..."]
    """Each row's E x sum over experts of (share of its choices) x (mean probability), which is 1 where both are even,
    times its tokens without padding (Switch, https://arxiv.org/abs/2101.03961; of each sequence as in DeepSeek V3)."""
    tokens_E: Float[Array, "... E"]
    """Tokens that chose each expert, before any is dropped."""
    dropped: Float[Array, "..."]
    """Choices that found their expert's capacity used up."""

    @classmethod
    def none(cls, config: ModelConfig, *layers: int) -> "Load | None":
        """Of a layer, or so many, that routed nothing; None where there are no experts."""
        zeros = jnp.zeros(layers, jnp.float32)
        return cls(zeros, zeros, jnp.zeros((*layers, config.experts), jnp.float32), zeros) if config.experts else None


def route(
    x_ND: Float[Array, "N D"],
    router_DE: Float[Array, "D E"],
    bias_E: Float[Array, "E"] | None,
    real_N: Bool[Array, "N"],
    config: ModelConfig,
) -> Routing:
    """Choose each token's experts. In float32 throughout: logits that rounding made equal would choose by number.

    Among equals the expert of the lower number is chosen. `bias_E` takes part in the choice only, and has no gradient
    (https://arxiv.org/abs/2408.15664). Tokens that are not `real_N` go nowhere.
    """
    logits = jnp.matmul(x_ND.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    if config.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        ranked = scores if bias_E is None else scores + bias_E[None]
        experts = _top(ranked, config)
        weights = jnp.take_along_axis(scores, experts, axis=1)
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    elif config.router == "softmax":
        experts = _top(logits, config)
        weights = jnp.take_along_axis(jax.nn.softmax(logits), experts, axis=1)
    else:
        experts = _top(logits, config)
        weights = jax.nn.softmax(jnp.take_along_axis(logits, experts, axis=1))
    experts = jnp.where(real_N[:, None], experts, config.experts)
    return Routing(experts, weights * config.router_scale, logits)


def _top(scores_NE: jax.Array, config: ModelConfig) -> jax.Array:
    return jax.lax.top_k(jax.lax.stop_gradient(scores_NE), config.experts_per_token)[1]


def ranks(experts_NK: Int[Array, "N K"], experts: int, parts: int) -> tuple[Int[Array, "N K"], Int[Array, "parts E"]]:
    """How many tokens before each one chose the same expert, and how many chose each expert.

    Counted in each of so many equal `parts` of the tokens by itself.
    """
    ids_E = jnp.arange(experts, dtype=experts_NK.dtype)
    chosen_NE = (experts_NK[:, :, None] == ids_E[None, None]).sum(axis=1, dtype=jnp.int32)
    chosen_PTE = chosen_NE.reshape(parts, -1, experts)
    before_NE = (jnp.cumsum(chosen_PTE, axis=1) - chosen_PTE).reshape(-1, experts)
    ranks_NK = jnp.take_along_axis(before_NE, jnp.minimum(experts_NK, experts - 1), axis=1)
    return ranks_NK, chosen_PTE.sum(axis=1)


def measure(routing: Routing, real_BT: Bool[Array, "B T"], config: ModelConfig, sequence_axes: tuple[str, ...]) -> Load:
    """The load before anything is dropped.

    Args:
        sequence_axes: manual mesh axes over which the rows are cut. What is returned is this device's part of the sums.
    """
    batch, experts = real_BT.shape[0], config.experts
    counts_BE = ranks(routing.experts_NK, experts, batch)[1].astype(jnp.float32)
    real_BT1 = real_BT[:, :, None].astype(jnp.float32)
    logits_BTE = routing.logits_NE.reshape(batch, -1, experts)
    if config.router == "sigmoid":
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        shares_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    else:
        shares_BTE = jax.nn.softmax(logits_BTE)
    # Counts of a whole row have no gradient: its balance is a sum over its tokens, on whatever devices they are.
    row_counts_BE, lengths_B = counts_BE, real_BT1.sum(axis=(1, 2))
    if sequence_axes:
        row_counts_BE, lengths_B = jax.lax.psum((row_counts_BE, lengths_B), sequence_axes)
    shares_BE = (shares_BTE * real_BT1).sum(axis=1)
    even_B = experts / (config.experts_per_token * jnp.maximum(lengths_B, 1.0))
    balance = (even_B * (row_counts_BE * shares_BE).sum(axis=1)).sum()
    loss = config.balance_loss * balance
    if config.router_z_loss:
        loss += config.router_z_loss * (jax.nn.logsumexp(logits_BTE, axis=-1) ** 2 * real_BT1[:, :, 0]).sum()
    return Load(loss, balance, counts_BE.sum(axis=0), jnp.zeros((), jnp.float32))


def within_capacity(experts_NK: Int[Array, "N K"], *, rows: int, capacity: int, experts: int) -> Int[Array, "N K"]:
    """`experts_NK` without the choices that exceed the `capacity` of an expert in a row: earlier tokens come first.

    Each of the `rows` has a capacity of its own, so that what is dropped does not depend on how a batch is cut.
    """
    ranks_NK, _ = ranks(experts_NK, experts, rows)
    return jnp.where(ranks_NK < capacity, experts_NK, experts)
