"""Rows of tokens to their experts and back, on this device or across a mesh axis, and the experts' work on them.

Dropless: rows are sorted by expert, each expert's group begins at a whole block, and a loop walks over the blocks in
use, each with its expert's parameters. XLA's own grouped product (`jax.lax.ragged_dot`) multiplies every row with every
expert on CPU and GPU; the loop does what is needed and no more, on every platform.

Capacity: every expert has the same number of rows, so its work is a batched product.

All of this is one device's view: it stands in a `jax.shard_map`, or there is one device.

Legend: N tokens, K experts of a token, E experts, P devices of the expert axis, G experts of one device, D embed,
S rows as they are sent or arrive, R rows as they are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlm.models.router import ranks

Feed = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""(rows [R, D], their weights [R], parameters of one expert) -> [R, D]."""

LARGEST_BLOCK = 512
"""Rows: enough that reading an expert's parameters costs less than multiplying with them."""

SMALLEST_BLOCK = 8


class Move(NamedTuple):
    """Rows and their copies on the way to other places. `spread` and `collect` are each other's transpose, and neither
    scatters: on GPU the sum of a scatter has no fixed order."""

    slots_NK: Int[Array, "N K"]
    """Where each copy of row n goes; past the end: nowhere."""
    copies_S: Int[Array, "S"]
    """The copy, n x K + k, that comes to each place; N x K: none."""

    @classmethod
    def to(cls, slots_NK: jax.Array, length: int) -> "Move":
        """To `length` places; no two copies to one."""
        count = slots_NK.size
        copies_S = jnp.full((length,), count, jnp.int32)
        return cls(slots_NK, copies_S.at[slots_NK.reshape(-1)].set(jnp.arange(count, dtype=jnp.int32), mode="drop"))

    def each(self) -> "Move":
        """The same for rows that are copies already."""
        return Move(self.slots_NK.reshape(-1, 1), self.copies_S)

    def spread(self, x: Float[Array, "N ..."]) -> Float[Array, "S ..."]:
        """Each place's row; zeros where none comes."""
        return _spread(x, self)

    def collect(self, y: Float[Array, "S ..."]) -> Float[Array, "N ..."]:
        """The sum of what has become of each row's copies."""
        return _collect(y, self)


@jax.custom_vjp
def _spread(x: jax.Array, move: Move) -> jax.Array:
    # A copy past the last is one of a row past the last.
    return x.at[move.copies_S // move.slots_NK.shape[1]].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(y: jax.Array, move: Move) -> jax.Array:
    return y.at[move.slots_NK].get(mode="fill", fill_value=0).sum(axis=1, dtype=jnp.float32).astype(y.dtype)


_spread.defvjp(lambda x, move: (_spread(x, move), move), lambda move, g: (_collect(g, move), None))
_collect.defvjp(lambda y, move: (_collect(y, move), move), lambda move, g: (_spread(g, move), None))


class Blocks(NamedTuple):
    """Rows sorted by expert, each expert's from the start of a block."""

    starts_G: Int[Array, "G"]
    """Row at which each expert's begin."""
    owners: Int[Array, "blocks"]
    """The expert of each block."""
    used: Int[Array, ""]
    """Blocks that hold any rows: the first ones."""

    @classmethod
    def of(cls, sizes_G: jax.Array, most: int, block: int) -> "Blocks":
        """For groups of these sizes, of at most `most` rows together, in blocks of so many rows."""
        held = sizes_G.shape[0]
        blocks_G = -(-sizes_G // block)
        ends_G = jnp.cumsum(blocks_G)
        numbers = jnp.arange((most + held * (block - 1)) // block, dtype=jnp.int32)  # a group may end within a block
        owners = (numbers[:, None] >= ends_G[None]).sum(axis=1, dtype=jnp.int32)
        return cls((ends_G - blocks_G) * block, jnp.minimum(owners, held - 1), ends_G[-1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def by_blocks(feed: Feed, x_RD: jax.Array, weights_R: jax.Array, parameters: Any, blocks: Blocks) -> jax.Array:
    """`feed` of each block in use with the parameters [G, ...] of its owner; zeros in the others.

    The backward computes a block again rather than keep its hidden layer, of which there could be as much as if all
    tokens went to this device. Gradients of parameters add up in float32, in the order of the blocks.
    """

    def add(number: jax.Array, y_RD: jax.Array) -> jax.Array:
        x, weights, own = _block_inputs(x_RD, weights_R, parameters, blocks, number)
        return jax.lax.dynamic_update_slice_in_dim(y_RD, feed(x, weights, own), number * len(x), axis=0)

    return jax.lax.fori_loop(0, blocks.used, add, jnp.zeros_like(x_RD))


def _by_blocks_backward(feed: Feed, kept: tuple, g_RD: jax.Array) -> tuple:
    x_RD, weights_R, parameters, blocks = kept

    def add(number: jax.Array, sums: tuple) -> tuple:
        dx_RD, dweights_R, dparameters = sums
        inputs = _block_inputs(x_RD, weights_R, parameters, blocks, number)
        at, size = number * len(inputs[0]), len(inputs[0])
        dx, dweights, own = jax.vjp(feed, *inputs)[1](jax.lax.dynamic_slice_in_dim(g_RD, at, size))
        return (
            jax.lax.dynamic_update_slice_in_dim(dx_RD, dx, at, axis=0),
            jax.lax.dynamic_update_slice_in_dim(dweights_R, dweights, at, axis=0),
            jax.tree.map(partial(_add_at, blocks.owners[number]), dparameters, own),
        )

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), parameters)
    zeros = (jnp.zeros_like(x_RD), jnp.zeros_like(weights_R), zeros)
    dx_RD, dweights_R, dparameters = jax.lax.fori_loop(0, blocks.used, add, zeros)
    return dx_RD, dweights_R, jax.tree.map(lambda d, p: d.astype(p.dtype), dparameters, parameters), None


by_blocks.defvjp(lambda feed, *inputs: (by_blocks(feed, *inputs), inputs), _by_blocks_backward)


def _block_inputs(x_RD, weights_R, parameters, blocks: Blocks, number: jax.Array) -> tuple:
    size = len(x_RD) // len(blocks.owners)
    x, weights = (jax.lax.dynamic_slice_in_dim(a, number * size, size) for a in (x_RD, weights_R))
    owner = blocks.owners[number]
    return x, weights, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, owner, keepdims=False), parameters)


def _add_at(index: jax.Array, total: jax.Array, more: jax.Array) -> jax.Array:
    summed = jax.lax.dynamic_index_in_dim(total, index, keepdims=False) + more.astype(total.dtype)
    return jax.lax.dynamic_update_index_in_dim(total, summed, index, axis=0)


@dataclass(frozen=True, kw_only=True)
class Trip:
    """Rows on the way to the devices that hold their experts, over a manual mesh axis.

    With `ragged` they travel by `jax.lax.ragged_all_to_all`, each once. XLA has none on CPU: there they travel in
    buffers with room for all that a device could send to another one, which is exact too, and moves P times as much.
    """

    counts_PPG: jax.Array
    """Rows from each device to each device, for each expert there."""
    axis: str
    room: int
    """Most rows that a device may send to another one."""
    length: int
    """Rows of what a device sends, padding of the buffers included."""
    ragged: bool

    @classmethod
    def of(cls, sizes_E: jax.Array, *, tokens: int, choices: int, axis: str, ragged: bool) -> "Trip":
        """`sizes_E`: rows of this device for each expert."""
        devices = jax.lax.axis_size(axis)
        held = sizes_E.shape[0] // devices
        counts_PPG = jax.lax.all_gather(sizes_E, axis).reshape(devices, devices, held)
        room = tokens * min(choices, held)
        length = tokens * choices if ragged else devices * room
        return cls(counts_PPG=counts_PPG, axis=axis, room=room, length=length, ragged=ragged)

    @property
    def counts_PP(self) -> jax.Array:
        return self.counts_PPG.sum(axis=2)

    @property
    def me(self) -> jax.Array:
        return jax.lax.axis_index(self.axis)

    def departures_E(self) -> jax.Array:
        """Row at which each expert's begin in what this device sends."""
        first_P = self._firsts(self.counts_PP[self.me])
        return (first_P[:, None] + before(self.counts_PPG[self.me], axis=1)).reshape(-1)

    def arrivals_PG(self) -> jax.Array:
        """Rows that come to this device from each one, for each expert here."""
        return self.counts_PPG[:, self.me]

    def regroup(self, starts_G: jax.Array, length: int) -> Move:
        """What arrived, sorted by device and then by expert, to rows sorted by expert: each one's from `starts_G`."""
        arrivals_PG = self.arrivals_PG()
        devices, held = arrivals_PG.shape
        first_P, rows_S = self._firsts(arrivals_PG.sum(axis=1)), jnp.arange(devices * self.room, dtype=jnp.int32)
        sources_S = (rows_S[:, None] >= first_P[None]).sum(axis=1) - 1
        offsets_S = rows_S - first_P[sources_S]
        owners_S = (offsets_S[:, None] >= jnp.cumsum(arrivals_PG, axis=1)[sources_S]).sum(axis=1)
        shift_PG = starts_G[None] + before(arrivals_PG, axis=0) - before(arrivals_PG, axis=1)
        slots_S = offsets_S + shift_PG[sources_S, jnp.minimum(owners_S, held - 1)]
        return Move.to(jnp.where(owners_S < held, slots_S, length)[:, None], length)

    def there(self, rows: jax.Array) -> jax.Array:
        """From where the tokens are to where the experts are."""
        if self.ragged:
            return _ragged(self.axis, self.counts_PPG.shape[0] * self.room, rows, self.counts_PP)
        return jax.lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def back(self, rows: jax.Array) -> jax.Array:
        """From where the experts are to where the tokens are."""
        if self.ragged:
            return _ragged(self.axis, self.length, rows, self.counts_PP.T)
        return jax.lax.all_to_all(rows, self.axis, 0, 0, tiled=True)

    def _firsts(self, counts_P: jax.Array) -> jax.Array:
        """Where the rows for or from each device begin."""
        return before(counts_P) if self.ragged else jnp.arange(len(counts_P), dtype=jnp.int32) * self.room


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged(axis: str, length: int, rows: jax.Array, counts_PP: jax.Array) -> jax.Array:
    """Exchange rows that lie sorted by device, so many from each to each; they arrive so, followed by zeros."""
    me, out = jax.lax.axis_index(axis), jnp.zeros((length, *rows.shape[1:]), rows.dtype)
    sent_P, arrive_P = counts_PP[me], counts_PP[:, me]
    return jax.lax.ragged_all_to_all(
        rows, out, before(sent_P), sent_P, before(counts_PP, axis=0)[me], arrive_P, axis_name=axis
    )


_ragged.defvjp(
    lambda axis, length, rows, counts_PP: (_ragged(axis, length, rows, counts_PP), (counts_PP, rows[:0], len(rows))),
    lambda axis, length, kept, g: (_ragged(axis, kept[2], g, kept[0].T), None),
)


def before(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Where each of some stretches begins, from their sizes."""
    return jnp.cumsum(sizes, axis=axis) - sizes


def dropless(
    feed: Feed,
    parameters: Callable[[], Any],
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    experts_NK: Int[Array, "N K"],
    *,
    experts: int,
    axis: str | None,
    ragged: bool,
) -> Float[Array, "N D"]:
    """Each token through its experts, summed: nothing is dropped, however uneven the choice.

    Args:
        parameters: makes the tree of [G, ...], of the experts that this device holds; the backward makes it again.
        experts_NK: global numbers; `experts` is nowhere.
        axis: manual mesh axis over which the experts lie; None where this device holds them all.
        ragged: see `Trip`.
    """

    @partial(jax.checkpoint, prevent_cse=False)
    def work(x_RD: jax.Array, weights_R: jax.Array, blocks: Blocks) -> jax.Array:
        return by_blocks(feed, x_RD, weights_R, parameters(), blocks)

    tokens, choices = experts_NK.shape
    ranks_NK, sizes_1E = ranks(experts_NK, experts, 1)
    if axis is None:
        block = _block(tokens * choices, experts)
        blocks = Blocks.of(sizes_1E[0], tokens * choices, block)
        move = Move.to(_slots(experts_NK, blocks.starts_G, ranks_NK), len(blocks.owners) * block)
        weights_R = move.each().spread(weights_NK.reshape(-1))
        return move.collect(work(move.spread(x_ND), weights_R, blocks))
    trip = Trip.of(sizes_1E[0], tokens=tokens, choices=choices, axis=axis, ragged=ragged)
    move = Move.to(_slots(experts_NK, trip.departures_E(), ranks_NK), trip.length)
    x_SD, weights_S = trip.there(move.spread(x_ND)), trip.there(move.each().spread(weights_NK.reshape(-1)))
    sizes_G = trip.arrivals_PG().sum(axis=0)
    block = _block(tokens * choices, len(sizes_G))
    blocks = Blocks.of(sizes_G, len(x_SD), block)
    group = trip.regroup(blocks.starts_G, len(blocks.owners) * block)
    y_RD = work(group.spread(x_SD), group.spread(weights_S), blocks)
    return move.collect(trip.back(group.collect(y_RD)))


def capped(
    feed: Feed,
    parameters: Callable[[], Any],
    x_ND: Float[Array, "N D"],
    weights_NK: Float[Array, "N K"],
    experts_NK: Int[Array, "N K"],
    *,
    experts: int,
    axis: str | None,
    rows: int,
    capacity: int,
) -> Float[Array, "N D"]:
    """As `dropless`, for tokens of `rows` sequences of which no expert is chosen more than `capacity` times each."""
    ranks_NK, _ = ranks(experts_NK, experts, rows)
    sequence_N = jnp.arange(len(x_ND), dtype=jnp.int32) // (len(x_ND) // rows)
    slots_NK = (experts_NK * rows + sequence_N[:, None]) * capacity + ranks_NK
    length = experts * rows * capacity
    move = Move.to(jnp.where(experts_NK < experts, slots_NK, length), length)

    def there(a: jax.Array) -> jax.Array:
        a = a.reshape(experts, rows * capacity, *a.shape[1:])
        return a if axis is None else jax.lax.all_to_all(a, axis, 0, 1, tiled=True)

    @partial(jax.checkpoint, prevent_cse=False)  # hidden layers are computed again, as in `by_blocks`
    def work(x_GRD: jax.Array, weights_GR: jax.Array) -> jax.Array:
        return jax.vmap(feed)(x_GRD, weights_GR, parameters())

    y = work(there(move.spread(x_ND)), there(move.each().spread(weights_NK.reshape(-1))))
    y = y if axis is None else jax.lax.all_to_all(y, axis, 1, 0, tiled=True)
    return move.collect(y.reshape(length, -1))


def _slots(experts_NK: jax.Array, starts_E: jax.Array, ranks_NK: jax.Array) -> jax.Array:
    """Where each choice goes; far past the end where the expert is nowhere."""
    experts = starts_E.shape[0]
    slots_NK = starts_E[jnp.minimum(experts_NK, experts - 1)] + ranks_NK
    return jnp.where(experts_NK < experts, slots_NK, jnp.iinfo(jnp.int32).max)


def _block(rows: int, experts: int) -> int:
    """Rows of a block: half of an expert's mean, so that little of the last one is empty."""
    half = max(rows // (2 * experts), 1)
    return min(max(1 << (half.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)
