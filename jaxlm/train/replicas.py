"""Whether devices that hold copies of the same numbers still hold the same bits: a chip that computes wrong is silent.

A checksum is the sum, modulo 2^32, of the words of a device's part of an array, each times an odd number of its own. An
odd number has an inverse modulo 2^32, so a change within one word, of one bit or more, always changes the sum.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.train.state import State

PIECE = 1 << 14
"""Elements that a CPU sums up at a time."""


class Difference(NamedTuple):
    """Copies of one slice of an array that are not the same."""

    array: str
    """Its path in the state, such as `params.blocks.mlp.up.kernel`."""
    devices: tuple[jax.Device, ...]
    """Those that differ from most of the others; all, where no value has most of the copies."""

    def __str__(self) -> str:
        where = ", ".join(f"{device.id} of process {device.process_index}" for device in self.devices)
        return f"{self.array} on device{'s' if len(self.devices) > 1 else ''} {where}"


class Differing(Exception):
    """The state after `step` is not the same on devices that hold the same part of it."""

    def __init__(self, step: int, found: Sequence[Difference]):
        self.step, self.found = step, found
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        super().__init__(f"after step {step} copies of the same numbers differ: {found[0]}{more}")


class Replicas:
    """Compares the copies in states of `abstract`, a tree of jax.ShapeDtypeStruct on one mesh.

    All processes call `differing` and get the same answer. Nothing is compiled before its first call, and nothing runs
    where no array has a copy.
    """

    def __init__(self, abstract: State):
        self._abstract = abstract

    def differing(self, state: State) -> list[Difference]:
        """The slices whose copies differ, in the order of the state's arrays."""
        if not self._copied:
            return []
        leaves = jax.tree.leaves(state)
        table = np.asarray(self._checksums(*(leaves[copied.leaf] for copied in self._copied)))
        found = []
        for copied, sums in zip(self._copied, table.T, strict=True):
            for rows in copied.rows:
                if (wrong := _fewer(sums[rows])).any():
                    found.append(Difference(copied.name, tuple(self._mesh.devices.flat[rows[wrong]])))
        return found

    @property
    def _mesh(self) -> Mesh:
        return jax.tree.leaves(self._abstract)[0].sharding.mesh

    @cached_property
    def _copied(self) -> list["_Copied"]:
        """The arrays of which at least one slice is on several devices."""
        number = {device: row for row, device in enumerate(self._mesh.devices.flat)}
        found = []
        for at, (path, leaf) in enumerate(jax.tree.leaves_with_path(self._abstract)):
            holders: dict[tuple, list[int]] = {}
            for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
                holders.setdefault(tuple((cut.start, cut.stop) for cut in index), []).append(number[device])
            rows = [np.array(sorted(held)) for held in holders.values() if len(held) > 1]
            if rows and leaf.size:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                found.append(_Copied(name, at, leaf.sharding.spec, rows))
        return found

    @cached_property
    def _checksums(self) -> Callable[..., jax.Array]:
        return checksums(self._mesh, [copied.spec for copied in self._copied])


class _Copied(NamedTuple):
    """An array with copies."""

    name: str
    leaf: int
    """Its place among the leaves of the state."""
    spec: PartitionSpec
    rows: list[np.ndarray]
    """Of each slice with copies: the numbers of the devices that hold it."""


def checksums(mesh: Mesh, specs: Sequence[PartitionSpec]) -> Callable[..., jax.Array]:
    """A program: arrays laid out as `specs` on `mesh` to uint32 [devices, arrays], the whole of it on every device.

    Devices are in the order of `mesh.devices.flat`. It reads each device's part once and needs no memory for a copy.
    """

    def local(*arrays: Any) -> jax.Array:
        return jnp.stack([_checksum(array) for array in arrays])[None]

    whole = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=PartitionSpec(tuple(mesh.axis_names)),
        check_vma=False,
    )
    return jax.jit(whole, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _checksum(array: jax.Array) -> jax.Array:
    """uint32 scalar: see the head of this file. The array's dtype has at most 32 bits."""
    # XLA:CPU would first write all words down, at six times the time: in pieces they stay in its cache.
    return jax.lax.platform_dependent(array, cpu=by_pieces, default=at_once)


def at_once(array: jax.Array) -> jax.Array:
    """The checksum, as it is defined."""
    place, step = jnp.zeros(array.shape, jnp.uint32), 1
    for dim in reversed(range(array.ndim)):
        place += jax.lax.broadcasted_iota(jnp.uint32, array.shape, dim) * jnp.uint32(step % 2**32)
        step *= array.shape[dim]
    return (_words(array) * (2 * place + 1)).sum(dtype=jnp.uint32)


def by_pieces(array: jax.Array) -> jax.Array:
    """The same number: a sum modulo 2^32 is the same in any order."""
    # XLA:CPU would make float32 of all of a bfloat16 array to cut it: a copy as it is takes half of that.
    array = array if array.dtype.itemsize == 4 else _bits(array)
    flat, (whole, rest) = array.reshape(-1), divmod(array.size, PIECE)
    place_P = jnp.arange(PIECE, dtype=jnp.uint32)

    def terms(first: jax.Array, size: int) -> jax.Array:
        words = _words(jax.lax.dynamic_slice_in_dim(flat, first, size))
        return words * (2 * (place_P[:size] + first) + 1)

    def add(sums_P: jax.Array, piece: jax.Array) -> tuple[jax.Array, None]:
        return sums_P + terms(piece * jnp.uint32(PIECE), PIECE), None

    sums_P = jnp.zeros_like(place_P)
    if whole:
        sums_P, _ = jax.lax.scan(add, sums_P, jnp.arange(whole, dtype=jnp.uint32))
    return sums_P.sum(dtype=jnp.uint32) + terms(jnp.uint32(whole * PIECE), rest).sum(dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    return _bits(array).astype(jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, f"uint{array.dtype.itemsize * 8}")


def _fewer(sums: np.ndarray) -> np.ndarray:
    """Which copies do not have the checksum that most have, [copies]; all, where the two commonest are as many."""
    ranked = Counter(sums.tolist()).most_common(2)
    if len(ranked) == 1:
        return np.zeros(sums.shape, bool)
    return np.ones(sums.shape, bool) if ranked[0][1] == ranked[1][1] else sums != ranked[0][0]
