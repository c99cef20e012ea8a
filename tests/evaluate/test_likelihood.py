"""Likelihoods of continuations, against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluate import likelihood
from jaxlm.evaluate.likelihood import Scorer
from tests.generate.tiny import GPT, LLAMA, VOCABULARY, make

PAIRS = [([7, 3], [99, 5, 6]), ([1], [2]), (list(range(20)), [4, 4]), ([50, 51], list(range(9)))]


def by_definition(config):
    model, params, runtime = make(config)
    length = max(len(context) + len(continuation) for context, continuation in PAIRS)
    places = jnp.arange(length, dtype=jnp.int32)[None]
    run = jax.jit(lambda batch: model.logits(params, model.hidden(params, batch, runtime), runtime))
    found = []
    for context, continuation in PAIRS:
        text = context + continuation
        tokens = jnp.asarray([text + [0] * (length - len(text))], jnp.int32)
        batch = {"tokens": tokens, "segment_ids": (places < len(text)).astype(jnp.int32), "positions": places}
        logits = np.asarray(run(batch)[0], np.float64)
        before = logits[len(context) - 1 : len(text) - 1]
        shares = before - np.log(np.exp(before).sum(axis=-1, keepdims=True))
        found.append((shares[range(len(continuation)), continuation].sum(), (before.argmax(-1) == continuation).all()))
    return found


@pytest.mark.parametrize("config, mesh", [(GPT, "dp1"), (LLAMA, "dp2,tp2")], ids=["gpt", "llama"])
def test_likelihoods(config, mesh, monkeypatch):
    monkeypatch.setattr(likelihood, "MOST_LOGITS", 4 * 8 * VOCABULARY)  # parts of 8 positions
    model, params, runtime = make(config, mesh)
    found = Scorer(model, runtime, rows=3 if mesh == "dp2,tp2" else 4)(params, PAIRS)
    for (one, greedy), (other, best) in zip(found, by_definition(config), strict=True):
        assert one == pytest.approx(other, rel=1e-5) and greedy == best


def test_the_likeliest_is_told():
    model, params, runtime = make(GPT)
    scorer = Scorer(model, runtime, rows=1)
    each = [scorer(params, [([5, 6], [token])])[0] for token in range(VOCABULARY)]
    likeliest = max(range(VOCABULARY), key=lambda token: each[token][0])
    assert [token for token, (_, greedy) in enumerate(each) if greedy] == [likeliest]
    assert sum(np.exp(one) for one, _ in each) == pytest.approx(1, rel=1e-5)
