"""Random keys: JAX's Threefry-2x32, bit for bit, with its rounds written out on every platform.

JAX writes them out for accelerators, but as a loop for CPUs, where a draw is ten kernels then. They take at least three
times as long to compile as the one kernel that XLA makes of this, and longer to run.
The bits of an element depend on the key and on the element's number alone, so a mesh draws what one device does.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.extend.random import define_prng_impl, threefry_prng_impl

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = np.uint32(0x1BD11BDA)

MOST = 64
"""Parameters that a module has keys for."""


def key(seed: int | jax.Array) -> jax.Array:
    """A key whose draws are those of `jax.random.key(seed, impl="threefry2x32")`."""
    return jax.random.key(seed, impl=_WRITTEN_OUT)


def words(seed: int, layers: int) -> dict[str, np.ndarray]:
    """What the `Keys` of a model of so many layers are made of.

    They come from the host, because a program that makes them takes as long to compile as one that draws with them.
    """
    own = _children(np.array([0, seed & 0xFFFFFFFF], np.uint32), MOST)
    return {"own": own, "layers": _children(_children(own, layers), MOST)}


class Keys:
    """A key for each parameter of a module, in the order in which they are made: those that `flax.nnx.Rngs` gives.

    Args:
        own: words of each key, [MOST, 2] of uint32.
        layers: those of the layers of a stack that takes a parameter's place, for each such place, [MOST, L, MOST, 2].
    """

    def __init__(self, own: Any, layers: Any = None):
        self._own, self._layers, self._given = own, layers, 0

    def params(self) -> jax.Array:
        """The key of the next parameter."""
        return jax.random.wrap_key_data(self._own[self._next()], impl=_WRITTEN_OUT)

    def stack(self) -> Any:
        """The words of each layer of a stack, [L, MOST, 2]."""
        return self._layers[self._next()]

    def _next(self) -> int:
        assert self._given < MOST, "a module of more parameters than MOST"
        self._given += 1
        return self._given - 1


def _hash(first: Any, second: Any, high: Any, low: Any, *, of: Any = lax) -> tuple[Any, Any]:
    """Two words for each of the counters, whose halves are `high` and `low`, by a key's (uint32 arrays of `of`).

    Not in terms of operators: with those of `jax.numpy`, tracing takes as long as compiling.
    """
    left, right = (of.shift_left, of.shift_right_logical) if of is lax else (of.left_shift, of.right_shift)
    words = (first, second, of.bitwise_xor(of.bitwise_xor(first, second), PARITY))
    a, b = of.add(high, first), of.add(low, second)
    for turn in range(5):
        for bits in ROTATIONS[turn % 2]:
            a = of.add(a, b)
            b = of.bitwise_or(left(b, np.uint32(bits)), right(b, np.uint32(32 - bits)))
            b = of.bitwise_xor(a, b)
        a = of.add(a, words[(turn + 1) % 3])
        b = of.add(of.add(b, words[(turn + 2) % 3]), np.uint32(turn + 1))
    return a, b


def _children(words: np.ndarray, count: int) -> np.ndarray:
    """The keys that `jax.random.fold_in` makes of each with 0, 1, ..., and `jax.random.split` too: [..., count, 2]."""
    numbers = np.arange(count, dtype=np.uint32)
    return np.stack(_hash(words[..., :1], words[..., 1:], np.zeros_like(numbers), numbers, of=np), axis=-1)


_hash_of_arrays = custom_vmap(_hash)


@_hash_of_arrays.def_vmap
def _hash_of_batches(size: int, batched: list[bool], *arrays: jax.Array) -> tuple[Any, Any]:
    """Once more with larger arrays: to batch each operation would take long."""
    whole = [x if of else lax.broadcast(x, (size,)) for x, of in zip(arrays, batched, strict=True)]
    return _hash_of_arrays(*whole), (True, True)


def _random_bits(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    if width != 32 or math.prod(shape) >= 2**32:  # whose strides may not be of 32 bits
        return threefry_prng_impl.random_bits(key, width, shape)
    low = jnp.zeros(shape, jnp.uint32)
    for dim in range(len(shape)):
        low = low + lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(math.prod(shape[dim + 1 :]))
    words = lax.optimization_barrier(key)  # what made the key is not to be made again for each element
    first, second = (lax.broadcast(word, shape) for word in words)
    a, b = _hash_of_arrays(first, second, jnp.zeros_like(low), low)
    return a ^ b


_WRITTEN_OUT = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    random_bits=_random_bits,
    fold_in=threefry_prng_impl.fold_in,
    name="threefry2x32_written_out",
    tag="fry",
)
