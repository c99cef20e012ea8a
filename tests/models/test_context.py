"""Attention over a sequence that is cut over devices, by every method, against the definition on one device."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.mesh_spec import parse
from jaxlm.models.attention import SAVED_NAME, attend, rectangle
from jaxlm.models.attention.reference import reference_attention, visible
from jaxlm.models.attention.ring import runs
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.collectives import collectives
from jaxlm.parallel.zigzag import order
from tests.models.test_attention import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE, error, packings, positions_of
from tests.spread import spread

B, T, N, H = 2, 96, 8, 8
SCALE = H**-0.5
METHODS = ("ring", "allgather", "ulysses")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that pieces as short as these go through several blocks, and one that is smaller."""
    monkeypatch.setattr(rectangle, "SMALLEST_BLOCK", 10)
    monkeypatch.setattr(rectangle, "BLOCK_LOGITS", 1)


@cache
def inputs(kv_heads, dtype, length=T):
    rng = np.random.default_rng(kv_heads)
    shapes = [(B, length, heads, H) for heads in (N, kv_heads, kv_heads, N)]
    return tuple(jnp.asarray(rng.normal(size=shape) * 1.5, dtype) for shape in shapes)


def forward_and_backward(q, k, v, do, segments, positions, *, window, softcap, **how):
    """A window of None is attention that is not causal."""

    def run(q, k, v):
        return attend(
            q, k, v, q_segments_BT=segments, q_positions_BT=positions, scale=SCALE, causal=window is not None,
            window=window or 0, softcap=softcap, **how,
        )  # fmt: skip

    o, vjp = jax.vjp(run, q, k, v)
    return o, *vjp(do)


@cache
def expected(kv_heads, dtype, window, softcap, packing):
    segments = packings(B, T)[packing]
    arrays = (x.astype(jnp.float32) for x in inputs(kv_heads, dtype))
    run = jax.jit(partial(forward_and_backward, window=window, softcap=softcap, backend="reference"))
    return [np.asarray(x) for x in run(*arrays, segments, positions_of(segments))]


def sharded_program(mesh, method, kv_heads, dtype="float32", window=0, softcap=None, length=T, backend="xla"):
    """Forward and backward, compiled for a sequence that lies cut on its devices; and where its arguments lie."""
    rows, tp = ("data", "fsdp"), mesh.shape["model"]
    heads = {n: PartitionSpec(rows, "context", "model" if n % tp == 0 else None) for n in (N, kv_heads)}
    specs = [heads[N], heads[kv_heads], heads[kv_heads], heads[N], *[PartitionSpec(rows, "context")] * 2]
    places = [NamedSharding(mesh, spec) for spec in specs]
    shapes = [(B, length, n, H) for n in (N, kv_heads, kv_heads, N)] + [(B, length)] * 2
    dtypes = [dtype] * 4 + ["int32"] * 2
    arguments = [
        jax.ShapeDtypeStruct(*given, sharding=place) for *given, place in zip(shapes, dtypes, places, strict=True)
    ]
    run = partial(
        forward_and_backward, window=window, softcap=softcap, backend=backend, mesh=mesh, context=method, interpret=True
    )
    outs = (places[0], places[0], places[1], places[2])
    return jax.jit(run, out_shardings=outs).lower(*arguments).compile(), places


def check(mesh, method, kv_heads, window, softcap, dtype="float32"):
    program, places = sharded_program(mesh, method, kv_heads, dtype, window, softcap)
    places_T = np.arange(T) if method == "ulysses" else order(T, mesh.shape["context"])
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    for packing, segments in packings(B, T).items():
        arrays = (*inputs(kv_heads, dtype), segments, positions_of(segments))
        placed = [jax.device_put(np.asarray(x)[:, places_T], place) for x, place in zip(arrays, places, strict=True)]
        wanted = expected(kv_heads, dtype, window, softcap, packing)
        for name, actual, right in zip(("o", "dq", "dk", "dv"), program(*placed), wanted, strict=True):
            assert actual.dtype == dtype
            assert error(actual, right[:, places_T]) <= tolerance, (packing, name)


MESHES = ("cp2", "cp4", "cp8", "cp2,tp2", "dp2,cp2,tp2", "fsdp2,cp4")


def mesh_named(name):
    spec = parse(name)
    return meshes.from_devices(spec, jax.devices()[: spec.device_count])


RULES = ((0, None), (5, None), (40, 5.0), (None, None))
DEFAULT = [
    ("ring", "cp2", (0, None), 8),
    ("ring", "cp4", (5, None), 2),
    ("ring", "cp8", (40, 5.0), 1),
    ("ring", "dp2,cp2,tp2", (0, None), 1),
    ("allgather", "cp4", (0, None), 2),
    ("allgather", "fsdp2,cp4", (5, None), 8),
    ("ulysses", "cp4", (40, 5.0), 2),
    ("ulysses", "dp2,cp2,tp2", (0, None), 1),
    ("ring", "cp4", (None, None), 2),
    ("allgather", "dp2,cp2,tp2", (None, 5.0), 8),
    ("ulysses", "cp2", (None, None), 2),
]


@pytest.mark.parametrize(("method", "mesh", "rule", "kv_heads"), DEFAULT)
def test_every_method_is_the_reference(method, mesh, rule, kv_heads):
    check(mesh_named(mesh), method, kv_heads, *rule)


@pytest.mark.parametrize(
    ("method", "mesh", "rule", "kv_heads"), spread(METHODS, MESHES, RULES, (8, 2, 1), besides=DEFAULT)
)
def test_every_method_on_every_mesh_is_the_reference(method, mesh, rule, kv_heads):
    check(mesh_named(mesh), method, kv_heads, *rule)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16(method):
    check(mesh_named("cp2"), method, 2, 0, None, dtype="bfloat16")


@pytest.mark.parametrize("method", ["ring", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
@pytest.mark.parametrize("mesh", ["pp2,cp2,tp2", pytest.param("pp2,dp2,cp2", marks=pytest.mark.slow)])
def test_in_a_branch_that_one_stage_takes_at_a_time(method, mesh):
    """Within a shard_map that left only tp automatic, as a pipeline runs it: no stage waits for another."""
    mesh, window = mesh_named(mesh), 40

    def stage(q, k, v, do, segments):
        def run():
            how = {"backend": "xla", "mesh": mesh, "context": method}
            return forward_and_backward(q, k, v, do, segments, segments, window=window, softcap=None, **how)

        def tick(outs, number):
            return jax.lax.cond(number == jax.lax.axis_index("pipeline"), run, lambda: outs), None

        outs = tuple(jnp.zeros_like(x) for x in (q, q, k, v))
        return jax.lax.scan(tick, outs, jnp.arange(2, dtype=jnp.int32))[0]

    manual, spec = frozenset(mesh.axis_names) - {"model"}, PartitionSpec("data", "context")
    run = jax.shard_map(stage, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=manual, check_vma=False)
    places_T = np.arange(T) if method == "ulysses" else order(T, mesh.shape["context"])
    arrays = [np.asarray(x)[:, places_T] for x in (*inputs(2, "float32"), packings(B, T)["packed"])]
    wanted = expected(2, "float32", window, None, "packed")
    for actual, right in zip(jax.jit(run)(*arrays), wanted, strict=True):
        assert error(actual, right[:, places_T]) <= FLOAT32_TOLERANCE


def test_a_fused_kernel_may_compute_what_ulysses_exchanged():
    length = 128
    q, k, v, do = inputs(2, "float32", length)
    segments = packings(B, length)["padded"]
    arrays = (q, k, v, do, segments, positions_of(segments))
    program, places = sharded_program(mesh_named("cp2"), "ulysses", 2, length=length, backend="splash", window=40)
    found = program(*map(jax.device_put, arrays, places))
    wanted = jax.jit(partial(forward_and_backward, window=40, softcap=None, backend="reference"))(*arrays)
    assert max(map(error, found, wanted)) <= FLOAT32_TOLERANCE


def traffic(method, window=0):
    """Kind -> bytes on cp4 of attention with 4 kv heads, forward and backward."""
    mesh = mesh_named("cp4")
    found = collectives(sharded_program(mesh, method, 4, window=window)[0].as_text(), mesh)
    assert {row.axes for row in found} <= {"cp"}
    return {row.kind: row.bytes for row in found}


KEYS_BYTES = B * (T // 4) * 4 * H * 4
"""Keys of one device on cp4 with 4 kv heads."""
SEGMENTS_BYTES = B * (T // 4) * 4


def test_keys_go_around_the_ring_and_are_never_gathered():
    """Forward and backward three times each (XLA may see that the first time is the same), their gradients four."""
    bytes_by_kind = traffic("ring")
    assert set(bytes_by_kind) == {"collective-permute"}
    most_bytes = 2 * 3 * (2 * KEYS_BYTES + SEGMENTS_BYTES) + 4 * 2 * KEYS_BYTES
    assert most_bytes - 2 * KEYS_BYTES - SEGMENTS_BYTES <= bytes_by_kind["collective-permute"] <= most_bytes


def test_of_two_devices_only_the_gradients_of_the_other_travel():
    """Keys and values forward (XLA sees that the backward's are the same), their gradients home."""
    mesh = mesh_named("cp2")
    (row,) = collectives(sharded_program(mesh, "ring", 4)[0].as_text(), mesh)
    assert (row.kind, row.bytes) == ("collective-permute", 2 * (2 * 2 * KEYS_BYTES + SEGMENTS_BYTES))


def test_a_window_shortens_the_journey():
    """One that reaches back one piece needs the neighbours alone, one that reaches no further than a token no one."""
    around, near = traffic("ring")["collective-permute"], traffic("ring", window=12)["collective-permute"]
    assert near <= around * 2 / 3
    assert not traffic("ring", window=1)


def test_what_the_other_methods_send():
    """Segments, which are small, are gathered by both."""
    assert set(traffic("allgather")) == {"all-gather", "reduce-scatter"}
    ulysses = traffic("ulysses")
    assert set(ulysses) == {"all-to-all", "all-gather"}
    assert ulysses["all-gather"] == 4 * SEGMENTS_BYTES
    heads_bytes = KEYS_BYTES * N // 4
    assert ulysses["all-to-all"] == 2 * (2 * heads_bytes + 2 * KEYS_BYTES)  # q, o, k, v, and their gradients


def test_memory_of_a_device_stays_as_length_and_devices_grow_alike():
    """Around the ring; keys that are gathered need room for all of them."""

    def temporary_bytes(method, mesh, length):
        program, _ = sharded_program(mesh_named(mesh), method, 8, length=length)
        return program.memory_analysis().temp_size_in_bytes

    small, large = (temporary_bytes("ring", *shape) for shape in (("cp4", 1024), ("cp8", 2048)))
    assert 0 < large <= 1.01 * small
    more_bytes = 2 * B * 1024 * 8 * H * 4
    small, large = (temporary_bytes("allgather", *shape) for shape in (("cp4", 1024), ("cp8", 2048)))
    assert large >= small + more_bytes


def test_a_saved_output_does_not_go_around_again():
    mesh = mesh_named("cp2")

    def permutes(policy):
        def loss(q, k, v, segments):
            run = partial(
                attend, q_segments_BT=segments, q_positions_BT=segments, scale=SCALE, backend="xla", mesh=mesh
            )
            return run(q, k, v).sum()

        grad = jax.grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
        return str(jax.make_jaxpr(grad)(*inputs(8, "float32")[:3], jnp.ones((B, T), jnp.int32))).count("ppermute[")

    policies = jax.checkpoint_policies
    saved, nothing = permutes(policies.save_only_these_names(SAVED_NAME)), permutes(policies.nothing_saveable)
    assert 0 < saved < nothing


@pytest.mark.parametrize("devices", [2, 3, 8])
@pytest.mark.parametrize("piece", [1, 4])
def test_keys_travel_just_as_far_as_they_are_seen(devices, piece):
    """Every device that sees a key through the window meets it, and no journey is longer than the farthest of them."""
    tokens = order(2 * devices * piece, devices).reshape(devices, -1)
    for window in range(2 * devices * piece + 2):
        met = {direction * n for direction, rounds in runs(devices, piece, window) for n in range(1, rounds + 1)}
        back = tokens[:, None, :, None] - tokens[None, :, None, :]
        sees = ((back >= 0) & (back < (window or np.inf))).any(axis=(2, 3))
        needed = {(i - j) % devices for i, j in zip(*np.nonzero(sees), strict=True)} - {0}
        assert {n % devices for n in met} == needed, window
        assert len(met) == len(needed), window


@pytest.mark.parametrize(
    ("queries", "keys", "cut", "first", "window", "softcap"),
    [(30, 40, 17, 10, 0, None), (23, 40, 1, 50, 7, None), (10, 12, 6, 2, 100, 2.0), (1, 2, 1, 1, 1, None)],
)
def test_parts_of_a_softmax_add_up(queries, keys, cut, first, window, softcap):
    """Some queries to keys cut in two: forward merged, backward added, equal attention to all of them."""
    rng = np.random.default_rng(0)
    shapes = [(1, 2, 3, queries, 4), (1, 2, keys, 4), (1, 2, keys, 4), (1, 2, 3, queries, 4)]
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    segments = [jnp.asarray(rng.integers(1, 3, (1, n)), jnp.int32) for n in (queries, keys)]
    at = [jnp.arange(n, dtype=jnp.int32)[None] for n in (queries, keys)]
    seen_BTS = visible(*segments, at[0] + first, at[1], window)
    seeing = seen_BTS.any(axis=2)[:, None, None, :, None]  # a query that sees nothing has no output to speak of
    do = jnp.where(seeing, do, 0.0)

    def whole(q, k, v):
        batch, kv_heads, group, length, head = q.shape
        q, k, v = q.reshape(batch, -1, length, head).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)
        o = reference_attention(q, k, v, seen_BTS, scale=1.0, softcap=softcap)
        return o.swapaxes(1, 2).reshape(batch, kv_heads, group, length, head)

    def in_parts(q, k, v, do):
        rule, cuts = rectangle.Rule(True, window, softcap), (slice(0, cut), slice(cut, keys))
        parts = [(q, k[:, :, c], v[:, :, c], segments[0], segments[1][:, c], first - c.start, rule) for c in cuts]
        o, lse = rectangle.merge(*rectangle.forward(*parts[0]), *rectangle.forward(*parts[1]))
        of_output = (do, lse, (o * do).sum(axis=-1, keepdims=True))
        dq, dk, dv = zip(*(rectangle.backward(*part, *of_output) for part in parts), strict=True)
        return jnp.where(seeing, o, 0.0), dq[0] + dq[1], jnp.concatenate(dk, axis=2), jnp.concatenate(dv, axis=2)

    def wanted(q, k, v, do):
        o, vjp = jax.vjp(whole, q, k, v)
        return jnp.where(seeing, o, 0.0), *vjp(do)

    for found, right in zip(jax.jit(in_parts)(q, k, v, do), jax.jit(wanted)(q, k, v, do), strict=True):
        assert np.abs(np.asarray(found) - np.asarray(right)).max() < 1e-5
