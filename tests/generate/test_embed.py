"""Vectors of texts: the mean of hidden states, whatever stands beside a text in its batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig
from jaxlm.generate.embed import embed
from tests.generate.tiny import make

CONFIG = ModelConfig(
    **{"architecture": "encoder", "layers": 1, "embed": 32, "heads": 4, "mlp": 40, "max_positions": 40},
    **{"norm_placement": "sum", "token_types": 2},
)
TEXTS = [[5, 6, 7], list(range(40)), [9], [7, 6, 5] * 5]


@pytest.fixture(scope="module")
def vectors():
    model, params, runtime = make(CONFIG)
    return embed(model, params, runtime, TEXTS, batch_size=3)


def test_each_is_the_mean_of_its_own_states(vectors):
    model, params, runtime = make(CONFIG)
    assert vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, found in zip(TEXTS, vectors, strict=True):
        tokens = jnp.asarray([text], jnp.int32)
        places = jnp.arange(len(text), dtype=jnp.int32)[None]
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": places}
        mean = np.asarray(model.hidden(params, batch, runtime))[0].mean(axis=0)
        np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_order_counts_and_no_text_gives_no_vector(vectors):
    assert abs(vectors[0] @ vectors[3]) < 0.999
    model, params, runtime = make(CONFIG)
    assert embed(model, params, runtime, []).shape == (0, 32)


@pytest.mark.parametrize(
    "text, message", [([], "is empty"), ([999], "ids that the model has none of"), ([1] * 41, "41")]
)
def test_mistakes_are_a_line(text, message):
    with pytest.raises(UserError, match=message):
        embed(*make(CONFIG), [[1], text])
