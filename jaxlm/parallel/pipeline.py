"""The pipeline engine: runs any schedule table, forward and backward, as one loop of ticks in one XLA program.

Everything here runs inside a `jax.shard_map` that is manual over every axis but `model`; a device sees its own stage.
In a tick a stage does what its row of the table says: a forward, a backward (which makes the forward again from the
stage's stored input, so that only stage inputs are kept), or with a zero-bubble schedule the two halves of a backward.
Then activations move one stage on and cotangents one stage back, on every stage and in every tick: the permutes stand
outside all branches, because all stages take part in them. Idle work is skipped by a branch, not masked: whatever a
branch holds besides (gathers of fsdp, sums of tp, exchanges of cp and ep) has all its participants on the same stage,
which take the same branch.

Each device computes its own part of the loss SUM. The total is the sum over devices, and so are the gradients of what
devices share: `reduce_gradients` adds them once, after the loop.

Legend: M microbatches, C chunks of a stage, K layers of a chunk, S stages.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxlm.parallel.rules import across, axes_of, cut_by, sum_scatter
from jaxlm.parallel.schedules import Table

AXIS = "pipeline"

Tree = Any
Batch = dict[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model as the engine sees it; each function takes this device's arrays of one microbatch, `batch`."""

    first: Callable[[Tree, Batch], jax.Array]
    """(shared weights, batch) -> what the first layer reads."""
    chunk: Callable[[Tree, jax.Array, jax.Array, Batch], tuple[tuple[jax.Array, jax.Array], Tree]]
    """(weights of a chunk, its layers' numbers [K], x, batch) -> ((y, loss sum of its own), statistics)."""
    last: Callable[[Tree, jax.Array, Batch], jax.Array]
    """(shared weights, y of the last layer, batch) -> loss sum."""
    pin: Callable[[jax.Array], jax.Array]
    """x, or a stack of such, held to how automatic axes cut activations: branches must agree, and XLA would choose for
    each alone."""


def layer_numbers(layers: int, stages: int, chunks: int) -> np.ndarray:
    """Which layers each chunk holds, [S, C, K] int32; -1 fills up chunks with fewer than the largest.

    Chunk c of stage s is virtual stage c * S + s. Of layers that do not divide, the middle virtual stages take one more
    each: the first and the last have the embedding and the output layer to compute.
    """
    virtual = stages * chunks
    base, extra = divmod(layers, virtual)
    first = (virtual - extra) // 2
    counts = [base + (first <= j < first + extra) for j in range(virtual)]
    numbers = np.full((virtual, max(counts)), -1, np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)])
    for j, count in enumerate(counts):
        numbers[j, :count] = np.arange(starts[j], starts[j] + count)
    return np.ascontiguousarray(numbers.reshape(chunks, stages, -1).swapaxes(0, 1))


def cut_weights(params: Tree, specs: Tree, numbers: np.ndarray, automatic: Collection[str]) -> tuple[Tree, Tree]:
    """This device's parameters, stored as `specs`, as the engine takes them: its stage's chunks, and the rest.

    The stacked layers are `params["blocks"]`. Its transpose takes gradients back to where parameters are stored.
    """
    chunks = jax.tree.map(
        lambda leaf, spec: to_chunks(leaf, spec, numbers, automatic), params["blocks"], specs["blocks"]
    )
    shared = {
        name: jax.tree.map(lambda leaf, spec: to_shared(leaf, spec, automatic), part, specs[name])
        for name, part in params.items()
        if name != "blocks"
    }
    return chunks, shared


def to_chunks(leaf: jax.Array, spec: PartitionSpec, numbers: np.ndarray, automatic: Collection[str]) -> jax.Array:
    """This device's part of a stacked parameter as the chunks of its stage, [C, K, ...].

    Stages hold consecutive layers where the first dim of `spec` says so; then there is nothing to do. Else every device
    holds all layers, of which another dim may be cut over the stages: layers are exchanged for parts of that dim.
    """
    stages, chunks, count = numbers.shape
    if axes_of(spec, 0):
        return leaf.reshape(chunks, count, *leaf.shape[1:])
    ordered = leaf[jnp.asarray(np.maximum(numbers, 0).reshape(-1))]
    cut = next((dim for dim in range(len(spec)) if AXIS in axes_of(spec, dim)), None)
    if cut is None:
        own = ordered.reshape(stages, chunks, count, *leaf.shape[1:])
        return jax.lax.dynamic_index_in_dim(own, jax.lax.axis_index(AXIS), 0, keepdims=False)
    # `pipeline` is the last, fastest axis of its dim, so the pieces of the stages join to what fsdp cuts.
    exchange = partial(jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=cut, tiled=True)
    own = across(exchange, ordered, cut_by(spec, automatic))
    return own.reshape(chunks, count, *own.shape[1:])


def to_shared(leaf: jax.Array, spec: PartitionSpec, automatic: Collection[str]) -> jax.Array:
    """A parameter that every stage has: gathered where it is stored in parts."""
    cut = next((dim for dim in range(len(spec)) if AXIS in axes_of(spec, dim)), None)
    if cut is None:
        return leaf
    gather = partial(jax.lax.all_gather, axis_name=AXIS, axis=cut, tiled=True)
    return across(gather, leaf, cut_by(spec, automatic))


def gradients(
    table: Table, parts: Parts, chunks: Tree, shared: Tree, numbers: np.ndarray, batch: Batch, share: jax.Array
) -> tuple[Tree, Tree, jax.Array, Tree]:
    """Run `table`.

    Args:
        chunks: weights of this stage's layers, [C, K, ...] each.
        shared: weights of the embedding and the output layer, on every stage.
        numbers: see `layer_numbers`.
        batch: arrays [M, ...] of this device's rows, the same on every stage.
        share: what a unit of the loss sum weighs in the gradients.

    Returns:
        float32 gradients like `chunks` and like `shared`, the loss sum, and the statistics summed over microbatches
        [C, ...]: this device's part of each.
    """
    engine = _Engine(table, parts, chunks, shared, numbers, batch, share)
    rows = {name: jnp.asarray(getattr(table, name)) for name in FIELDS}
    carry, _ = jax.lax.scan(engine.tick, engine.start(), rows)
    return carry["chunk_gradients"], carry["shared_gradients"], carry["loss"], carry["statistics"]


FIELDS = (
    *("f_microbatch", "f_chunk", "f_slot", "b_microbatch", "b_chunk", "b_slot", "b_cotangent_slot"),
    *("w_microbatch", "w_chunk", "w_slot", "w_cotangent_slot", "receive_activation_slot", "receive_cotangent_slot"),
)
"""Of a table: arrays [ticks, S]."""


class _Engine:
    """One run of a table: the constants of the loop, and its body."""

    def __init__(self, table, parts, chunks, shared, numbers, batch, share):
        self.table, self.parts, self.chunks, self.shared, self.batch = table, parts, chunks, shared, batch
        self.share = share
        self.stage = jax.lax.axis_index(AXIS)
        self.numbers = jnp.asarray(numbers)[self.stage]
        self.splits = bool((table.w_microbatch >= 0).any())
        micro = {name: a[0] for name, a in batch.items()}
        self.x = jax.eval_shape(parts.first, shared, micro)
        one = jax.tree.map(lambda a: a[0], chunks)
        self.statistics = jax.eval_shape(parts.chunk, one, self.numbers[0], self.x, micro)[1]
        ring = table.stages if table.chunks > 1 else table.stages - 1
        self.onward = [(s, (s + 1) % table.stages) for s in range(ring)]

    def start(self) -> dict[str, Tree]:
        """Empty buffers; each has one slot more than the table uses, for what nobody will read."""
        table = self.table

        def zeros(tree: Tree, lead: Sequence[int] = (), dtype: Any = None) -> Tree:
            return jax.tree.map(lambda a: jnp.zeros((*lead, *a.shape), dtype or a.dtype), tree)

        def slots(count: int) -> jax.Array:
            return self.parts.pin(zeros(self.x, (count + 1,)))

        return {
            "activations": slots(table.activation_slots),
            "cotangents": slots(table.cotangent_slots),
            "chunk_gradients": zeros(self.chunks, dtype=jnp.float32),
            "shared_gradients": zeros(self.shared, dtype=jnp.float32),
            "loss": jnp.zeros((), jnp.float32),
            "statistics": zeros(self.statistics, (table.chunks,)),
        }

    def tick(self, carry: dict[str, Tree], rows: dict[str, jax.Array]) -> tuple[dict[str, Tree], None]:
        """One tick: forward, backward, weight gradients, then the two permutes."""
        own = {name: row[self.stage] for name, row in rows.items()}
        y = self._forward(carry, own)
        carry, dx = self._backward(carry, own, "b", weights=not self.splits)
        if self.splits:
            carry, _ = self._backward(carry, own, "w", weights=True)
        backward = [(b, a) for a, b in self.onward]
        arrived = {
            "activations": (jax.lax.ppermute(y, AXIS, self.onward), own["receive_activation_slot"]),
            "cotangents": (jax.lax.ppermute(dx, AXIS, backward), own["receive_cotangent_slot"]),
        }
        for name, (value, slot) in arrived.items():
            buffer = carry[name]
            slot = jnp.where(slot < 0, buffer.shape[0] - 1, slot)
            carry = carry | {name: jax.lax.dynamic_update_index_in_dim(buffer, value, slot, 0)}
        return carry, None

    def _forward(self, carry, own) -> jax.Array:
        """What this stage sends on. The last layers' own output is made again by their backward: not here."""
        busy = (own["f_microbatch"] >= 0) & ~self._is_last(own["f_chunk"])

        def run() -> jax.Array:
            batch, chunk, numbers = self._pick(own["f_microbatch"], own["f_chunk"])
            x = self._input(carry, own["f_chunk"], own["f_slot"], batch)
            return self.parts.pin(self.parts.chunk(chunk, numbers, x, batch)[0][0])

        return jax.lax.cond(busy, run, self._nothing)

    def _backward(self, carry, own, kind: str, *, weights: bool) -> tuple[dict[str, Tree], jax.Array]:
        """A backward (`kind` b) or its second half (w): the carry with gradients added, and the input's cotangent."""
        number = own[f"{kind}_chunk"]
        names = ("chunk_gradients", "shared_gradients", "loss", "statistics")

        def run(chunk_gradients, shared_gradients, loss, statistics):
            batch, chunk, numbers = self._pick(own[f"{kind}_microbatch"], number)
            x = self._input(carry, number, own[f"{kind}_slot"], batch)
            (y, extra), back, more = jax.vjp(
                lambda chunk, x: self.parts.chunk(chunk, numbers, x, batch), chunk, x, has_aux=True
            )
            dy, shared_gradients, head_loss = jax.lax.cond(
                self._is_last(number),
                lambda: self._head(y, shared_gradients, batch, weights=weights),
                lambda: (
                    self.parts.pin(carry["cotangents"][own[f"{kind}_cotangent_slot"]]),
                    shared_gradients,
                    jnp.zeros_like(loss),
                ),
            )
            dchunk, dx = back((dy, self.share.astype(extra.dtype)))
            if weights:
                chunk_gradients = jax.tree.map(lambda g, d: _add_at(g, d, number), chunk_gradients, dchunk)
                shared_gradients = jax.lax.cond(
                    self._is_first(number),
                    lambda: self._embedding(dx, shared_gradients, batch),
                    lambda: shared_gradients,
                )
            if kind == "b":
                loss = loss + head_loss + extra
                statistics = jax.tree.map(lambda s, n: _add_at(s, n, number), statistics, more)
            return (chunk_gradients, shared_gradients, loss, statistics), self.parts.pin(dx)

        def idle(*sums):
            return sums, self._nothing()

        sums, dx = jax.lax.cond(own[f"{kind}_microbatch"] >= 0, run, idle, *(carry[name] for name in names))
        return carry | dict(zip(names, sums, strict=True)), dx

    def _head(self, y, gradients, batch, *, weights: bool) -> tuple[jax.Array, Tree, jax.Array]:
        """Cotangent of the last layer's output, gradients with the output layer's added, the loss."""
        if not weights:
            loss, back = jax.vjp(lambda y: self.parts.last(self.shared, y, batch), y)
            return self.parts.pin(back(self.share)[0]), gradients, loss
        loss, back = jax.vjp(lambda shared, y: self.parts.last(shared, y, batch), self.shared, y)
        dshared, dy = back(self.share)
        return self.parts.pin(dy), _add(gradients, dshared), loss

    def _embedding(self, dx, gradients, batch) -> Tree:
        _, back = jax.vjp(lambda shared: self.parts.first(shared, batch), self.shared)
        return _add(gradients, back(dx)[0])

    def _input(self, carry, chunk, slot, batch) -> jax.Array:
        return jax.lax.cond(
            self._is_first(chunk),
            lambda: self.parts.pin(self.parts.first(self.shared, batch)),
            lambda: self.parts.pin(carry["activations"][slot]),
        )

    def _nothing(self) -> jax.Array:
        """What an idle stage sends."""
        return self.parts.pin(jnp.zeros(self.x.shape, self.x.dtype))

    def _pick(self, microbatch, chunk) -> tuple[Batch, Tree, jax.Array]:
        def at(a: jax.Array, index: jax.Array) -> jax.Array:
            return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False) if a.shape[0] > 1 else a[0]

        batch = {name: at(a, microbatch) for name, a in self.batch.items()}
        return batch, jax.tree.map(lambda a: at(a, chunk), self.chunks), at(self.numbers, chunk)

    def _is_first(self, chunk) -> jax.Array:
        return (self.stage == 0) & (chunk == 0)

    def _is_last(self, chunk) -> jax.Array:
        return (self.stage == self.table.stages - 1) & (chunk == self.table.chunks - 1)


def in_layer_order(statistics: Tree, numbers: np.ndarray, layers: int) -> Tree:
    """A stage's statistics of its layers, [C, K, ...], in their places among all layers, where the others are zeros."""
    own = jnp.asarray(np.where(numbers < 0, layers, numbers))[jax.lax.axis_index(AXIS)]
    return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape[2:]), a.dtype).at[own].set(a, mode="drop"), statistics)


def scattered(held: PartitionSpec, wanted: PartitionSpec, automatic: Collection[str]) -> PartitionSpec:
    """What `reduce_gradients` can make of `wanted`: `held` where it would scatter a dim that an automatic axis cuts."""
    mixed = (
        set(axes_of(held, dim)) & set(automatic) and axes_of(held, dim) != axes_of(wanted, dim)
        for dim in range(len(wanted))
    )
    return held if any(mixed) else wanted


def reduce_gradients(grads: Tree, held: Tree, wanted: Tree, manual: Sequence[str], automatic: Collection[str]) -> Tree:
    """Sum partial gradients over the manual axes that do not cut them: once, inside a replica before across replicas.

    Args:
        grads: this device's part.
        held: partition specs that `grads` have.
        wanted: partition specs of the result: an axis that cuts more there (ZeRO) gets its part only.
        manual: mesh axes to sum over, outermost first.
        automatic: the others.
    """

    def reduce(grad: jax.Array, held: PartitionSpec, wanted: PartitionSpec) -> jax.Array:
        has = {name for dim in range(len(held)) for name in axes_of(held, dim)}
        missing = [axis for axis in manual if axis not in has]
        for dim in range(len(wanted)):
            for axis in axes_of(wanted, dim):
                if axis in missing:
                    scatter = partial(sum_scatter, axes=axis, dim=dim)
                    grad = across(scatter, grad, cut_by(held, automatic))
                    missing.remove(axis)
        inner = tuple(axis for axis in missing if axis != "replica")
        grad = jax.lax.psum(grad, inner) if inner else grad
        return jax.lax.psum(grad, "replica") if "replica" in missing else grad

    return jax.tree.map(reduce, grads, held, wanted)


def _add(sums: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, more)


def _add_at(sums: jax.Array, more: jax.Array, index: jax.Array) -> jax.Array:
    if sums.shape[0] == 1:
        return sums + more.astype(sums.dtype)[None]
    old = jax.lax.dynamic_index_in_dim(sums, index, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(sums, old + more.astype(sums.dtype), index, 0)
