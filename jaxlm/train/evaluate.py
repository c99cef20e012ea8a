"""Held-out loss, perplexity and bits per byte."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.data.loader import Loader, batches
from jaxlm.train.assemble import Assembly
from jaxlm.train.step import abstract_batch, eval_step


class Evaluator:
    """Measures a model on the first samples of the validation split: the same ones each time, each at most once."""

    def __init__(self, assembly: Assembly, loader: Loader):
        self._runtime = assembly.unpiped("forward")
        self._step = eval_step(assembly.model, assembly.config, self._runtime)
        self._assembly, self._loader = assembly, loader
        lengths = np.zeros(assembly.model.padded_vocabulary, np.int32)  # ids beyond the tokenizer's stand for no text
        known = loader.corpora.tokenizer.byte_lengths()
        lengths[: len(known)] = known
        self._byte_lengths = jnp.asarray(lengths)

    def __call__(self, params: Any) -> dict[str, float | int]:
        """loss (nats a token), perplexity, bits_per_byte, tokens. Waits for the device once, at the end."""
        config = self._assembly.config
        size = config.data.batch_size
        samples = self._loader.samples_per_epoch
        count = min(config.eval.batches, -(-samples // size))
        sharding = abstract_batch(config, self._runtime)
        params = self._assembly.moved(params, self._runtime)
        sums: list[tuple[jax.Array, ...]] = []
        with batches(self._loader, 0, size, lambda name: sharding[name].sharding, 2, stop=count * size) as stream:
            for after, batch, _ in stream:
                if after > samples:  # the rest of the batch is the next epoch's: samples that were measured already
                    batch = batch | {"loss_mask": _first_rows(batch["loss_mask"], samples - (after - size))}
                sums.append(self._step(params, batch, self._byte_lengths))
        nats, tokens, text_bytes = np.sum([[float(x) for x in each] for each in sums], axis=0)
        if tokens == 0:
            raise UserError("the validation split has no token to predict; raise --data.validation")
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "bits_per_byte": nats / math.log(2) / max(text_bytes, 1.0),
            "tokens": int(tokens),
        }


@jax.jit
def _first_rows(mask_BT: jax.Array, count: jax.Array | int) -> jax.Array:
    """`mask_BT` for the first `count` rows, and 0 for the others."""
    rows_B1 = jnp.arange(mask_BT.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(rows_B1 < count, mask_BT, 0.0)
