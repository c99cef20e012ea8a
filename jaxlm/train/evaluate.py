"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

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
        """loss (nats a token), perplexity, bits_per_byte, tokens, over the first eval.batches batches."""
        return summary(self.sums(params))

    def sums(self, params: Any, advance: Callable[[int, int], None] = lambda done, count: None) -> "Sums":
        """What `summary` is made of; `advance` hears how many of how many batches are done."""
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
                if len(sums) > 1:  # one batch ahead of the device, however many there are
                    jax.block_until_ready(sums[-2])
                advance(len(sums), count)
        found = Sums(*np.sum([[float(x) for x in each] for each in sums], axis=0).tolist())
        if found.tokens == 0:
            raise UserError(
                f"the {self._loader.split} split has no token to predict; give more text, or raise --data.validation"
            )
        return found


class Sums(NamedTuple):
    """Over the tokens that were predicted."""

    nats: float
    tokens: float
    text_bytes: float


def summary(sums: Sums) -> dict[str, float | int]:
    """loss (nats a token), perplexity, bits_per_byte, tokens."""
    loss = sums.nats / sums.tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": sums.nats / math.log(2) / max(sums.text_bytes, 1.0),
        "tokens": int(sums.tokens),
    }


@jax.jit
def _first_rows(mask_BT: jax.Array, count: jax.Array | int) -> jax.Array:
    """`mask_BT` for the first `count` rows, and 0 for the others."""
    rows_B1 = jnp.arange(mask_BT.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(rows_B1 < count, mask_BT, 0.0)
