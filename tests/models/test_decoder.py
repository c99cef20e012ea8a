"""The model against an oracle in NumPy float64, written as plainly as the papers: layer by layer, masks explicit.

Legend: B batch, T length, D embed, N query heads, K kv heads, H head size, V vocabulary.
"""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig, PrecisionConfig, padded
from jaxlm.models.build import Model, build
from jaxlm.models.runtime import Runtime, compute_dtype
from jaxlm.parallel import rules
from jaxlm.parallel.mesh import from_devices

TOLERANCE = 2e-5
"""Of float32 hidden states and logits against float64, relative to the norm: a dozen roundings deep, 2**-24 each."""

GPT2 = ModelConfig(layers=2, embed=32, heads=4, mlp=48, vocabulary=61, max_positions=24)
LLAMA3 = ModelConfig(
    layers=2, embed=32, heads=4, kv_heads=2, mlp=48, vocabulary=61, gated=True, activation="silu", norm="rms",
    positions="rotary", rope_theta=50.0, rope_scaling="llama3", rope_factor=8.0, rope_original_length=16,
    biases=(), tied=False,
)  # fmt: skip
MISTRAL = dataclasses.replace(LLAMA3, rope_scaling="none", windows=(5,), head_size=16)
QWEN2 = dataclasses.replace(LLAMA3, rope_scaling="none", biases=("qkv",), tied=True)
QWEN3 = dataclasses.replace(LLAMA3, rope_scaling="none", qk_norm="head")
GEMMA2 = dataclasses.replace(
    LLAMA3, layers=3, rope_scaling="none", windows=(8, 0), norm="rms_offset", norm_placement="sandwich", tied=True,
    embed_scale=True, activation="gelu_tanh", attention_softcap=2.0, logit_softcap=1.5, query_scale=0.3, head_size=16,
)  # fmt: skip
GEMMA3 = dataclasses.replace(
    GEMMA2, layers=5, windows=(6, 6, 0), attention_softcap=None, logit_softcap=None, qk_norm="head", kv_heads=1,
    rope_theta=1000.0, rope_local_theta=20.0, rope_scaling="linear", rope_factor=4.0,
)  # fmt: skip
OLMO2 = dataclasses.replace(
    LLAMA3, rope_scaling="none", kv_heads=None, norm_placement="post", qk_norm="projection", norm_epsilon=1e-3
)
BARE = ModelConfig(
    layers=1, embed=16, heads=2, kv_heads=1, mlp=24, vocabulary=40, positions="none", activation="relu",
    norm_placement="sandwich", windows=(3, 0, 7), biases=("qkv", "output"),
)  # fmt: skip
BERT = dataclasses.replace(
    GPT2, architecture="encoder", norm_placement="sum", token_types=2, activation="gelu", norm_epsilon=1e-12
)
MODERN = dataclasses.replace(LLAMA3, architecture="encoder", rope_scaling="none")
EXACT_GELU = dataclasses.replace(GPT2, activation="gelu", norm="rms", biases=("qkv", "mlp"), layers=3, windows=(4, 0))
FAMILIES = {
    "gpt2": GPT2, "llama3": LLAMA3, "mistral": MISTRAL, "qwen2": QWEN2, "qwen3": QWEN3, "gemma2": GEMMA2,
    "gemma3": GEMMA3, "olmo2": OLMO2, "bare": BARE, "exact-gelu": EXACT_GELU,
    "bert": BERT, "encoder": MODERN,
}  # fmt: skip

LENGTH = 24


def runtime(mesh: str = "dp1", **keys) -> Runtime:
    spec = parse(mesh)
    return Runtime(layout=rules.layout(from_devices(spec, jax.devices()[: spec.device_count])), **keys)


@cache
def model(name: str) -> tuple[Model, dict]:
    """A family's model with random parameters: norms and biases too, which begin at ones and zeros."""
    described = build(FAMILIES[name], None)
    leaves, tree = jax.tree.flatten(described.init(described.words(seed=1)))
    random = np.random.default_rng(2)
    return described, tree.unflatten([np.asarray(x) + 0.1 * random.normal(size=x.shape).astype("f") for x in leaves])


@cache
def computed(name: str) -> tuple:
    """Jitted (hidden states, logits) of a family."""
    described, _ = model(name)

    def run(params, batch):
        x = described.hidden(params, batch, runtime())
        return x, described.logits(params, x, runtime())

    return jax.jit(run)


def packed() -> dict[str, np.ndarray]:
    """Two rows: three documents; a document and padding."""
    segments = np.array([[1] * 9 + [2] * 4 + [3] * 11, [1] * 17 + [0] * 7], np.int32)
    lengths = [[9, 4, 11], [17, 7]]
    positions = np.array([np.concatenate([np.arange(n) for n in row]) for row in lengths], np.int32)
    tokens = np.random.default_rng(3).integers(0, 40, segments.shape).astype(np.int32)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


# --- the oracle


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
}


def norm(x, p, config, kind=None):
    scale = p["scale"] + 1 if config.norm == "rms_offset" else p["scale"]
    if (kind or config.norm) == "layer":
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(centred.var(-1, keepdims=True) + config.norm_epsilon) * scale + p["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale


def inverse_frequencies(config, size, window):
    theta, scaling = config.rope_theta, config.rope_scaling
    if window and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, "none"
    out = []
    for i in range(size // 2):
        frequency = theta ** (-2 * i / size)
        if scaling == "linear":
            frequency /= config.rope_factor
        if scaling == "llama3":  # the branches of Meta's reference code
            wavelength, original = 2 * math.pi / frequency, config.rope_original_length
            if wavelength > original / config.rope_frequencies[0]:
                frequency /= config.rope_factor
            elif wavelength >= original / config.rope_frequencies[1]:
                smooth = original / wavelength - config.rope_frequencies[0]
                smooth /= config.rope_frequencies[1] - config.rope_frequencies[0]
                frequency = (1 - smooth) * frequency / config.rope_factor + smooth * frequency
        out.append(frequency)
    return np.array(out)


def rotate(x_NH, position, frequencies):
    """Each pair of channels as a complex number, turned by its angle."""
    half = x_NH.shape[-1] // 2
    turned = (x_NH[:, :half] + 1j * x_NH[:, half:]) * np.exp(1j * position * frequencies)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def affine(x, p, dims):
    y = np.tensordot(x, p["kernel"], axes=dims)
    return y + p["bias"] if p.get("bias") is not None else y


def attention(x_TD, p, config, window, positions, segments):
    size = config.head_size or config.embed // config.heads
    q, k, v = (affine(x_TD, p[name], 1) for name in ("query", "key", "value"))
    if config.qk_norm == "head":
        q, k = norm(q, p["query_norm"], config, "rms"), norm(k, p["key_norm"], config, "rms")
    if config.qk_norm == "projection":
        q = norm(q.reshape(len(q), -1), p["query_norm"], config, "rms").reshape(q.shape)
        k = norm(k.reshape(len(k), -1), p["key_norm"], config, "rms").reshape(k.shape)
    if config.positions == "rotary":
        frequencies = inverse_frequencies(config, size, window)
        q = np.stack([rotate(row, at, frequencies) for row, at in zip(q, positions, strict=True)])
        k = np.stack([rotate(row, at, frequencies) for row, at in zip(k, positions, strict=True)])
    out = np.zeros_like(q)
    for n in range(config.heads):
        kv = n // (config.heads // k.shape[1])
        for t in range(len(q)):
            seen = [
                s
                for s in range(t + 1 if config.architecture == "decoder" else len(q))
                if segments[s] == segments[t] and (window == 0 or positions[t] - positions[s] < window)
            ]
            logits = k[seen, kv] @ q[t, n] * (config.query_scale or size**-0.5)
            if config.attention_softcap:
                logits = config.attention_softcap * np.tanh(logits / config.attention_softcap)
            weights = np.exp(logits - logits.max())
            out[t, n] = weights / weights.sum() @ v[seen, kv]
    return affine(out, p["output"], 2)


def feed_forward(x, p, config):
    activation = ACTIVATIONS[config.activation]
    if config.gated:
        return affine(activation(affine(x, p["gate"], 1)) * affine(x, p["up"], 1), p["down"], 1)
    return affine(activation(affine(x, p["up"], 1)), p["down"], 1)


def oracle(params, config, tokens, positions, segments):
    """Hidden states [T, D] and logits [T, V] of one row."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = params["tokens"]["embedding"][tokens]
    if config.embed_scale:
        x = x * math.sqrt(config.embed)
    if config.positions == "learned":
        x = x + params["positions"]["embedding"][positions]
    if config.token_types:
        x = x + params["types"]["embedding"][0]
    of_sum = config.norm_placement == "sum"
    x = norm(x, params["embed_norm"], config) if of_sum else x
    before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement in ("post", "sandwich")
    for i in range(config.layers):
        p = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        window = config.windows[i % len(config.windows)] if config.windows else 0
        h = norm(x, p["attention_norm"], config) if before else x
        h = attention(h, p["attention"], config, window, positions, segments)
        x = x + (norm(h, p["attention_post_norm"], config) if after else h)
        x = norm(x, p["attention_sum_norm"], config) if of_sum else x
        h = norm(x, p["mlp_norm"], config) if before else x
        h = feed_forward(h, p["mlp"], config)
        x = x + (norm(h, p["mlp_post_norm"], config) if after else h)
        x = norm(x, p["mlp_sum_norm"], config) if of_sum else x
    hidden = x = x if of_sum else norm(x, params["final_norm"], config)
    if config.architecture == "encoder":
        x = ACTIVATIONS[config.activation](affine(x, params["transform"]["dense"], 1))
        x = norm(x, params["transform"]["norm"], config)
    head = params["tokens"]["embedding"].T if config.tied else params["head"]["kernel"]
    logits = x @ head[:, : config.vocabulary]
    if config.architecture == "encoder":
        logits = logits + params["output_bias"][: config.vocabulary]
    if config.logit_softcap:
        logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
    return hidden, logits


def error(found, wanted) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


# --- the tests


@pytest.mark.parametrize("name", FAMILIES)
def test_family_computes_what_its_paper_says(name):
    described, params = model(name)
    batch = packed()
    hidden, logits = computed(name)(params, batch)
    assert logits.shape == (2, LENGTH, FAMILIES[name].vocabulary) and logits.dtype == jnp.float32
    rows = zip(batch["tokens"], batch["positions"], batch["segment_ids"], strict=True)
    wanted = [oracle(params, FAMILIES[name], *row) for row in rows]
    assert error(hidden, np.stack([x for x, _ in wanted])) < TOLERANCE
    assert error(logits, np.stack([x for _, x in wanted])) < TOLERANCE


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("llama3", "rope_scaling", "none"),
        ("mistral", "windows", (6,)),
        ("gemma2", "windows", (0, 8)),
        ("gemma2", "attention_softcap", None),
        ("gemma2", "logit_softcap", None),
        ("gemma2", "query_scale", None),
        ("gemma2", "norm", "rms"),
        ("gemma2", "embed_scale", False),
        ("gemma2", "activation", "gelu"),
        ("gemma3", "rope_local_theta", None),
        ("gemma3", "rope_factor", 2.0),
        ("gemma3", "windows", (6, 0, 6)),
        ("olmo2", "norm_epsilon", 1e-5),
        ("bare", "windows", (4, 0, 7)),
        ("bert", "architecture", "decoder"),
        ("bert", "token_types", 0),
        ("encoder", "architecture", "decoder"),
    ],
)
def test_the_oracle_sees_every_key(name, key, value):
    """The comparison above could not pass with this key ignored: the oracle without it is far away."""
    _, params = model(name)
    row = [packed()[key][0] for key in ("tokens", "positions", "segment_ids")]
    config = FAMILIES[name]
    changed = oracle(params, dataclasses.replace(config, **{key: value}), *row)
    kept = oracle(params, config, *row)
    assert max(error(changed[i], kept[i]) for i in (0, 1)) > 5 * TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_packed_documents_equal_each_alone(name):
    _, params = model(name)
    batch = packed()
    together, _ = computed(name)(params, batch)
    for row, start, stop in [(0, 0, 9), (0, 9, 13), (0, 13, 24), (1, 0, 17)]:
        size = stop - start
        alone = {key: np.zeros((2, LENGTH), np.int32) for key in batch}
        alone["tokens"][:, :size] = batch["tokens"][row, start:stop]
        alone["tokens"][:, size:] = 7
        alone["segment_ids"][:, :size] = 1
        alone["positions"][:] = np.arange(LENGTH)
        found, _ = computed(name)(params, alone)
        np.testing.assert_allclose(found[0, :size], together[row, start:stop], rtol=1e-5, atol=1e-5)


def test_a_later_token_and_another_document_change_nothing():
    _, params = model("llama3")
    batch = packed()
    before, _ = computed("llama3")(params, batch)
    other = packed()  # not the arrays that may still be read
    other["tokens"][0, 7] = 39 - other["tokens"][0, 7]
    after, _ = computed("llama3")(params, other)
    same = np.all(np.asarray(before) == np.asarray(after), axis=-1)
    assert same[0, :7].all() and same[0, 9:].all() and same[1].all()
    assert not same[0, 7:9].any()


def test_an_encoder_sees_all_of_a_document_and_nothing_of_another():
    _, params = model("bert")
    batch = packed()
    before = np.asarray(computed("bert")(params, batch)[0])  # waited for: the batch may be read where it lies
    batch["tokens"][0, 7] = 39 - batch["tokens"][0, 7]
    same = np.all(before == np.asarray(computed("bert")(params, batch)[0]), axis=-1)
    assert not same[0, :9].any() and same[0, 9:].all() and same[1].all()


def test_tokens_are_of_the_first_type_unless_they_are_said_to_be():
    _, params = model("bert")
    batch, runs = packed(), {}
    for name, types in (("none", None), ("first", 0), ("second", 1)):
        given = batch if types is None else batch | {"types": np.full((2, LENGTH), types, np.int32)}
        runs[name] = np.asarray(computed("bert")(params, given)[0])
    np.testing.assert_allclose(runs["none"], runs["first"], rtol=1e-6, atol=1e-6)
    assert error(runs["second"], runs["first"]) > 1e-2


# --- parameters


def names(tree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_is_described_once(name):
    described, _ = model(name)
    shapes, dims = names(described.abstract), names(described.dims)
    config = FAMILIES[name]
    assert list(shapes) == list(dims)
    for key, leaf in shapes.items():
        assert len(leaf.shape) == len(dims[key]), key
        assert leaf.dtype == jnp.float32
        assert (dims[key][0] == "layers") == key.startswith("blocks.")
        if key.startswith("blocks."):
            assert leaf.shape[0] == config.layers
    assert shapes["tokens.embedding"].shape == (128, config.embed)  # padded
    assert ("head.kernel" in shapes) == (not config.tied)
    assert ("positions.embedding" in shapes) == (config.positions == "learned")
    assert ("blocks.mlp.gate.kernel" in shapes) == config.gated
    assert ("blocks.attention.query.bias" in shapes) == ("qkv" in config.biases)
    assert ("blocks.attention.output.bias" in shapes) == ("output" in config.biases)
    assert ("blocks.mlp.down.bias" in shapes) == ("mlp" in config.biases)
    assert ("blocks.attention_norm.scale" in shapes) == (config.norm_placement in ("pre", "sandwich"))
    assert ("blocks.attention_post_norm.scale" in shapes) == (config.norm_placement in ("post", "sandwich"))
    of_sum = config.norm_placement == "sum"
    assert ("blocks.mlp_sum_norm.scale" in shapes) == ("embed_norm.scale" in shapes) == of_sum
    assert ("final_norm.scale" in shapes) == (not of_sum)
    assert ("final_norm.bias" in shapes) == (config.norm == "layer" and not of_sum)
    encoder = config.architecture == "encoder"
    assert ("transform.dense.kernel" in shapes) == ("output_bias" in shapes) == encoder
    assert not encoder or (shapes["output_bias"].shape, dims["output_bias"]) == ((128,), ("vocab",))


@pytest.mark.parametrize("size, rows", [(1, 128), (128, 128), (129, 256), (50257, 50304)])
def test_vocabulary_is_padded(size, rows):
    assert padded(size) == rows
    described = build(dataclasses.replace(GPT2, vocabulary=size), None)
    assert described.abstract["tokens"]["embedding"].shape[0] == rows


def test_vocabulary_comes_from_the_tokenizer_and_must_hold_it():
    unset = dataclasses.replace(GPT2, vocabulary=None)
    assert build(unset, 300).vocabulary == 300
    assert build(GPT2, 50).vocabulary == 61
    with pytest.raises(UserError, match="model.vocabulary 61 is smaller than the tokenizer's 62"):
        build(GPT2, 62)
    with pytest.raises(UserError, match="set --model.vocabulary"):
        build(unset, None)


def test_layers_start_different_and_residual_outputs_small():
    deep = dataclasses.replace(GPT2, layers=8)
    model = build(deep, None)
    params = model.init(model.words(seed=0))
    kernels = np.asarray(params["blocks"]["mlp"]["down"]["kernel"])
    assert all(not np.array_equal(kernels[0], kernel) for kernel in kernels[1:])
    cut = 0.8796  # deviation of a unit normal that is cut at 2
    assert np.std(kernels) == pytest.approx(cut * 48**-0.5 / 4, rel=0.05)  # 4: the root of 2 x 8 layers
    assert np.std(params["blocks"]["mlp"]["up"]["kernel"]) == pytest.approx(cut * 32**-0.5, rel=0.05)


# --- dtypes


@pytest.mark.parametrize("params_dtype", ["float32", "bfloat16"])
def test_compute_in_bfloat16_leaves_gradients_in_the_dtype_of_parameters(params_dtype):
    described, params = model("qwen3")
    params = jax.tree.map(lambda x: jnp.asarray(x, params_dtype), params)
    half = runtime(dtype=jnp.dtype("bfloat16"))

    def loss(params, batch):
        x = described.hidden(params, batch, half)
        return (described.logits(params, x, half) ** 2).mean(), x

    grads, x = jax.jit(jax.grad(loss, has_aux=True))(params, packed())
    assert x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(params_dtype)}
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
    exact, _ = computed("qwen3")(params if params_dtype == "float32" else jax.tree.map(np.float32, params), packed())
    assert 1e-4 < error(x, np.asarray(exact, np.float64)) < 0.03  # rounded, and only that


@pytest.mark.parametrize(
    "asked, platform, given",
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float16", "gpu", "float16"),
    ],
)
def test_compute_dtype_by_policy(asked, platform, given):
    assert compute_dtype(PrecisionConfig(compute=asked), platform) == jnp.dtype(given)


# --- dropout


def dropped(mesh: str, key: jax.Array | None, **keys) -> np.ndarray:
    config = dataclasses.replace(GPT2, dropout=0.25, **keys)
    described = build(config, None)
    how = runtime(mesh)
    params = jax.tree.map(jnp.asarray, model("gpt2")[1])
    batch = {name: np.repeat(value, 4, axis=0) for name, value in packed().items()}
    batch["places"] = np.arange(batch["tokens"].size, dtype=np.int32).reshape(batch["tokens"].shape)
    batch = {k: jax.device_put(v, how.layout.sharding(("batch", "sequence"))) for k, v in batch.items()}
    return np.asarray(jax.jit(lambda p, b: described.hidden(p, b, how, key))(params, batch))


def test_dropout_is_off_without_a_key_and_the_same_on_any_mesh():
    off, on, other = (dropped("dp1", key) for key in (None, jax.random.key(0), jax.random.key(1)))
    plain, _ = computed("gpt2")(model("gpt2")[1], packed())
    np.testing.assert_allclose(off[0], plain[0], rtol=1e-5, atol=1e-5)
    assert error(on, off) > 0.1 and error(other, on) > 0.1
    np.testing.assert_allclose(dropped("dp4,tp2", jax.random.key(0)), on, rtol=1e-4, atol=1e-5)
