"""Exact attention over a sequence that is cut over the devices of `context`; all of this runs on one device's part.

The sequence is cut into two pieces a device, and device i of n holds pieces i and 2n - 1 - i (`parallel.zigzag`): the
first is seen by many and sees few, the second the reverse, so that under a causal mask all devices have the same to do.
First a device attends to its own keys: both pieces to themselves, and the second to the first. With the keys of any
other device j, two pairs of pieces remain of which the queries see all keys: its second piece and j's first, and either
both first ones (j < i) or both second ones (j > i). Without causality all four pairs remain, of every device.

- ring: keys and values travel from neighbour to neighbour, once around in the forward pass and once more, with their
  gradients, in the backward (Liu et al. 2023, https://arxiv.org/abs/2310.01889). A device never holds more than its own
  and those under way. A window that reaches m pieces back needs m rounds each way instead of n - 1 in all.
- allgather: each device gathers all keys and values, in the backward pass again (as Llama 3,
  https://arxiv.org/abs/2407.21783).

Legend: B batch, T this device's tokens, K kv heads, G query heads of one kv head, H head size; P the 2 pieces of a
device and t the length of one, so T = P * t.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxlm.models.attention import rectangle
from jaxlm.models.attention.rectangle import Rule
from jaxlm.models.attention.reference import HIDDEN
from jaxlm.models.attention.shards import SEQUENCE_AXIS, STAGE_AXIS
from jaxlm.models.attention.xla import SAVED_NAME, grouped, ungrouped

Visit = Callable[[Any, Any, Any], tuple[Any, Any]]
"""(state, keys that were fetched, the device they are of) -> (state, what that device is to sum up)."""


class Terms(NamedTuple):
    """What is computed, and how keys and values travel."""

    method: str
    scale: float
    causal: bool
    window: int
    softcap: float | None
    permutes: bool = True
    """Whether neighbours send to each other; else keys are gathered and the neighbour's taken out (`can_permute`)."""


class Pairs(NamedTuple):
    """Pieces of this device's queries, each with one of another device's keys."""

    queries: Int[Array, "pairs"]
    keys: Int[Array, "pairs"]
    distance: Int[Array, "pairs"]
    """Tokens from the first of the keys to the first of the queries."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    terms: Terms,
) -> Float[Array, "B T N H"]:
    """Attention within segments of this device's queries to the keys of all devices of `context`; call it where
    that axis is manual. Statistics in float32."""
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, terms)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, terms):
    q_PBKGtH = _scaled(q_BTNH, k_BTKH.shape[2], terms)
    own = _own(k_BTKH, v_BTKH, segments_BT)

    def add(state, kv, pair, rule):
        q, q_segments, *before = (_pick(x, pair.queries) for x in (q_PBKGtH, own[2], *state))
        k, v, kv_segments = (_pick(x, pair.keys) for x in kv)
        part = rectangle.forward(q, k, v, q_segments, kv_segments, pair.distance, rule)
        merged = rectangle.merge(before[0], before[1], *part)
        return tuple(x.at[pair.queries].set(new) for x, new in zip(state, merged, strict=True))

    def visit(state, kv, origin):
        return _each_pair(add, state, kv, origin, terms), ()

    state = (jnp.zeros(q_PBKGtH.shape, jnp.float32), jnp.full((*q_PBKGtH.shape[:-1], 1), HIDDEN, jnp.float32))
    state, _ = _TRAVELS[terms.method](visit, state, own, terms)
    o_BKGTH, lse_BKGT1 = (_joined(x, axis=3) for x in state)
    o_BTNH = checkpoint_name(ungrouped(o_BKGTH).astype(q_BTNH.dtype), SAVED_NAME)
    lse_BKGT1 = checkpoint_name(lse_BKGT1, SAVED_NAME)
    return o_BTNH, (q_BTNH, k_BTKH, v_BTKH, segments_BT, o_BTNH, lse_BKGT1)


def _backward(terms, residuals, do_BTNH):
    q_BTNH, k_BTKH, v_BTKH, segments_BT, o_BTNH, lse_BKGT1 = residuals
    kv_heads, dtype = k_BTKH.shape[2], q_BTNH.dtype
    q_PBKGtH = _scaled(q_BTNH, kv_heads, terms)
    own = _own(k_BTKH, v_BTKH, segments_BT)
    delta_BTN1 = (do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    of_output = [_pieces(x, axis=3) for x in (grouped(do_BTNH, kv_heads), lse_BKGT1, grouped(delta_BTN1, kv_heads))]

    def add(state, kv, pair, rule):
        q, q_segments, *rest = (_pick(x, pair.queries) for x in (q_PBKGtH, own[2], *of_output))
        k, v, kv_segments = (_pick(x, pair.keys) for x in kv)
        new = rectangle.backward(q, k, v, q_segments, kv_segments, pair.distance, rule, *rest)
        places = (pair.queries, pair.keys, pair.keys)
        return tuple(x.at[place].add(part) for x, place, part in zip(state, places, new, strict=True))

    def visit(dq, kv, origin):
        zeros = (jnp.zeros(x.shape, jnp.float32) for x in kv[:2])
        dq, dk, dv = _each_pair(add, (dq, *zeros), kv, origin, terms)
        return dq, (dk, dv)

    dq = jnp.zeros(q_PBKGtH.shape, jnp.float32)
    dq, gradients = _TRAVELS[terms.method](visit, dq, own, terms)
    dq_BTNH = ungrouped(_joined(dq, axis=3) * terms.scale).astype(dtype)
    dk_BTKH, dv_BTKH = (_joined(x, axis=2).transpose(0, 2, 1, 3).astype(dtype) for x in gradients)
    return dq_BTNH, dk_BTKH, dv_BTKH, None


ring_attention.defvjp(_forward, _backward)


def _each_pair(add, state, kv, origin, terms):
    """`add` for each pair of pieces that may see each other; None as `origin` means this device's own keys."""
    length = kv[0].shape[3]
    plain, causal = (Rule(causal, terms.window, terms.softcap) for causal in (False, True))
    last, index = 2 * jax.lax.axis_size(SEQUENCE_AXIS) - 1, jax.lax.axis_index(SEQUENCE_AXIS)

    def one(rule, state, pair):
        if not rule.window or rule.causal:
            return add(state, kv, pair, rule), None
        reached = pair.distance - (length - 1) < rule.window
        return jax.lax.cond(reached, lambda state: add(state, kv, pair, rule), lambda state: state, state), None

    def pairs(queries, keys, distance):
        return Pairs(*(jnp.stack([jnp.asarray(n, jnp.int32) for n in each]) for each in (queries, keys, distance)))

    if not terms.causal:
        every = pairs((0, 0, 1, 1), (0, 1, 0, 1), (0, 0, 0, 0))  # all see all: distances are of no account
        return jax.lax.scan(partial(one, plain), state, every)[0]
    if origin is None:
        state, _ = jax.lax.scan(partial(one, causal), state, pairs((0, 1), (0, 1), (0, 0)))
        both = pairs((1,), (0,), ((last - 2 * index) * length,))
    else:
        half = jnp.where(origin < index, 0, 1)
        distances = ((last - index - origin) * length, abs(index - origin) * length)
        both = pairs((1, half), (0, half), distances)
    return jax.lax.scan(partial(one, plain), state, both)[0]


def runs(devices: int, piece: int, window: int) -> list[tuple[int, int]]:
    """(direction, rounds) of each journey that keys make from device to device so that all who see them meet them."""
    reach = -(-(window - 1) // piece) if window else devices
    if 2 * reach >= devices - 1:
        return [(1, devices - 1)]
    return [(1, reach), (-1, reach)] if reach else []


def _ring(visit: Visit, state: Any, own: Any, terms: Terms) -> tuple[Any, Any]:
    """Keys go from device to device."""
    state, sums = visit(state, own, None)
    for number, journey in enumerate(runs(jax.lax.axis_size(SEQUENCE_AXIS), own[0].shape[3], terms.window)):
        under_way = jax.tree.map(jnp.zeros_like, sums) if number else sums
        state, home = _journey(visit, state, under_way, own, journey, terms.permutes)
        sums = jax.tree.map(jnp.add, sums, home) if number else home
    return state, sums


def _journey(
    visit: Visit, state: Any, sums: Any, own: Any, journey: tuple[int, int], permutes: bool
) -> tuple[Any, Any]:
    """Keys meet the queries of some devices. Beside them goes what those have for their owner, at last home to it."""
    (direction, rounds), index = journey, jax.lax.axis_index(SEQUENCE_AXIS)
    shift = partial(_shift, permutes=permutes)

    def visit_by(state, kv, number):
        return visit(state, kv, (index - direction * number) % jax.lax.axis_size(SEQUENCE_AXIS))

    if rounds == 1:  # what the owner has itself needs no journey
        state, new = visit_by(state, shift(own, direction), 1)
        return state, jax.tree.map(jnp.add, sums, shift(new, -direction))

    def meet(state, kv, sums, number):
        arrived = shift(sums, direction)  # while the visit computes
        state, new = visit_by(state, kv, number)
        return state, jax.tree.map(jnp.add, arrived, new)

    def turn(carry, number):
        state, kv, sums = carry
        following = shift(kv, direction)  # while the visit computes
        state, sums = meet(state, kv, sums, number)
        return (state, following, sums), None

    # A loop, because written out XLA could send all keys on before the first are used, and would hold them all.
    carry = (state, shift(own, direction), sums)
    (state, kv, sums), _ = jax.lax.scan(turn, carry, jnp.arange(1, rounds, dtype=jnp.int32))
    state, sums = meet(state, kv, sums, rounds)
    return state, shift(sums, -direction * rounds)


def _allgather(visit: Visit, state: Any, own: Any, terms: Terms) -> tuple[Any, Any]:
    """All keys come at once; what there is for their owners goes back at once."""
    devices, index = jax.lax.axis_size(SEQUENCE_AXIS), jax.lax.axis_index(SEQUENCE_AXIS)
    everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, SEQUENCE_AXIS), own)
    state, new = visit(state, own, None)
    sums = jax.tree.map(lambda x: jnp.zeros((devices, *x.shape), x.dtype).at[index].set(x), new)

    def turn(carry, back):
        state, sums = carry
        origin = (index - back) % devices
        state, new = visit(state, jax.tree.map(lambda x: _pick(x, origin), everyone), origin)
        return (state, jax.tree.map(lambda all_, x: all_.at[origin].set(x), sums, new)), None

    journeys = runs(devices, own[0].shape[3], terms.window)
    backs = [direction * n for direction, rounds in journeys for n in range(1, rounds + 1)]
    if backs:
        (state, sums), _ = jax.lax.scan(turn, (state, sums), jnp.asarray(backs, jnp.int32))
    return state, jax.tree.map(lambda x: jax.lax.psum_scatter(x, SEQUENCE_AXIS), sums)


_TRAVELS = {"ring": _ring, "allgather": _allgather}


def can_permute(mesh: Mesh | None) -> bool:
    """Whether a permute may stand where this is called. In XLA:CPU all devices of the program meet in a permute, those
    that it does not concern too: in a branch that only one stage of a pipeline takes, it would wait for ever."""
    if mesh is None or mesh.devices.flat[0].platform != "cpu":
        return True
    return STAGE_AXIS not in jax.sharding.get_abstract_mesh().manual_axes or mesh.shape[STAGE_AXIS] == 1


def _shift(arrays: Any, by: int, *, permutes: bool) -> Any:
    """What the device `by` before this one holds."""
    devices = jax.lax.axis_size(SEQUENCE_AXIS)
    if not permutes:
        before = (jax.lax.axis_index(SEQUENCE_AXIS) - by) % devices
        return jax.tree.map(lambda x: _pick(jax.lax.all_gather(x, SEQUENCE_AXIS), before), arrays)
    around = [(n, (n + by) % devices) for n in range(devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, SEQUENCE_AXIS, around), arrays)


def _scaled(q_BTNH, kv_heads, terms):
    return _pieces(grouped(q_BTNH, kv_heads) * jnp.asarray(terms.scale, q_BTNH.dtype), axis=3)


def _own(k_BTKH, v_BTKH, segments_BT):
    """Keys [P, B, K, t, H], values and segments [P, B, t], as they travel."""
    # Segments are the same in every layer: left to itself, JAX's scan over layers would take out of the loop what
    # follows from them alone, the masks of all pairs of pieces [T, T of the whole sequence], and keep them.
    k_BTKH, segments_BT = jax.lax.optimization_barrier((k_BTKH, segments_BT))
    return (*(_pieces(x.transpose(0, 2, 1, 3), axis=2) for x in (k_BTKH, v_BTKH)), _pieces(segments_BT, axis=1))


def _pieces(x: jax.Array, *, axis: int) -> jax.Array:
    """The two halves along `axis`, in front."""
    return jnp.stack(jnp.split(x, 2, axis=axis))


def _joined(x: jax.Array, *, axis: int) -> jax.Array:
    return jnp.concatenate([x[0], x[1]], axis=axis)


def _pick(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
