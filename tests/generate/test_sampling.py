"""Which tokens may be drawn, and how often they are, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.config.errors import UserError
from jaxlm.generate.sampling import Sampling, allowed, choose, draw


def oracle(logits, top_k, top_p):
    """The documented rule for one row, a token at a time, in float64."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[: top_k or None]
    weights = np.exp([logits[i] - logits[ranked[0]] for i in ranked])
    total, kept = 0.0, set()
    for token, probability in zip(ranked, weights / weights.sum(), strict=True):
        if kept and top_p < 1 and total >= top_p:
            break
        kept.add(token)
        total += probability
    return kept


def kept(logits, top_k, top_p):
    mask = jax.jit(allowed)(np.float32([logits]), np.int32(top_k), np.float32(top_p))
    return set(np.flatnonzero(mask[0]).tolist())


# Logits in quarters, so that ties are many; and no top_p that a sum of such probabilities could hit exactly.
@settings(max_examples=150)
@given(
    st.lists(st.integers(-12, 12), min_size=12, max_size=12),
    st.integers(0, 14),
    st.sampled_from([0.003, 0.1234567, 0.5234567, 0.9, 0.98765, 1.0]),
)
def test_allowed_tokens_are_those_of_the_rule(quarters, top_k, top_p):
    logits = [q / 4 for q in quarters]
    assert kept(logits, top_k, top_p) == oracle(logits, top_k, top_p)


def test_top_k_breaks_ties_by_id():
    assert kept([1.0, 2.0, 2.0, 2.0], 2, 1.0) == {1, 2}


def test_the_nucleus_includes_the_token_that_crosses():
    logits = np.log([0.5, 0.3, 0.15, 0.05])
    assert [kept(logits, 0, p) for p in (0.4, 0.6, 0.9, 1.0)] == [{0}, {0, 1}, {0, 1, 2}, {0, 1, 2, 3}]
    assert kept(logits, 3, 0.9) == {0, 1, 2}, "of 0.95, the first two hold 0.84"
    assert kept(logits, 2, 0.7) == {0, 1} and kept(logits, 2, 0.6) == {0}, "of 0.8, the first holds 0.625"


def test_top_p_of_one_keeps_a_tail_too_small_to_add():
    assert len(kept([0.0] + [-30.0] * 99, 0, 1.0)) == 100


def frequencies(logits, count=20_000, **rule):
    rule = Sampling(**rule)
    rows = jnp.zeros(count, jnp.int32)
    many = jnp.tile(jnp.float32([logits]), (count, 1))
    run = jax.jit(choose, static_argnames=("greedy", "cuts"))
    drawn = run(many, rows, jnp.arange(count, dtype=jnp.int32), rule.scalars, greedy=rule.greedy, cuts=rule.cuts)
    return np.bincount(drawn, minlength=len(logits)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = np.array([1.0, 0.0, 2.0, -1.0, 1.0])
    weights = np.exp(logits / temperature)
    np.testing.assert_allclose(frequencies(logits, temperature=temperature), weights / weights.sum(), atol=0.015)


def test_cuts_leave_the_proportions_of_the_rest():
    logits = np.log([0.1, 0.4, 0.2, 0.3])
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7], atol=0.015)
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_p=0.8), [0, 4 / 9, 2 / 9, 3 / 9], atol=0.015)


def test_temperature_comes_before_the_cuts():
    logits = np.log([0.6, 0.3, 0.1])
    assert (frequencies(logits, temperature=3.0, top_p=0.5) > 0).tolist() == [True, True, False]
    assert (frequencies(logits, temperature=1.0, top_p=0.5) > 0).tolist() == [True, False, False]


def test_greedy_takes_the_first_of_the_likeliest_and_a_tiny_temperature_nearly_so():
    assert frequencies([0.0, 3.0, 3.0], count=8).tolist() == [0, 1, 0]
    assert frequencies([-5e3, 3e3, 2.9e3], count=8, temperature=1e-38, top_p=0.9).tolist() == [0, 1, 0]


def test_noise_depends_on_seed_row_and_position_alone():
    logits = jnp.zeros((4, 50), jnp.float32)
    rows, positions = jnp.arange(4, dtype=jnp.int32), jnp.int32([3, 9, 2, 7])
    drawn = np.asarray(draw(logits, rows, positions, jnp.int32(1)))
    apart = [int(draw(logits[:1], rows[i : i + 1], positions[i : i + 1], jnp.int32(1))[0]) for i in range(4)]
    assert drawn.tolist() == apart
    others = [
        draw(logits, rows, positions, jnp.int32(2)),
        draw(logits, rows, positions + 1, jnp.int32(1)),
        draw(logits, rows + 1, positions, jnp.int32(1)),
        draw(logits, positions, rows, jnp.int32(1)),
    ]
    assert all((np.asarray(other) != drawn).any() for other in others)


@pytest.mark.parametrize(
    "rule, flag",
    [
        ({"temperature": -0.1}, "--temperature=-0.1"),
        ({"temperature": float("nan")}, "--temperature=nan"),
        ({"top_k": -1}, "--top-k=-1"),
        ({"top_p": 0.0}, "--top-p=0"),
        ({"top_p": 1.01}, "--top-p=1.01"),
        ({"seed": -1}, "--seed=-1"),
        ({"seed": 2**31}, "--seed=2147483648"),
    ],
)
def test_values_out_of_range_are_named(rule, flag):
    with pytest.raises(UserError, match=flag):
        Sampling(**rule)
