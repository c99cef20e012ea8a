"""Relative positions (Raffel et al. 2020, https://arxiv.org/abs/1910.10683): what each head adds to the logit of a
query and a key, by the distance between the two.

Distances fall into buckets: each of its own up to half of them, then ever wider ones, and one for all that is far. Of a
bidirectional stack keys behind and keys ahead have half the buckets each; a causal one has no keys ahead.

Legend: B batch, T query length, S key length, N heads, R buckets, D distances.
"""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.layers import normal, parameter
from jaxlm.models.runtime import Runtime

BUCKETS, FAR = 32, 128
"""Buckets, and the distance from which on all is one: what all published models have."""


class RelativeBias(nnx.Module):
    """One table for all layers of a stack."""

    def __init__(self, rngs, config: ModelConfig):
        self.causal = config.causal
        self.embedding = parameter(rngs, (BUCKETS, config.heads), (None, "heads"), normal(config.embed**-0.5))

    def of_sequence(self, length: int, runtime: Runtime) -> Float[Array, "1 N T T"]:
        """Of a sequence to itself, in float32: within a document, distances are those of the places."""
        distances_D = np.arange(1 - length, length, dtype=np.int32)  # of a key, from its query
        one_hot_DR = np.eye(BUCKETS, dtype=np.float32)[buckets(distances_D, causal=self.causal)]
        # A product and a skew, whose backward is a sum in one order, where that of a gather is not on GPU.
        by_distance_ND = (one_hot_DR @ self._table(runtime)).T
        return runtime.layout.constrain(_skewed(by_distance_ND, length)[None], None, "heads", None, None)

    def between(
        self, q_positions_BT: Int[Array, "B T"], kv_positions_BS: Int[Array, "B S"], runtime: Runtime
    ) -> Float[Array, "B N T S"]:
        """Of queries to keys anywhere, in float32; has no gradient that could be relied on to be the same each time."""
        distance_BTS = kv_positions_BS[:, None, :] - q_positions_BT[:, :, None]
        known = jnp.asarray(buckets(np.arange(-FAR, FAR + 1, dtype=np.int32), causal=self.causal))
        rows_BTS = known[jnp.clip(distance_BTS, -FAR, FAR) + FAR]
        bias_BNTS = self._table(runtime)[rows_BTS].transpose(0, 3, 1, 2)
        return runtime.layout.constrain(bias_BNTS, "batch", "heads", None, None)

    def _table(self, runtime: Runtime) -> Float[Array, "R N"]:
        return runtime.use(self.embedding, jnp.float32)


def buckets(distances_D: Int[np.ndarray, "D"], *, causal: bool) -> Int[np.ndarray, "D"]:
    """The bucket of each distance of a key from its query (negative: behind it)."""
    each = BUCKETS if causal else BUCKETS // 2
    away = np.maximum(-distances_D, 0) if causal else np.abs(distances_D)
    exact = each // 2
    # In float32, as the published models were trained: where a bucket ends is decided by rounding.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(FAR / exact))
    wide = exact + (ratio * np.float32(each - exact)).astype(np.int32)
    found = np.where(away < exact, away, np.minimum(wide, each - 1))
    return (found if causal else found + each * (distances_D > 0)).astype(np.int32)


def _skewed(by_distance_ND: Float[Array, "N D"], length: int) -> Float[Array, "N T T"]:
    """Row t, column s: what stands at distance s - t, of D = 2 T - 1 distances."""
    heads, count = by_distance_ND.shape
    rows = jnp.broadcast_to(jnp.pad(by_distance_ND, ((0, 0), (0, 1)))[:, None], (heads, length, count + 1))
    # Read in rows that are one shorter, each begins one further on.
    rows = rows.reshape(heads, -1)[:, : length * count].reshape(heads, length, count)
    return rows[:, :, length - 1 :]
