"""Random keys: the bits of JAX's Threefry, from a program that costs less to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.parallel import keys

OURS, THEIRS = keys.key(7), jax.random.key(7, impl="threefry2x32")

DRAWS = {
    "normal": lambda key: jax.random.normal(key, (3, 5, 7)),
    "truncated normal": lambda key: jax.nn.initializers.truncated_normal(0.02)(key, (4, 6)),
    "gumbel": lambda key: jax.random.gumbel(key, (33,)),
    "bernoulli": lambda key: jax.random.bernoulli(key, 0.9, (2, 9)),
    "scalar": lambda key: jax.random.uniform(key, ()),
    "bytes": lambda key: jax.random.bits(key, (5, 3), jnp.uint8),
    "empty": lambda key: jax.random.bits(key, (0, 3)),
    "split": lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
    "fold": lambda key: jax.random.key_data(jax.random.fold_in(key, 1 << 31)),
    "layers": lambda key: jax.vmap(lambda key: jax.random.normal(key, (2, 3)))(jax.random.split(key, 4)),
    "experts": lambda key: jax.vmap(jax.vmap(jax.random.normal))(jax.random.split(key, (4, 3))),
    "folds": lambda key: jax.vmap(lambda n: jax.random.bits(jax.random.fold_in(key, n)))(jnp.arange(6)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_those_of_jax(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours, theirs = DRAWS[name](OURS), DRAWS[name](THEIRS)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", (0, -1, 2**31 - 1))
def test_seeds_are_those_of_jax(seed):
    theirs = jax.random.key(seed, impl="threefry2x32")
    np.testing.assert_array_equal(jax.random.key_data(keys.key(seed)), jax.random.key_data(theirs))
    first = jax.random.key_data(keys.Keys(**keys.words(seed, layers=1)).params())
    np.testing.assert_array_equal(first, jax.random.key_data(jax.random.fold_in(theirs, 0)))


def test_a_seed_may_be_traced():
    ours = jax.jit(lambda seed: jax.random.bits(keys.key(seed), (4,)))(jnp.int32(7))
    np.testing.assert_array_equal(ours, jax.random.bits(THEIRS, (4,)))


def test_keys_of_parameters_are_those_of_flax():
    """What a run began with under flax's own keys, it begins with under these."""
    ours, theirs = keys.Keys(**keys.words(seed=7, layers=3)), nnx.Rngs(params=THEIRS)

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def layers(rngs: nnx.Rngs) -> jax.Array:
        return jnp.stack([jax.random.key_data(rngs.params()) for _ in range(5)])

    def data(rngs: keys.Keys | nnx.Rngs) -> np.ndarray:
        return np.asarray(jax.random.key_data(rngs.params()))

    np.testing.assert_array_equal(data(ours), data(theirs))
    np.testing.assert_array_equal(ours.stack()[:, :5], layers(theirs))
    np.testing.assert_array_equal(data(ours), data(theirs))


def test_numbers_beyond_32_bits_are_those_of_jax():
    """So large an array cannot be drawn here: its program shows who draws it."""

    def program(*shape: int) -> str:
        draw = jax.make_jaxpr(lambda words: keys._random_bits(words, 32, shape))
        return str(draw(jax.random.key_data(OURS)))

    assert " threefry2x32 " in program(2**20, 2**13)
    assert " threefry2x32 " in program(1, 2**20, 2**12)
    assert " threefry2x32 " not in program(1, 2**20, 2**12 - 1)


def test_a_draw_is_one_kernel():
    def kernels(key: jax.Array) -> int:
        compiled = jax.jit(lambda key: jax.random.normal(key, (4, 128, 512))).lower(key).compile()
        return compiled.as_text().count(" fusion(")

    assert kernels(OURS) == 1 < kernels(THEIRS)
