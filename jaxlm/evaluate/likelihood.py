"""How likely a model holds given continuations of given contexts.

Legend: B batch, T length (padded), D embed, V vocabulary, N tokens of a part.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.generate.decode import bucket
from jaxlm.models.build import Model, Params
from jaxlm.models.runtime import Runtime

MOST_LOGITS = 1 << 24
"""Logits that exist at a time (64 MiB): those of a few positions of every row."""


class Scorer:
    """For one model and mesh; a program is compiled for each bucket of lengths."""

    def __init__(self, model: Model, runtime: Runtime, rows: int):
        """`rows` are computed together, and rounded up to what the mesh's data axes divide."""
        ways = runtime.layout.axis_size("batch")
        self.rows = -(-rows // ways) * ways
        self._model, self._runtime = model, runtime
        self._run = jax.jit(self._score)

    def __call__(self, params: Params, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation), at most `rows` of them and no context empty: the log-probability of the
        continuation in nats, and whether each of its tokens is the likeliest."""
        length = bucket(max(len(context) + len(continuation) for context, continuation in pairs) - 1)
        batch = {name: np.zeros((self.rows, length), np.int32) for name in ("tokens", "segment_ids", "targets")}
        batch["segment_ids"][:, 0] = 1
        for row, (context, continuation) in enumerate(pairs):
            whole = [*context, *continuation]
            batch["tokens"][row, : len(whole) - 1] = whole[:-1]
            batch["targets"][row, : len(whole) - 1] = whole[1:]
            batch["segment_ids"][row, : len(whole) - 1] = 1
        # Padding stands at 0: a length is rounded up beyond what a table of positions may have.
        batch["positions"] = np.arange(length, dtype=np.int32) * batch["segment_ids"]
        sharding = self._runtime.layout.sharding(("batch", None))
        found = self._run(params, {name: jax.device_put(a, sharding) for name, a in batch.items()})
        likelihoods_BT, greedy_BT = np.asarray(found[0], np.float64), np.asarray(found[1])
        results = []
        for row, (context, continuation) in enumerate(pairs):
            part = slice(len(context) - 1, len(context) + len(continuation) - 1)
            results.append((float(likelihoods_BT[row, part].sum()), bool(greedy_BT[row, part].all())))
        return results

    def _score(self, params: Params, batch: dict[str, jax.Array]) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
        x_BTD = self._model.hidden(params, batch, self._runtime)
        rows, length = batch["tokens"].shape
        part = length
        while part > 1 and rows * part * self._model.vocabulary > MOST_LOGITS:
            part //= 2  # the length is a power of two

        def of_part(part: tuple[Float[Array, "B N D"], Int[Array, "B N"]]):
            x_BND, targets_BN = part
            logits_BNV = self._model.logits(params, x_BND, self._runtime)
            logits_BNV = self._runtime.layout.constrain(logits_BNV, "batch", None, None)
            target_BN = jnp.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)[..., 0]
            greedy_BN = jnp.argmax(logits_BNV, axis=-1).astype(jnp.int32) == targets_BN
            return target_BN - jax.nn.logsumexp(logits_BNV, axis=-1), greedy_BN

        def parts(a: jax.Array) -> jax.Array:
            return a.reshape(rows, -1, part, *a.shape[2:]).swapaxes(0, 1)

        found = jax.lax.map(of_part, (parts(x_BTD), parts(batch["targets"])))
        likelihoods_BT, greedy_BT = (a.swapaxes(0, 1).reshape(rows, length) for a in found)
        return likelihoods_BT, greedy_BT
