"""The decoder: embedding, a scanned stack of blocks, a final norm, an output layer.

Legend: B batch, T query length, S cache length, D embed, V vocabulary (padded), K kv heads, H head size, L layers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.block import Block, Source, Tokens
from jaxlm.models.layers import Linear, Noise, Norm, dropout, normal, parameter
from jaxlm.models.relative import RelativeBias
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime
from jaxlm.models.stack import run_chunk, run_stack
from jaxlm.parallel.keys import Keys
from jaxlm.parallel.rules import axes_of
from jaxlm.parallel.sequence import COPIES, PARTS

Cache = dict[str, Any]
"""k, v [L, B, S, K, H]; positions, segments [B, S] (segment -1: empty); length, the slots used. With an encoder also
source_k, source_v [L, B, S, K, H] and source_segments [B, S], which stay as they are."""


class Output(NamedTuple):
    """The output layer: logits are hidden states times `matrix`, plus `bias`."""

    matrix: Float[Array, "rows columns"]
    transposed: bool
    """It stands as [V, D] (an embedding table, tied) rather than [D, V]."""
    bias: Float[Array, "V"] | None


class Embedding(nnx.Module):
    """A table of vectors, one a row."""

    def __init__(self, rngs, rows: int, embed: int, dim: str | None, std: float = 0.02):
        self.embedding = parameter(rngs, (rows, embed), (dim, "embed"), normal(std))

    def __call__(self, rows_BT: Int[Array, "B T"], runtime: Runtime) -> Float[Array, "B T D"]:
        table_RD, layout = runtime.use(self.embedding), runtime.layout
        cut = layout.axes(self.embedding.get_metadata()["dims"][0])
        if not cut:
            return layout.relay(table_RD[rows_BT], ("batch", "sequence", None), PARTS)
        # By hand: each device looks up the rows it has for its own tokens; the others' are zeros (Megatron-LM). Left to
        # XLA, each device makes the gradient of the table from all tokens, and within another shard_map XLA aborts on a
        # gather along a dim that an automatic axis cuts (in all versions so far).
        narrow = table_RD.dtype
        if runtime.platform == "cpu":
            table_RD = table_RD.astype(jnp.float32)  # XLA:CPU aborts on a sum of bfloat16, such as the table's gradient

        def local(table_RD: jax.Array, rows_BT: jax.Array) -> jax.Array:
            own_BT = rows_BT - jax.lax.axis_index(cut) * table_RD.shape[0]
            has_BT = (own_BT >= 0) & (own_BT < table_RD.shape[0])
            return jnp.where(has_BT[..., None], table_RD[jnp.where(has_BT, own_BT, 0)], 0)[:, :, None].astype(narrow)

        tokens, copies = layout.spec(("batch", "sequence")), layout.spec(COPIES)
        x_BTSD = jax.shard_map(
            local,
            mesh=jax.sharding.get_abstract_mesh() if layout.manual else layout.mesh,
            in_specs=(PartitionSpec(cut), tokens),
            out_specs=copies,
            axis_names=frozenset(axis for dim in range(len(copies)) for axis in axes_of(copies, dim)),
            check_vma=False,
        )(table_RD, rows_BT)
        return runtime.summed(x_BTSD)


class Decoder(nnx.Module):
    """A language model up to its final norm; `output_layer` turns its result into logits."""

    def __init__(self, rngs, config: ModelConfig, vocabulary: int):
        self.config = config
        scaled = config.tied and config.architecture == "encoder_decoder"  # of which the output layer takes a part
        self.tokens = Embedding(rngs, vocabulary, config.embed, "vocab", **({"std": 1.0} if scaled else {}))
        if config.positions == "learned":
            self.positions = Embedding(rngs, config.max_positions, config.embed, None)
        elif config.positions == "relative":
            self.distances = RelativeBias(rngs, config)
        if config.token_types:
            self.types = Embedding(rngs, config.token_types, config.embed, None)
        self.blocks = stacked(rngs, config)
        if config.norm_placement == "sum":  # the last block's sum has its norm, and so has the embedding
            self.embed_norm = Norm(rngs, config, size=config.embed)
        else:
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
        types_BT: Int[Array, "B T"] | None = None,
        noise: Noise | None = None,
        cache: Cache | None = None,
        source: Source | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Load | None]:
        """Hidden states after the final norm, the cache with this call's keys and values in it, and the loads [L, ...]
        of a mixture of experts. The source is what an encoder has read."""
        x = self.embed(tokens_BT, positions_BT, runtime, types_BT=types_BT, noise=noise)
        where = Tokens(positions_BT, segments_BT, source=source)
        if cache is not None:
            cache = _append_tokens(cache, positions_BT, segments_BT)
            where = where._replace(kv_positions_BS=cache["positions"], kv_segments_BS=cache["segments"])
        if self.config.positions == "relative":
            length = tokens_BT.shape[1]
            bias_BNTS = (
                self.distances.of_sequence(length, runtime)
                if cache is None
                else self.distances.between(positions_BT, cache["positions"], runtime)
            )
            where = where._replace(bias_BNTS=bias_BNTS)
        x, cache, loads = run_stack(self.blocks, self.config, x, where, runtime, noise=noise, cache=cache)
        return self.finish(x, runtime), cache, loads

    def embed(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        types_BT: Int[Array, "B T"] | None = None,
        noise: Noise | None = None,
    ) -> Float[Array, "B T D"]:
        """What the first block reads; without `types_BT` all tokens are of the first type."""
        config, layout = self.config, runtime.layout
        x = self.tokens(tokens_BT, runtime)
        if config.embed_scale:
            x = x * jnp.asarray(math.sqrt(config.embed), x.dtype)
        if config.positions == "learned":
            x = x + self.positions(positions_BT, runtime)
        if config.token_types:
            first_D = runtime.use(self.types.embedding)[0]
            x = x + (first_D[None, None] if types_BT is None else self.types(types_BT, runtime))
        if config.norm_placement == "sum":
            x = self.embed_norm(x, runtime)
        x = dropout(x, config.dropout, None if noise is None else noise.of(config.layers))
        return layout.constrain(x, "batch", "residual", None)

    def finish(self, x_BTD: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        """The final norm of what the last block wrote."""
        return x_BTD if self.config.norm_placement == "sum" else self.final_norm(x_BTD, runtime)

    def run_chunk(
        self,
        numbers_L: Int[Array, "L"],
        x_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        ragged: bool,
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "B T D"], Load | None]:
        """Only the blocks that this decoder was given, which are those of `numbers_L`: a stage of a pipeline."""
        where = Tokens(positions_BT, segments_BT)
        return run_chunk(self.blocks, self.config, numbers_L, x_BTD, where, runtime, ragged=ragged, noise=noise)

    def before_output(self, x_BTD: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        """What the output layer reads of final hidden states."""
        return x_BTD

    def output_layer(self, runtime: Runtime) -> Output:
        """What turns it into logits."""
        if self.config.tied:
            return Output(runtime.use(self.tokens.embedding), True, None)
        return Output(runtime.use(self.head.kernel), False, None)


def stacked(rngs, config: ModelConfig) -> Block:
    """All blocks of a stack; their parameters have a leading `layers` dim."""

    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(words: jax.Array) -> Block:
        return Block(Keys(words), config)

    return stack(rngs.stack())


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype, source: int = 0) -> Cache:
    """A cache for `batch` sequences of up to `slots` tokens, and with an encoder for as many sources of `source`."""

    def keys(slots: int) -> jax.Array:
        return jnp.zeros((config.layers, batch, slots, config.key_value_heads, config.head_width), dtype)

    cache = {
        "k": keys(slots),
        "v": keys(slots),
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "segments": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }
    if source:
        segments = jnp.full((batch, source), -1, jnp.int32)
        cache |= {"source_k": keys(source), "source_v": keys(source), "source_segments": segments}
    return cache


def _append_tokens(cache: Cache, positions: jax.Array, segments: jax.Array) -> Cache:
    at = (jnp.zeros((), jnp.int32), cache["length"])
    return cache | {
        "positions": jax.lax.dynamic_update_slice(cache["positions"], positions, at),
        "segments": jax.lax.dynamic_update_slice(cache["segments"], segments, at),
    }
