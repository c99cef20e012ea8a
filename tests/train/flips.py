"""`make flips`: flip bits of a run's numbers, and see what notices."""

from collections.abc import Sequence

import jax
import numpy as np


def flipped(array: jax.Array, devices: Sequence[jax.Device], at: int, bit: int) -> jax.Array:
    """`array` with one bit (0: the lowest) of number `at` of their part of it flipped on `devices`."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device in devices:
            words = data.view(f"uint{data.itemsize * 8}").reshape(-1)
            words[at] ^= words.dtype.type(1 << bit)
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
