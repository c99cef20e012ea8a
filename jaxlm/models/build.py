"""A model as plain functions of a plain tree of parameters: NNX describes it once, here, and is not seen again."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig, padded
from jaxlm.models.block import Source
from jaxlm.models.decoder import Cache, Decoder, Output
from jaxlm.models.encoder import Encoder
from jaxlm.models.encoder_decoder import EncoderDecoder
from jaxlm.models.layers import Noise
from jaxlm.models.runtime import Runtime
from jaxlm.parallel.keys import Keys, words
from jaxlm.parallel.rules import Dims

Params = dict[str, Any]
"""Nested dict of arrays; the blocks' are stacked on a leading `layers` dim."""


ARCHITECTURES: dict[str, type[Decoder]] = {"decoder": Decoder, "encoder": Encoder, "encoder_decoder": EncoderDecoder}
"""What `model.architecture` names."""

SOURCE = 2**20
"""Number of the encoder's randomness, beyond those of layers."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of one configuration."""

    config: ModelConfig
    vocabulary: int
    """Token ids in use; the tables have `padded_vocabulary` rows."""
    graph: Any
    abstract: Params
    """Shape and dtype of each parameter."""
    dims: dict[str, Any]
    """Logical dims of each parameter, as a tree like `abstract` of tuples."""

    @property
    def padded_vocabulary(self) -> int:
        return padded(self.vocabulary)

    def words(self, seed: int) -> dict[str, np.ndarray]:
        """What `init` makes its keys of."""
        return words(seed, self.config.layers)

    def init(self, words: dict[str, Any]) -> Params:
        """Fresh parameters; run under jit with `out_shardings`, they are born sharded."""
        return nnx.to_pure_dict(nnx.split(_describe(self.config, self.vocabulary, Keys(**words)))[1])

    def hidden(self, params: Params, batch: dict[str, jax.Array], runtime: Runtime, key: jax.Array | None = None):
        """Final hidden states [B, T, D] of a batch with `tokens`, `segment_ids` and `positions`, and maybe `types`; for
        an encoder-decoder it has the first three of the source too, as `source_tokens` and so on.

        With a `key`, dropout is on; then the batch has `places` too, the number of each token in it.
        """
        return self.forward(params, batch, runtime, key)[0]

    def forward(self, params: Params, batch: dict[str, jax.Array], runtime: Runtime, key: jax.Array | None = None):
        """As `hidden`, and the loads [L, ...] of a mixture of experts (`models.router.Load`), None of another model."""
        decoder = nnx.merge(self.graph, params)
        x_BTD, _, loads = decoder(
            batch["tokens"],
            batch["segment_ids"],
            batch["positions"],
            runtime,
            types_BT=batch.get("types"),
            noise=_noise(batch, key),
            source=_source(decoder, batch, runtime, key),
        )
        return x_BTD, loads

    def decode(self, params: Params, batch: dict[str, jax.Array], runtime: Runtime, cache: Cache):
        """As `hidden`, with the keys and values of earlier calls in `cache`; returns the cache too. Of an
        encoder-decoder the source is in the cache (`read_source`)."""
        decoder = nnx.merge(self.graph, params)
        source = Source(cache["source_segments"], None) if "source_segments" in cache else None
        arrays = (batch["tokens"], batch["segment_ids"], batch["positions"])
        return decoder(*arrays, runtime, cache=cache, source=source)[:2]

    def read_source(self, params: Params, batch: dict[str, jax.Array], runtime: Runtime) -> Cache:
        """What the cache of an encoder-decoder holds of the source in `batch`."""
        module = nnx.merge(self.graph, params)
        return module.source_cache(_source(module, batch, runtime, None), runtime)

    def embed(self, params: Params, batch: dict[str, jax.Array], runtime: Runtime, key: jax.Array | None = None):
        """What the first block reads [B, T, D]: where a pipeline begins."""
        decoder = nnx.merge(self.graph, params)
        types, noise = batch.get("types"), _noise(batch, key)
        return decoder.embed(batch["tokens"], batch["positions"], runtime, types_BT=types, noise=noise)

    def chunk(
        self,
        params: Params,
        numbers_L: jax.Array,
        x_BTD: jax.Array,
        batch: dict[str, jax.Array],
        runtime: Runtime,
        *,
        ragged: bool,
        key: jax.Array | None = None,
    ):
        """`x_BTD` after the blocks in `params`, those of `numbers_L`, and their loads: a stage of a pipeline."""
        decoder = nnx.merge(self.graph, params)
        segments, positions = batch["segment_ids"], batch["positions"]
        noise = _noise(batch, key)
        return decoder.run_chunk(numbers_L, x_BTD, segments, positions, runtime, ragged=ragged, noise=noise)

    def finish(self, params: Params, x_BTD: jax.Array, runtime: Runtime) -> jax.Array:
        """The final norm of what the last block wrote: where a pipeline ends."""
        return nnx.merge(self.graph, params).finish(x_BTD, runtime)

    def before_output(self, params: Params, x_BTD: jax.Array, runtime: Runtime) -> jax.Array:
        """What the output layer reads of final hidden states."""
        return nnx.merge(self.graph, params).before_output(x_BTD, runtime)

    def output_layer(self, params: Params, runtime: Runtime) -> Output:
        """What turns that into logits."""
        return nnx.merge(self.graph, params).output_layer(runtime)

    def logits(self, params: Params, x_BTD: jax.Array, runtime: Runtime) -> jax.Array:
        """float32 logits [B, T, vocabulary] of hidden states: for generation; training never makes them whole."""
        matrix, transposed, bias = self.output_layer(params, runtime)
        flat = self.before_output(params, x_BTD, runtime).reshape(-1, x_BTD.shape[-1])
        logits = jnp.matmul(flat, matrix.T if transposed else matrix, preferred_element_type=jnp.float32)
        logits = logits if bias is None else logits + bias[None]
        if cap := self.config.logit_softcap:
            logits = cap * jnp.tanh(logits / cap)
        return logits.reshape(*x_BTD.shape[:-1], -1)[..., : self.vocabulary]


def _noise(batch: dict[str, jax.Array], key: jax.Array | None) -> Noise | None:
    return None if key is None else Noise(key, batch["places"])


def _source(module: Decoder, batch: dict[str, jax.Array], runtime: Runtime, key: jax.Array | None) -> Source | None:
    """What the encoder of `module` makes of the source in `batch`; None where it has no encoder."""
    if not isinstance(module, EncoderDecoder):
        return None
    noise = None if key is None else Noise(jax.random.fold_in(key, SOURCE), batch["source_places"])
    return module.read(
        batch["source_tokens"], batch["source_segment_ids"], batch["source_positions"], runtime, noise=noise
    )


def _describe(config: ModelConfig, vocabulary: int, rngs: Keys) -> Decoder:
    return ARCHITECTURES[config.architecture](rngs, config, padded(vocabulary))


def build(config: ModelConfig, tokenizer_vocabulary: int | None) -> Model:
    """Describe the model without making an array.

    Args:
        config: what it is.
        tokenizer_vocabulary: ids of the data's tokenizer; None where there is no data (a dry run of a recipe).

    Raises:
        UserError: the model's vocabulary is smaller than the tokenizer's, or neither is known.
    """
    vocabulary = config.vocabulary or tokenizer_vocabulary
    if vocabulary is None:
        raise UserError("model.vocabulary is not set and there is no tokenizer to take it from; set --model.vocabulary")
    if tokenizer_vocabulary is not None and vocabulary < tokenizer_vocabulary:
        raise UserError(
            f"model.vocabulary {vocabulary} is smaller than the tokenizer's {tokenizer_vocabulary}; "
            "raise --model.vocabulary or leave it out"
        )
    abstract = nnx.eval_shape(lambda: _describe(config, vocabulary, Keys(**words(0, config.layers))))
    graph, state = nnx.split(abstract)
    dims: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        own: Dims = variable.get_metadata()["dims"]
        node = dims
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = ("layers", *own) if "blocks" in path else own
    return Model(config=config, vocabulary=vocabulary, graph=graph, abstract=nnx.to_pure_dict(state), dims=dims)
