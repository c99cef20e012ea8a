"""Held-out loss, perplexity and bits per byte."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.data.loader import Loader, batches
from jaxlm.train.assemble import Assembly
from jaxlm.train.step import eval_step


class Evaluator:
    """Measures a model on the first samples of the validation split: the same ones each time."""

    def __init__(self, assembly: Assembly, loader: Loader, byte_lengths: np.ndarray):
        self._step = eval_step(assembly.model, assembly.config, assembly.runtime)
        self._assembly, self._loader = assembly, loader
        self._byte_lengths = jnp.asarray(byte_lengths, jnp.int32)

    def __call__(self, params: Any) -> dict[str, float | int]:
        """loss (nats a token), perplexity, bits_per_byte, tokens. Waits for the device once, at the end."""
        config = self._assembly.config
        size = config.data.batch_size
        count = min(config.eval.batches, -(-self._loader.samples_per_epoch // size))
        sharding = self._assembly.batch
        sums: list[tuple[jax.Array, ...]] = []
        with batches(self._loader, 0, size, lambda name: sharding[name].sharding, 2, stop=count * size) as stream:
            for _, batch, _ in stream:
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
