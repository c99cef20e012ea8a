"""Cross-entropy in chunks against the plain formula in float64, and what the compiled program holds and moves."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.train import loss
from jaxlm.train.loss import cross_entropy

N, D, V, VOCABULARY = 48, 8, 40, 37
FLOAT32_TOLERANCE = 1e-5
# x and head are given, so only the logits' gradient and the two results are rounded to 8 bits (half a unit: 2**-9).
BFLOAT16_TOLERANCE = 2 * 2.0**-9


def inputs(tokens=N, embed=D, width=V, vocabulary=VOCABULARY, dtype="float32"):
    """x, head [D, V] with padding columns that must not matter, targets, and a mask with zeros and fractions."""
    rng = np.random.default_rng(0)
    head = rng.normal(size=(embed, width))
    head[:, vocabulary:] = 1e3
    return (
        jnp.asarray(rng.normal(size=(tokens, embed)), dtype),
        jnp.asarray(head, dtype),
        jnp.asarray(rng.integers(0, vocabulary, tokens), jnp.int32),
        jnp.asarray(rng.choice([0.0, 0.5, 1.0], tokens), jnp.float32),
    )


def oracle(x, head, targets, mask, *, vocabulary, z_loss=0.0, label_smoothing=0.0, softcap=None):
    """(loss, dx, dhead) in float64, from whole logits."""
    x, head, mask = (np.asarray(a, np.float64) for a in (x, head, mask))
    logits, slope = x @ head[:, :vocabulary], 1.0
    if softcap:
        squashed = np.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1 - squashed**2
    lse = logits.max(1) + np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1))
    wanted = np.full(logits.shape, label_smoothing / vocabulary)
    wanted[np.arange(len(x)), targets] += 1 - label_smoothing
    total = (mask * (lse - (wanted * logits).sum(1) + z_loss * lse**2)).sum()
    d = (np.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None] - wanted) * mask[:, None] * slope
    dhead = np.zeros_like(head)
    dhead[:, :vocabulary] = x.T @ d
    return total, d @ head[:, :vocabulary].T, dhead


@partial(jax.jit, static_argnames=("vocabulary", "chunk", "z_loss", "label_smoothing", "softcap", "tied", "shards",
                                   "token_shards"))  # fmt: skip
def loss_and_gradients(x, head, targets, mask, *, tied, **settings):
    """(loss sum, token count, dx, dhead [D, V]); tied gives the head as [V, D]."""

    def run(x, head):
        return cross_entropy(x, head.T if tied else head, targets, mask, transposed=tied, **settings)

    (total, count), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(x, head)
    return total, count, *grads


def error(actual, wanted):
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(actual - wanted) / np.linalg.norm(wanted)


TERMS = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 3.0},
    {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 3.0},
]
WAYS = [  # (chunk, tied, shards, token shards, blocks of tokens): everything at once, divided evenly, and with a rest
    (0, True, 1, 1, 1),
    (0, False, 2, 3, 2),
    (99, True, 1, 2, 5),
    (8, True, 1, 1, 1),
    (16, False, 2, 2, 1),
    (12, True, 4, 1, 1),
    (7, False, 1, 1, 1),
]


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms) or "plain")
@pytest.mark.parametrize(("chunk", "tied", "shards", "token_shards", "blocks"), WAYS)
def test_loss_and_gradients_are_the_oracle(monkeypatch, terms, chunk, tied, shards, token_shards, blocks):
    monkeypatch.setattr(loss, "_block", lambda x_GLD, _: -(-x_GLD.shape[1] // blocks))
    arrays = inputs()
    total, count, dx, dhead = loss_and_gradients(
        *arrays, vocabulary=VOCABULARY, chunk=chunk, tied=tied, shards=shards, token_shards=token_shards, **terms
    )
    wanted = oracle(*arrays, vocabulary=VOCABULARY, **terms)
    assert total.dtype == count.dtype == jnp.float32 and count == arrays[3].sum()
    assert max(map(error, (total, dx, dhead), wanted)) <= FLOAT32_TOLERANCE
    assert not np.asarray(dhead)[:, VOCABULARY:].any(), "padding has no gradient"
    assert not np.asarray(dx)[np.asarray(arrays[3]) == 0].any(), "masked tokens have no gradient"


@pytest.mark.parametrize(("chunk", "tied", "shards", "token_shards", "blocks"), WAYS)
def test_a_bias_is_one_more_channel_that_is_always_1(monkeypatch, chunk, tied, shards, token_shards, blocks):
    monkeypatch.setattr(loss, "_block", lambda x_GLD, _: -(-x_GLD.shape[1] // blocks))
    x, head, targets, mask = inputs()
    bias = jnp.asarray(np.random.default_rng(1).normal(size=head.shape[1]), jnp.float32)

    @jax.jit
    def run(x, head, bias):
        return cross_entropy(
            *(x, head.T if tied else head, targets, mask, bias),
            **{"vocabulary": VOCABULARY, "chunk": chunk, "transposed": tied, "softcap": 3.0, "label_smoothing": 0.1},
            **{"shards": shards, "token_shards": token_shards},
        )[0]

    total, grads = jax.value_and_grad(run, argnums=(0, 1, 2))(x, head, bias)
    wider = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1), jnp.concatenate([head, bias[None]])
    terms = {"vocabulary": VOCABULARY, "softcap": 3.0, "label_smoothing": 0.1}
    wanted, dx, dhead = oracle(*wider, targets, mask, **terms)
    assert max(map(error, (total, *grads), (wanted, dx[:, :-1], dhead[:-1], dhead[-1]))) <= FLOAT32_TOLERANCE
    assert error(total, oracle(x, head, targets, mask, **terms)[0]) > 1e-3, "it counts"


@pytest.mark.parametrize("chunk", [0, 16])
def test_bfloat16_inputs(chunk):
    arrays = inputs(dtype="bfloat16")
    total, _, dx, dhead = loss_and_gradients(*arrays, vocabulary=VOCABULARY, chunk=chunk, tied=True)
    wanted = oracle(*arrays, vocabulary=VOCABULARY)
    assert dx.dtype == dhead.dtype == jnp.bfloat16
    assert error(total, wanted[0]) <= FLOAT32_TOLERANCE, "logits and their statistics are float32"
    assert max(error(dx, wanted[1]), error(dhead, wanted[2])) <= BFLOAT16_TOLERANCE


@pytest.mark.parametrize("chunk", [0, 16])
def test_no_overflow_and_no_nan(chunk):
    """Logits far beyond float32's exp, and a batch in which nothing counts."""
    x, head, targets, mask = inputs()
    results = loss_and_gradients(x * 1e3, head, targets, mask, vocabulary=VOCABULARY, chunk=chunk, tied=True)
    assert all(np.isfinite(np.asarray(r)).all() for r in results)
    assert error(results[0], oracle(x * 1e3, head, targets, mask, vocabulary=VOCABULARY)[0]) <= FLOAT32_TOLERANCE
    nothing = loss_and_gradients(x, head, targets, mask * 0, vocabulary=VOCABULARY, chunk=chunk, tied=True)
    assert not any(np.asarray(r).any() for r in nothing)


@settings(max_examples=10)
@given(st.data())
def test_any_shape_is_the_oracle(data):
    shards, token_shards = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 3)]))
    width = shards * data.draw(st.integers(1, 12), "columns of a shard")
    tokens = token_shards * data.draw(st.integers(1, 9), "tokens of a shard")
    vocabulary = data.draw(st.integers(1, width), "vocabulary")
    chunk = data.draw(st.integers(0, width + 1), "chunk")
    terms = data.draw(st.sampled_from(TERMS), "terms")
    x, head, targets, _ = arrays = inputs(tokens, 4, width, vocabulary)
    arrays = (x, head, targets, jnp.ones(tokens, jnp.float32))
    results = loss_and_gradients(
        *arrays, vocabulary=vocabulary, chunk=chunk, tied=False, shards=shards, token_shards=token_shards, **terms
    )
    for actual, wanted in zip((results[0], *results[2:]), oracle(*arrays, vocabulary=vocabulary, **terms), strict=True):
        assert np.linalg.norm(actual - wanted) <= FLOAT32_TOLERANCE * max(np.linalg.norm(wanted), 1.0)


def test_smoothing_is_pytorchs():
    torch = pytest.importorskip("torch")
    x, head, targets, mask = inputs(vocabulary=V)
    total, *_ = loss_and_gradients(x, head, targets, mask * 0 + 1, vocabulary=V, label_smoothing=0.1, tied=False)
    logits = torch.tensor(np.asarray(x) @ np.asarray(head))
    entropy = torch.nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")
    assert error(total, entropy(logits, torch.tensor(np.asarray(targets)).long()).item()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(("kwargs"), [{"shards": 3}, {"token_shards": 5}, {"vocabulary": V + 1}, {"vocabulary": 0}])
def test_what_does_not_fit_is_refused(kwargs):
    with pytest.raises(ValueError, match="do not fit"):
        cross_entropy(*inputs(), **{"vocabulary": V} | kwargs)


@pytest.mark.parametrize("chunk", [0, 8])
def test_no_gradient_work_unless_differentiated(chunk):
    x, head, targets, mask = inputs()

    def run(x):
        return cross_entropy(x, head, targets, mask, vocabulary=VOCABULARY, chunk=chunk)[0]

    matmuls = [str(jax.make_jaxpr(f)(x)).count("dot_general[") for f in (run, jax.grad(run))]
    assert matmuls == ([1, 3] if chunk == 0 else [1, 1 + 3]), "logits; dx and dhead, and the logits again if chunked"


BIG = {"tokens": 2048, "embed": 64, "width": 4096}
AXES = ("replica", "pipeline", "data", "fsdp", "expert", "context", "model")


def naive(x, head, targets, mask):
    logits = x @ head.T
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return (mask * (jax.nn.logsumexp(logits, axis=1) - picked)).sum(), mask.sum()


def compiled(function, mesh=None):
    """The loss with gradients, the head tied; on a mesh, tokens over data and vocabulary over model."""
    tokens, embed, width = BIG.values()
    specs = [PartitionSpec("data"), PartitionSpec("model"), PartitionSpec("data"), PartitionSpec("data")]
    shapes = [(tokens, embed), (width, embed), (tokens,), (tokens,)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    places = [None if mesh is None else NamedSharding(mesh, spec) for spec in specs]
    structs = [jax.ShapeDtypeStruct(s, d, sharding=p) for s, d, p in zip(shapes, dtypes, places, strict=True)]
    step = jax.value_and_grad(function, argnums=(0, 1), has_aux=True)
    out = None if mesh is None else ((None, None), tuple(places[:2]))
    return jax.jit(step, out_shardings=out).lower(*structs).compile()


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


def arrays_in(program):
    """Shape of every floating-point array in the program."""
    return {tuple(int(n) for n in shape.split(",")) for shape in re.findall(r"f32\[([\d,]+)\]", program.as_text())}


@pytest.mark.parametrize(("chunk", "fraction"), [(0, 0.5), (512, 0.4)])
def test_logits_never_exist_whole(monkeypatch, chunk, fraction):
    monkeypatch.setattr(loss, "BLOCK_LOGITS", 1 << 19)
    whole = BIG["tokens"] * BIG["width"]
    plain = compiled(naive)
    program = compiled(partial(cross_entropy, vocabulary=BIG["width"] - 5, chunk=chunk, transposed=True))
    assert max(map(np.prod, arrays_in(plain))) >= whole, "the measure sees whole logits"
    assert max(map(np.prod, arrays_in(program))) <= whole / 4
    assert temporary_bytes(program) < fraction * temporary_bytes(plain)
    assert temporary_bytes(program) < whole * 4, "not even one copy"


def collectives(program):
    """(kind, elements of each operand) of every collective."""
    lines = re.findall(r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program.as_text())
    return [
        (kind, [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\[([\d,]*)\]", result)])
        for result, kind in lines
    ]


@pytest.mark.parametrize(("chunk", "blocks"), [(0, 4), (0, 1), (512, 1)])
def test_vocabulary_shards_stay_on_their_devices(monkeypatch, chunk, blocks):
    """On dp4,tp2: sums of statistics, of dx over model once and of dhead over data; neither head nor logits move."""
    monkeypatch.setattr(loss, "_block", lambda x_GLD, _: x_GLD.shape[1] // blocks)
    tokens, embed, width = BIG.values()
    mesh = jax.make_mesh((1, 1, 4, 1, 1, 1, 2), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    kwargs = {"vocabulary": width - 5, "chunk": chunk, "transposed": True}
    program = compiled(partial(cross_entropy, **kwargs, shards=2, token_shards=4), mesh)
    found = collectives(program)
    assert {kind for kind, _ in found} == {"all-reduce"}
    sizes = sorted(itertools.chain.from_iterable(sizes for _, sizes in found), reverse=True)
    columns = chunk // 2 if chunk else width // 2
    dhead, dx, statistics = embed * columns, tokens // 4 * embed, tokens // 4 // blocks
    assert sizes.count(dhead) == 1 and sizes.count(dx) == 1, "each gradient is summed in one place"
    assert all(size <= statistics for size in sizes if size not in (dhead, dx))
    if chunk == 0:
        assert temporary_bytes(program) < 3 * 4 * tokens // 4 // blocks * width // 2 + 4 * 4 * (dhead + dx)

    arrays = inputs(tokens, embed, width, width - 5)
    arrays = (arrays[0], arrays[1].T, *arrays[2:])
    (total, count), grads = program(*map(jax.device_put, arrays, program.input_shardings[0]))
    wanted = jax.jit(jax.value_and_grad(partial(cross_entropy, **kwargs), argnums=(0, 1), has_aux=True))(*arrays)
    assert error(total, wanted[0][0]) <= FLOAT32_TOLERANCE and count == wanted[0][1]
    assert max(map(error, grads, wanted[1])) <= FLOAT32_TOLERANCE
