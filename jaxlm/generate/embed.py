"""Vectors of texts: the mean of an encoder's final hidden states, of length 1 (Reimers and Gurevych 2019,
https://arxiv.org/abs/1908.10084).

Legend: B texts, T length (padded), D embed.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config.errors import UserError
from jaxlm.generate.decode import bucket
from jaxlm.models.build import Model, Params
from jaxlm.models.runtime import Runtime


def embed(
    model: Model, params: Params, runtime: Runtime, texts: Sequence[Sequence[int]], *, batch_size: int = 32
) -> Float[np.ndarray, "B D"]:
    """A vector of length 1 for each of `texts` (token ids, as `Tokenizer.encode_framed` gives them), float32.

    Their dot products are the cosines of their angles: the nearer 1, the nearer in meaning.

    Args:
        params: on `runtime.layout.mesh`.
        batch_size: texts computed at a time; over several devices, a multiple of those that take rows.

    Raises:
        UserError: a text that is empty or holds ids unknown to the model, or more tokens than learned positions.
    """
    for number, ids in enumerate(texts):
        if not ids or not 0 <= min(ids) <= max(ids) < model.vocabulary:
            raise UserError(
                f"text {number} is empty or holds ids that the model has none of, {model.vocabulary} or more"
            )
        if model.config.positions == "learned" and len(ids) > model.config.max_positions:
            most = model.config.max_positions
            raise UserError(f"text {number} has {len(ids)} tokens and the model {most} learned positions; cut the text")
    run = jax.jit(lambda params, tokens, lengths: _embed(model, params, runtime, tokens, lengths))
    made = [np.zeros((0, model.config.embed), np.float32)]
    for first in range(0, len(texts), batch_size):
        part = texts[first : first + batch_size]
        length = bucket(max(map(len, part)))
        if model.config.positions == "learned":
            length = min(length, model.config.max_positions)
        tokens_BT, lengths_B = np.zeros((batch_size, length), np.int32), np.zeros(batch_size, np.int32)
        for row, ids in enumerate(part):
            tokens_BT[row, : len(ids)], lengths_B[row] = ids, len(ids)
        made.append(np.asarray(run(params, tokens_BT, lengths_B))[: len(part)])
    return np.concatenate(made)


def _embed(
    model: Model, params: Params, runtime: Runtime, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"]
) -> Float[Array, "B D"]:
    places_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    real_BT = (places_BT < lengths_B[:, None]).astype(jnp.int32)
    batch = {"tokens": tokens_BT, "segment_ids": real_BT, "positions": places_BT}
    batch = {name: runtime.layout.constrain(x, "batch", "sequence") for name, x in batch.items()}
    x_BTD = model.hidden(params, batch, runtime).astype(jnp.float32)
    sum_BD = (x_BTD * real_BT[..., None].astype(jnp.float32)).sum(axis=1)  # whose direction is the mean's
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=-1, keepdims=True), 1e-12)
