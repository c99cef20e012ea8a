"""The decoder: embedding, a scanned stack of blocks, a final norm, an output layer.

Legend: B batch, T query length, S cache length, D embed, V vocabulary (padded), K kv heads, H head size, L layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.block import Block, Tokens, head_size, kv_heads
from jaxlm.models.layers import Linear, Norm, dropout, normal, parameter
from jaxlm.models.runtime import Runtime
from jaxlm.models.stack import run_chunk, run_stack
from jaxlm.parallel.rules import Layout

Cache = dict[str, Any]
"""k, v [L, B, S, K, H]; positions, segments [B, S] (segment -1: empty); length, the slots used."""


class Embedding(nnx.Module):
    """A table of vectors, one a row."""

    def __init__(self, rngs, rows: int, embed: int, dim: str | None):
        self.embedding = parameter(rngs, (rows, embed), (dim, "embed"), normal(0.02))


class Decoder(nnx.Module):
    """A causal language model up to its final norm; `output_matrix` turns its result into logits."""

    def __init__(self, rngs, config: ModelConfig, vocabulary: int):
        self.config = config
        self.tokens = Embedding(rngs, vocabulary, config.embed, "vocab")
        if config.positions == "learned":
            self.positions = Embedding(rngs, config.max_positions, config.embed, None)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(rngs, config)

        self.blocks = stack(rngs)
        self.final_norm = Norm(rngs, config, size=config.embed)
        if not config.tied:
            self.head = Linear(rngs, (config.embed, vocabulary), ("embed", "vocab"), bias=False, std=config.embed**-0.5)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values in it."""
        x = self.embed(tokens_BT, positions_BT, runtime, key=key)
        where = Tokens(positions_BT, segments_BT)
        if cache is not None:
            cache = _append_tokens(cache, positions_BT, segments_BT)
            where = Tokens(positions_BT, segments_BT, cache["positions"], cache["segments"])
        x, cache = run_stack(self.blocks, self.config, x, where, runtime, key=key, cache=cache)
        return self.final_norm(x, runtime), cache

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """What the first block reads."""
        config, layout = self.config, runtime.layout
        x = lookup_table(runtime.use(self.tokens.embedding), layout)[tokens_BT]
        if config.embed_scale:
            x = x * jnp.asarray(math.sqrt(config.embed), x.dtype)
        if config.positions == "learned":
            x = x + runtime.use(self.positions.embedding)[positions_BT]
        x = dropout(x, config.dropout, None if key is None else jax.random.fold_in(key, config.layers))
        return layout.constrain(x, "batch", "sequence", None)

    def run_chunk(
        self,
        numbers_L: Int[Array, "L"],
        x_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        ragged: bool,
        key: jax.Array | None = None,
    ) -> Float[Array, "B T D"]:
        """Only the blocks that this decoder was given, which are those of `numbers_L`: a stage of a pipeline."""
        where = Tokens(positions_BT, segments_BT)
        return run_chunk(self.blocks, self.config, numbers_L, x_BTD, where, runtime, ragged=ragged, key=key)

    def output_matrix(self, runtime: Runtime) -> tuple[jax.Array, bool]:
        """The output layer's weights, and whether they stand as [V, D] (tied) rather than [D, V]."""
        if self.config.tied:
            return runtime.use(self.tokens.embedding), True
        return runtime.use(self.head.kernel), False


def lookup_table(table_VD: Float[Array, "V D"], layout: Layout) -> Float[Array, "V D"]:
    """An embedding table as tokens are looked up in it.

    Within a shard_map that left `tp` automatic, XLA aborts on a gather along a dim cut by it (in all versions so far):
    there the table is cut by columns.
    """
    if not layout.manual or layout.axis_size("vocab") == 1:
        return table_VD
    columns = "columns" if table_VD.shape[1] % layout.axis_size("columns") == 0 else None
    return layout.constrain(table_VD, None, columns)


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache for `batch` sequences of up to `slots` tokens."""
    shape = (config.layers, batch, slots, kv_heads(config), head_size(config))
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "segments": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def _append_tokens(cache: Cache, positions: jax.Array, segments: jax.Array) -> Cache:
    at = (jnp.zeros((), jnp.int32), cache["length"])
    return cache | {
        "positions": jax.lax.dynamic_update_slice(cache["positions"], positions, at),
        "segments": jax.lax.dynamic_update_slice(cache["segments"], segments, at),
    }
