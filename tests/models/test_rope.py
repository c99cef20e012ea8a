"""Rotary frequencies against the published formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config.schema import ModelConfig
from jaxlm.models.rope import frequencies, rotate, rotation

SIZE = 128


def config(**keys) -> ModelConfig:
    return ModelConfig(positions="rotary", **keys)


def test_plain_frequencies():
    found, factor = frequencies(config(rope_theta=500_000.0), SIZE)
    np.testing.assert_allclose(found, [500_000.0 ** (-2 * i / SIZE) for i in range(SIZE // 2)], rtol=1e-13)
    assert factor == 1.0


def test_linear_divides_positions():
    plain, _ = frequencies(config(), SIZE)
    stretched, factor = frequencies(config(rope_scaling="linear", rope_factor=8.0), SIZE)
    np.testing.assert_allclose(stretched * 8, plain, rtol=1e-13)
    assert factor == 1.0


@pytest.mark.parametrize(
    "factor, original, low, high", [(8.0, 8192, 1.0, 4.0), (32.0, 8192, 1.0, 4.0), (4.0, 64, 2.0, 3.0)]
)
def test_llama3_by_the_branches_of_the_published_code(factor, original, low, high):
    """apply_scaling in https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py"""
    given = config(
        rope_theta=500_000.0, rope_scaling="llama3", rope_factor=factor, rope_original_length=original,
        rope_frequencies=(low, high),
    )  # fmt: skip
    wanted, kinds = [], set()
    for frequency in frequencies(config(rope_theta=500_000.0), SIZE)[0]:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            wanted.append(frequency)
            kinds.add("kept")
        elif wavelength > original / low:
            wanted.append(frequency / factor)
            kinds.add("stretched")
        else:
            smooth = (original / wavelength - low) / (high - low)
            wanted.append((1 - smooth) * frequency / factor + smooth * frequency)
            kinds.add("between")
    assert kinds == {"kept", "between", "stretched"}
    found, scale = frequencies(given, SIZE)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert scale == 1.0


def test_yarn_by_the_formulas_of_the_paper():
    """Peng et al. 2023, sections 3.2 and 3.4, with the published code's whole channel numbers for the ramp's ends."""
    theta, factor, original, slow, fast = 10_000.0, 16.0, 4096, 1.0, 32.0
    given = config(
        rope_theta=theta, rope_scaling="yarn", rope_factor=factor, rope_original_length=original,
        rope_frequencies=(slow, fast),
    )  # fmt: skip
    found, scale = frequencies(given, SIZE)
    plain, _ = frequencies(config(rope_theta=theta), SIZE)
    turns = original * plain / (2 * math.pi)
    low = math.floor(np.interp(-math.log(fast), -np.log(turns), np.arange(SIZE // 2)))
    high = math.ceil(np.interp(-math.log(slow), -np.log(turns), np.arange(SIZE // 2)))
    ramp = np.clip((np.arange(SIZE // 2) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, plain / factor * ramp + plain * (1 - ramp), rtol=1e-12)
    assert (found[: low + 1] == plain[: low + 1]).all() and low > 0
    np.testing.assert_allclose(found[high:], plain[high:] / factor, rtol=1e-12)
    # sqrt(1 / t) = 0.1 ln(s) + 1 on queries and on keys
    assert scale == pytest.approx(0.1 * math.log(factor) + 1.0)


def test_yarn_scales_queries_and_keys():
    given = config(rope_scaling="yarn", rope_factor=16.0, rope_original_length=4096, rope_frequencies=(1.0, 32.0))
    x = jnp.ones((1, 3, 1, SIZE))
    turned = rotate(x, rotation(given, SIZE, jnp.arange(3, dtype=jnp.int32)[None]))
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1) / math.sqrt(SIZE), 0.1 * math.log(16) + 1, rtol=1e-5)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 3000))
def test_only_the_distance_counts(a, b, shift):
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def dot(first: int, second: int) -> float:
        at = [rotation(config(), 16, jnp.full((1, 1), p, jnp.int32)) for p in (first, second)]
        return float((rotate(q, at[0]) * rotate(k, at[1])).sum())

    # An angle of some thousand turns in float32 carries an error of 1e-4.
    assert dot(a, b) == pytest.approx(dot(a + shift, b + shift), abs=1e-2)


def test_pairs_are_halves_apart_and_turn_by_the_angle():
    x = np.zeros((1, 1, 1, 8), np.float32)
    x[..., 1] = 1.0
    angle = 5 * 100.0 ** (-2 / 8)
    turned = rotate(jnp.asarray(x), rotation(config(rope_theta=100.0), 8, jnp.full((1, 1), 5, jnp.int32)))
    wanted = np.zeros(8)
    wanted[1], wanted[5] = math.cos(angle), math.sin(angle)
    np.testing.assert_allclose(turned[0, 0, 0], wanted, atol=1e-6)


def test_angles_stay_float32_under_bfloat16():
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    turned = rotate(x, rotation(config(), 8, jnp.full((1, 1), 4001, jnp.int32)))
    assert turned.dtype == jnp.bfloat16
    # 4001 is no bfloat16: rounded to 4000 first, the angle would be off by 1.
    assert float(turned[0, 0, 0, 0]) == pytest.approx(math.cos(4001) - math.sin(4001), abs=0.01)
