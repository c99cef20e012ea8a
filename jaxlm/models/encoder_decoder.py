"""The encoder-decoder (Raffel et al. 2020, https://arxiv.org/abs/1910.10683): one stack reads a text, another writes
one and sees all of what was read.

Legend: B batch, T target length, S source length, D embed, L layers, K kv heads, H head size.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.block import Source, Tokens
from jaxlm.models.decoder import Cache, Decoder, stacked
from jaxlm.models.layers import Noise, Norm, dropout
from jaxlm.models.relative import RelativeBias
from jaxlm.models.runtime import Runtime
from jaxlm.models.stack import run_stack


class Reader(nnx.Module):
    """The stack that reads: the same blocks, without causality and without a source."""

    def __init__(self, rngs, config: ModelConfig):
        self.config = replace(config, architecture="encoder")
        self.distances = RelativeBias(rngs, self.config)
        self.blocks = stacked(rngs, self.config)
        self.final_norm = Norm(rngs, self.config, size=config.embed)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        segments_BS: Int[Array, "B S"],
        positions_BS: Int[Array, "B S"],
        runtime: Runtime,
        noise: Noise | None,
    ) -> Float[Array, "B S D"]:
        where = Tokens(positions_BS, segments_BS, bias_BNTS=self.distances.of_sequence(x_BSD.shape[1], runtime))
        x, _, _ = run_stack(self.blocks, self.config, x_BSD, where, runtime, noise=noise, cache=None)
        return self.final_norm(x, runtime)


class EncoderDecoder(Decoder):
    """A decoder whose blocks also attend to what `encoder` made of a source; the two share the embedding."""

    def __init__(self, rngs, config: ModelConfig, vocabulary: int):
        super().__init__(rngs, config, vocabulary)
        self.encoder = Reader(rngs, config)

    def read(
        self,
        tokens_BS: Int[Array, "B S"],
        segments_BS: Int[Array, "B S"],
        positions_BS: Int[Array, "B S"],
        runtime: Runtime,
        noise: Noise | None = None,
    ) -> Source:
        """The source, read."""
        x = runtime.layout.constrain(self.tokens(tokens_BS, runtime), "batch", "residual", None)
        x = dropout(x, self.config.dropout, None if noise is None else noise.of(self.config.layers))
        return Source(segments_BS, self.encoder(x, segments_BS, positions_BS, runtime, noise))

    def source_cache(self, source: Source, runtime: Runtime) -> Cache:
        """What a cache holds of a source: keys and values of each layer, computed once."""
        graph, params = nnx.split(self.blocks)
        x_BSD = source.x_BSD
        assert x_BSD is not None

        def layer(nothing: None, params: Any) -> tuple[None, tuple[jax.Array, jax.Array]]:
            return nothing, nnx.merge(graph, params).source_keys(x_BSD, runtime)

        k_LBSKH, v_LBSKH = jax.lax.scan(layer, None, params)[1]
        return {"source_k": k_LBSKH, "source_v": v_LBSKH, "source_segments": source.segments_BS}

    def before_output(self, x_BTD: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        return x_BTD * jnp.asarray(self.config.embed**-0.5, x_BTD.dtype) if self.config.tied else x_BTD
