"""Every attention backend this machine can run, against the definition; the definition, against NumPy in float64."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.models.attention import SAVED_NAME, attend, choose
from jaxlm.models.attention.xla import query_blocks, xla_self_attention

B, T, N, H = 2, 128, 4, 16
SCALE = H**-0.5
AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "model")

FLOAT32_TOLERANCE = 1e-5
# The values, weights, logit gradients and results are each rounded to 8 bits (half a unit: 2**-9) at most twice on the
# way to any output, and roundings do not conspire: four of them at full size bound what they do to a norm.
BFLOAT16_TOLERANCE = 4 * 2.0**-9

KERNELS = ["cudnn"] if jax.default_backend() == "gpu" else ["splash"]


def packings(batch, length):
    """Segment ids [B, T] by name: one document, several, several and padding, padding alone in one row."""
    rng = np.random.default_rng(1)
    plain = np.ones((batch, length), np.int32)
    packed = 1 + np.cumsum(rng.random((batch, length)) < 0.05, axis=1).astype(np.int32)
    padded = np.where(np.arange(length) < length - length // 3, packed, 0)
    empty = padded.copy()
    empty[0] = 0
    return {"plain": plain, "packed": packed, "padded": padded, "empty": empty}


def positions_of(segments):
    """Positions that restart at 0 in each segment."""
    index = np.arange(segments.shape[1])
    starts = np.where(np.diff(segments, axis=1, prepend=-1) != 0, index, 0)
    return (index - np.maximum.accumulate(starts, axis=1)).astype(np.int32)


@cache
def inputs(kv_heads, dtype="float32", length=T):
    """q, k, v and the cotangent of o, already rounded to dtype."""
    rng = np.random.default_rng(kv_heads)
    shapes = [(B, length, N, H), (B, length, kv_heads, H), (B, length, kv_heads, H), (B, length, N, H)]
    return tuple(jnp.asarray(rng.normal(size=shape) * 1.5, dtype) for shape in shapes)


@partial(jax.jit, static_argnames=("backend", "window", "softcap"))
def forward_and_backward(q, k, v, do, segments, positions, *, backend, window, softcap):
    """A window of None is attention that is not causal."""

    def run(q, k, v):
        return attend(
            q, k, v, q_segments_BT=segments, q_positions_BT=positions, scale=SCALE, causal=window is not None,
            window=window or 0, softcap=softcap, backend=backend, interpret=True,
        )  # fmt: skip

    o, vjp = jax.vjp(run, q, k, v)
    return o, *vjp(do)


@cache
def expected(kv_heads, dtype, window, softcap, packing):
    """The reference in float32 on the same (rounded) inputs."""
    segments = packings(B, T)[packing]
    arrays = (x.astype(jnp.float32) for x in inputs(kv_heads, dtype))
    results = forward_and_backward(
        *arrays, segments, positions_of(segments), backend="reference", window=window, softcap=softcap
    )
    return [np.asarray(x) for x in results]


def error(actual, wanted):
    """Norm of the difference over the norm."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)


WINDOWS, DTYPES = (0, 40), ("float32", "bfloat16")
FULL = list(itertools.product(WINDOWS, (4, 2, 1), DTYPES, (None,))) + list(
    itertools.product(WINDOWS, (2,), DTYPES, (5.0,))
)
FULL += [(None, 4, "float32", None), (None, 2, "float32", 5.0), (None, 2, "bfloat16", None), (None, 1, "bfloat16", 5.0)]
CASES = [("xla", *case) for case in FULL]
# The kernels take a moment each to interpret: every pair of settings once, and none that cuDNN refuses.
PAIRS = [case for index, case in enumerate(FULL) if index % 4 in (0, 3)]
CASES += [("splash", *case) for case in PAIRS if "splash" in KERNELS]
CASES += [("cudnn", *case) for case in FULL if "cudnn" in KERNELS and case[2] == "bfloat16" and case[3] is None]


@pytest.mark.parametrize(("backend", "window", "kv_heads", "dtype", "softcap"), CASES)
def test_backend_is_the_reference(backend, window, kv_heads, dtype, softcap):
    tolerance = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    for packing, segments in packings(B, T).items():
        results = forward_and_backward(
            *inputs(kv_heads, dtype), segments, positions_of(segments), backend=backend, window=window, softcap=softcap
        )
        for name, actual, wanted in zip(
            ("o", "dq", "dk", "dv"), results, expected(kv_heads, dtype, window, softcap, packing), strict=True
        ):
            assert actual.dtype == dtype
            assert error(actual, wanted) <= tolerance, (packing, name)


def oracle(q, k, v, do, q_segments, kv_segments, q_positions, kv_positions, scale, window, softcap):
    """o, dq, dk, dv one query at a time, in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    o, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        distance = q_positions[b, t] - kv_positions[b]
        seen = q_segments[b, t] == kv_segments[b]
        if window is not None:
            seen &= (distance >= 0) & (distance < (window or np.inf))
        keys, values = k[b, seen, n // group], v[b, seen, n // group]
        logits, slope = keys @ q[b, t, n] * scale, 1.0
        if softcap:
            squashed = np.tanh(logits / softcap)
            logits, slope = softcap * squashed, 1 - squashed**2
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        o[b, t, n] = weights @ values
        dweights = values @ do[b, t, n]
        dlogits = weights * (dweights - weights @ dweights) * slope * scale
        dq[b, t, n] = dlogits @ keys
        dk[b, seen, n // group] += np.outer(dlogits, q[b, t, n])
        dv[b, seen, n // group] += np.outer(weights, do[b, t, n])
    return o, dq, dk, dv


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (7, 3.0), (None, None)])
def test_reference_is_the_oracle(window, softcap):
    segments = packings(B, 24)["empty"]
    positions = positions_of(segments)
    arrays = inputs(2, length=24)
    results = forward_and_backward(*arrays, segments, positions, backend="reference", window=window, softcap=softcap)
    wanted = oracle(*arrays, segments, segments, positions, positions, SCALE, window, softcap)
    assert max(map(error, results, wanted)) <= FLOAT32_TOLERANCE


@settings(max_examples=8)
@given(st.data())
def test_any_shape_is_the_oracle(data):
    """Odd lengths, blocks that do not divide, any packing, windows longer than the sequence, one kv head or many."""
    length = data.draw(st.sampled_from([1, 2, 65, 200]), "length")
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 2)]), "kv heads and group")
    window = data.draw(st.sampled_from([0, 1, 63, 500]), "window")
    softcap = data.draw(st.sampled_from([None, 2.0]), "softcap")
    cuts = data.draw(st.lists(st.integers(0, length), max_size=4), "document ends")
    segments = np.searchsorted(np.sort(cuts), np.arange(length), side="right").astype(np.int32)[None]
    rng = np.random.default_rng(0)
    shapes = [(1, length, heads, 4) for heads in (kv_heads * group, kv_heads, kv_heads, kv_heads * group)]
    q, k, v, do = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    positions = positions_of(segments)

    @jax.jit
    def run(q, k, v, do):
        o, vjp = jax.vjp(
            lambda q, k, v: xla_self_attention(q, k, v, jnp.asarray(segments), 0.5, window, softcap), q, k, v
        )
        return o, *vjp(do)

    wanted = oracle(q, k, v, do, segments, segments, positions, positions, 0.5, window, softcap)
    for actual, right in zip(run(q, k, v, do), wanted, strict=True):
        assert np.linalg.norm(actual - right) <= FLOAT32_TOLERANCE * max(np.linalg.norm(right), 1.0)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize("window", [0, 5])
def test_cache_in_any_order(backend, window):
    """New tokens against a cache: shuffled slots, unused ones among them, whose contents must not matter."""
    q, k, v, do = (x[:, :24] for x in inputs(2))
    segments = packings(B, 24)["packed"]
    positions = positions_of(segments)
    order = np.random.default_rng(2).permutation(32)
    slots = [
        jnp.asarray(np.concatenate([x, np.full((B, 8, *x.shape[2:]), fill, x.dtype)], axis=1)[:, order])
        for x, fill in ((k, 1e4), (v, 1e4), (segments, 0), (positions, 0))
    ]
    o = attend(
        q[:, -3:], slots[0], slots[1], scale=SCALE, window=window, backend=backend, kv_segments_BS=slots[2],
        kv_positions_BS=slots[3], q_segments_BT=jnp.asarray(segments)[:, -3:],
        q_positions_BT=jnp.asarray(positions)[:, -3:],
    )  # fmt: skip
    wanted = oracle(q, k, v, do, segments, segments, positions, positions, SCALE, window, None)[0][:, -3:]
    assert error(o, wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("backend", ["cudnn", "splash"])
def test_kernels_refuse_a_cache(backend):
    q, k, v, _ = inputs(4)
    ids = jnp.asarray(packings(B, T)["plain"])
    with pytest.raises(UserError, match="--attention=auto"):
        attend(q, k, v, q_segments_BT=ids, q_positions_BT=ids, kv_segments_BS=ids, kv_positions_BS=ids, scale=1.0,
               backend=backend)  # fmt: skip


@pytest.mark.parametrize("length", [1, 63, 64, 100, 129, 512, 1000, 4096])
@pytest.mark.parametrize("window", [0, 1, 100, 5000])
def test_blocks_cover_what_is_seen_and_little_more(length, window):
    blocks = query_blocks(length, window)
    assert [b.first for b in blocks] == [0, *(b.end for b in blocks[:-1])] and blocks[-1].end == length
    assert all(b.key_first <= max(0, b.first - window + 1 if window else 0) and b.key_end == b.end for b in blocks)
    computed = sum((b.end - b.first) * (b.key_end - b.key_first) for b in blocks) / length**2
    if length >= 512:
        assert computed <= 0.5625 + 1e-3
        if window == 100:
            assert computed <= (100 + 64 + length / 8) / length


def residual_bytes(backend):
    q, k, v, _ = inputs(4)
    ids = jnp.ones((B, T), jnp.int32)
    run = partial(attend, q_segments_BT=ids, q_positions_BT=ids, scale=SCALE, backend=backend)
    kept = jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], q, k, v)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_nothing_of_size_t_by_t_is_kept():
    assert residual_bytes("xla") < B * N * T * T * 4 <= residual_bytes("reference")


def test_remat_that_saves_the_output_does_not_run_forward_twice():
    q, k, v, _ = inputs(4)
    ids = jnp.ones((B, T), jnp.int32)

    def matmuls(policy):
        run = partial(attend, q_segments_BT=ids, q_positions_BT=ids, scale=SCALE, backend="xla")
        loss = jax.checkpoint(lambda *x: run(*x).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)).count("dot_general[")

    policies = jax.checkpoint_policies
    blocks = len(query_blocks(T, 0))
    saved, nothing = matmuls(policies.save_only_these_names(SAVED_NAME)), matmuls(policies.nothing_saveable)
    assert saved == nothing - 2 * blocks  # the logits and the weighted sum of each block


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compiled_on(mesh, backend, heads, kv_heads):
    """Forward and backward, and its inputs' shardings: batch over data, heads over model, kv heads if they divide."""
    batch = ("replica", "data", "fsdp")
    spec = {n: PartitionSpec(batch, None, "model" if n % mesh.shape["model"] == 0 else None) for n in (heads, kv_heads)}
    array = {n: jax.ShapeDtypeStruct((8, T, n, H), jnp.float32, sharding=NamedSharding(mesh, spec[n])) for n in spec}
    ids = jax.ShapeDtypeStruct((8, T), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(batch)))

    def step(q, k, v, do, segments, positions):
        def run(q, k, v):
            return attend(q, k, v, q_segments_BT=segments, q_positions_BT=positions, scale=SCALE, backend=backend,
                          mesh=mesh, interpret=True)  # fmt: skip

        o, vjp = jax.vjp(run, q, k, v)
        return o, *vjp(do)

    shapes = (array[heads], array[kv_heads], array[kv_heads], array[heads], ids, ids)
    places = [x.sharding for x in shapes]
    return jax.jit(step, out_shardings=(places[0], *places[:3])).lower(*shapes).compile(), places


def collectives(compiled):
    return re.findall(r"\s(all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text())


@pytest.mark.parametrize(
    ("backend", "heads", "kv_heads", "wanted"),
    [("xla", 4, 4, 0), ("xla", 4, 2, 0), ("xla", 4, 1, 1), ("splash", 4, 2, 0), ("reference", 4, 2, 0)],
)
def test_heads_and_batch_stay_on_their_devices(backend, heads, kv_heads, wanted):
    """No collective on dp4,tp2; one kv head serves both shards, and only its gradient is summed over them."""
    compiled, places = compiled_on(mesh_of(data=4, model=2), backend, heads, kv_heads)
    assert collectives(compiled) == ["all-reduce"] * wanted
    rng = np.random.default_rng(3)
    shapes = [(8, T, n, H) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    segments = packings(8, T)["padded"]
    arrays += [segments, positions_of(segments)]
    results = compiled(*map(jax.device_put, arrays, places))
    alone = forward_and_backward(*arrays, backend="reference", window=0, softcap=None)
    assert max(map(error, results, alone)) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), [(8, 2, 4), (6, 3, 2)])
def test_kv_heads_that_do_not_divide(heads, kv_heads, tp):
    """Replicated kv heads are read where they lie: nothing of the size of the logits moves."""
    compiled, _ = compiled_on(mesh_of(data=8 // tp, model=tp), "xla", heads, kv_heads)
    assert set(collectives(compiled)) <= {"all-reduce", "all-gather"}
    moved = re.findall(r"f32\[([\d,]+)\]\S* all-\w+\(", compiled.as_text())
    assert all(np.prod([int(n) for n in shape.split(",")]) <= 8 * T * heads * H for shape in moved)


CAN = {"compute_dtype": "bfloat16", "head_size": 64, "sequence_length": 1024}


@pytest.mark.parametrize(
    ("platform", "changed", "name"),
    [
        ("cpu", {}, "xla"),
        ("gpu", {}, "cudnn"),
        ("tpu", {}, "splash"),
        ("gpu", {"cached": True}, "xla"),
        ("tpu", {"cached": True}, "xla"),
        ("tpu", {"softcap": 50.0}, "splash"),
        ("gpu", {"head_size": 256, "compute_capability": "9.0"}, "cudnn"),
        ("gpu", {"context": "ulysses"}, "cudnn"),
        ("cpu", {"context": "ring"}, "xla"),
    ],
)
def test_auto_takes_the_fastest(platform, changed, name):
    choice = choose("auto", platform=platform, **CAN | changed)
    assert choice.name == name and choice.reason


@pytest.mark.parametrize(
    ("backend", "platform", "changed", "reason"),
    [
        ("cudnn", "cpu", {}, "NVIDIA GPU, this is cpu"),
        ("cudnn", "gpu", {"compute_dtype": "float32"}, "not float32"),
        ("cudnn", "gpu", {"softcap": 50.0}, "soft cap"),
        ("cudnn", "gpu", {"head_size": 36}, "not 36"),
        ("cudnn", "gpu", {"head_size": 256, "compute_capability": "8.0"}, "up to 128"),
        ("cudnn", "gpu", {"sequence_length": 1023}, "even"),
        ("cudnn", "gpu", {"compute_capability": "7.5"}, "8.0"),
        ("cudnn", "gpu", {"compute_capability": "gfx942"}, "NVIDIA"),
        ("cudnn", "gpu", {"cached": True}, "cache"),
        ("splash", "cpu", {}, "TPU, this is cpu"),
        ("splash", "tpu", {"sequence_length": 200}, "128"),
        ("splash", "tpu", {"cached": True}, "cache"),
        ("splash", "tpu", {"context": "ring"}, "whole sequences"),
        ("cudnn", "gpu", {"context": "allgather"}, "whole sequences"),
    ],
)
def test_the_impossible_is_refused_and_auto_says_why(backend, platform, changed, reason):
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        choose(backend, platform=platform, **CAN | changed)
    assert str(caught.value).endswith("use --attention=auto") and "\n" not in str(caught.value)
    auto = choose("auto", platform=platform, **CAN | changed)
    assert auto.name == "xla" and (platform == "cpu" or reason in auto.reason)


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_the_definition_does_not_run_on_cut_sequences(method):
    with pytest.raises(UserError, match=f"cut .--context.method={method}.*--attention=auto"):
        choose("reference", platform="cpu", context=method, **CAN)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_what_runs_everywhere_can_be_asked_for(backend):
    assert choose(backend, platform="cpu", **CAN) == (backend, "asked for")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("platform", "packages"), [("tpu", ["libtpu"]), ("cuda", ["jax-cuda12-plugin", "nvidia-cudnn-cu12"])]
)
def test_kernels_compile_for_the_real_thing(platform, packages):
    """The platform's own compiler, without its hardware: the kernel is in the program and saves what it promises."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    if missing := set(packages) - installed:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    script = Path(__file__).with_name("attention_aot.py")
    done = subprocess.run([sys.executable, script, platform], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
