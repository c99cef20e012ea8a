"""An encoder-decoder: its attention with a bias and to another sequence, relative positions, packing, the cache.

Legend: B batch, T target length, S source length, N query heads, K kv heads, H head size.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models.attention import attend, choose
from jaxlm.models.build import Model, Params, build
from jaxlm.models.decoder import empty_cache
from jaxlm.models.relative import BUCKETS, FAR, buckets
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import rules
from tests.models.test_attention import packings, positions_of
from tests.train.battery import T5

B, T, S, N, H = 2, 130, 70, 4, 16
VOCABULARY = 40


def runtime(attention: str = "xla") -> Runtime:
    return Runtime(layout=rules.layout(meshes.from_devices(parse("dp1"), jax.devices()[:1])), attention=attention)


def arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def gradients(run, *values: jax.Array):
    """Of a sum that weighs all elements of the output differently."""

    def total(*values: jax.Array) -> jax.Array:
        o = run(*values)
        return (o * jnp.cos(jnp.arange(o.size, dtype=jnp.float32)).reshape(o.shape)).sum()

    return jax.jit(jax.value_and_grad(total, argnums=tuple(range(len(values)))))(*values)


def close(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert float(jnp.linalg.norm(x - y)) <= 1e-5 * float(jnp.linalg.norm(y))


@pytest.mark.parametrize("packing", ["plain", "padded"])
@pytest.mark.parametrize(("causal", "kv_heads", "softcap"), [(True, 4, None), (False, 2, None), (True, 1, 3.0)])
def test_a_bias_of_self_attention(causal: bool, kv_heads: int, softcap: float | None, packing: str) -> None:
    segments = packings(B, T)[packing]
    q, k, v, bias = arrays((B, T, N, H), (B, T, kv_heads, H), (B, T, kv_heads, H), (1, N, T, T))

    def run(backend: str):
        return lambda q, k, v, bias: attend(
            q, k, v, q_segments_BT=jnp.asarray(segments), q_positions_BT=jnp.asarray(positions_of(segments)),
            scale=0.3, causal=causal, softcap=softcap, bias_BNTS=bias, backend=backend,
        )  # fmt: skip

    close(gradients(run("xla"), q, k, v, bias), gradients(run("reference"), q, k, v, bias))
    assert gradients(run("xla"), q, k, v, bias)[0] != gradients(run("xla"), q, k, v, 0 * bias)[0]


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_to_another_sequence(kv_heads: int) -> None:
    """Within the documents that both have; a query whose document the source has none of gives no gradient."""
    q_segments, kv_segments = packings(B, T)["padded"], np.minimum(packings(B, S)["packed"], 3)
    known = jnp.asarray(q_segments <= 3) & jnp.asarray(q_segments > 0)
    assert 0 < known.sum() < known.size
    q, k, v = arrays((B, T, N, H), (B, S, kv_heads, H), (B, S, kv_heads, H))

    def run(backend: str):
        return lambda q, k, v: attend(
            q, k, v, q_segments_BT=jnp.asarray(q_segments), kv_segments_BS=jnp.asarray(kv_segments),
            q_positions_BT=jnp.asarray(positions_of(q_segments)), scale=0.3, causal=False, backend=backend,
        )  # fmt: skip

    def of_known(q, k, v, backend: str):
        return jnp.where(known[..., None, None], run(backend)(q, k, v), 0)

    close(*(gradients(partial(of_known, backend=backend), q, k, v) for backend in ("xla", "reference")))
    _, others = gradients(lambda q, k, v: jnp.where(known[..., None, None], 0, run("xla")(q, k, v)), q, k, v)
    assert not any(gradient.any() for gradient in others)
    with pytest.raises(ValueError, match="without causality"):
        attend(
            q, k, v, q_segments_BT=jnp.asarray(q_segments), kv_segments_BS=jnp.asarray(kv_segments),
            q_positions_BT=jnp.asarray(positions_of(q_segments)), scale=0.3, backend="xla",
        )  # fmt: skip


def test_kernels_without_a_bias_are_not_chosen() -> None:
    keys = {"compute_dtype": "bfloat16", "head_size": 64, "sequence_length": 512, "biased": True}
    for platform, kernel in (("gpu", "cudnn"), ("tpu", "splash")):
        chosen = choose("auto", platform=platform, **keys)
        assert chosen.name == "xla" and "no bias for relative positions" in chosen.reason
        with pytest.raises(UserError, match="no bias for relative positions"):
            choose(kernel, platform=platform, **keys)


@pytest.mark.parametrize("causal", [True, False])
def test_buckets_are_those_of_the_paper(causal: bool) -> None:
    """Exact ones, then ever wider ones: by logarithms in float64, where rounding does not decide."""
    each = BUCKETS if causal else BUCKETS // 2
    distances = np.arange(-300, 301, dtype=np.int32)
    found = buckets(distances, causal=causal)
    for distance, bucket in zip(distances.tolist(), found.tolist(), strict=True):
        away = max(-distance, 0) if causal else abs(distance)
        ahead = 0 if causal or distance <= 0 else each
        if away < each // 2:
            assert bucket == ahead + away
        else:
            place = each // 2 + math.log(away / (each // 2)) / math.log(FAR / (each // 2)) * (each // 2)
            wanted = {min(math.floor(place + nudge), each - 1) for nudge in (-1e-5, 1e-5)}
            assert bucket - ahead in wanted, (distance, place)
    assert len(set(found.tolist())) == (BUCKETS if causal else BUCKETS - 1)


def model_of(**changes: object) -> tuple[Model, Params]:
    config: ModelConfig = dataclasses.replace(T5, vocabulary=VOCABULARY, embed=32, head_size=8, mlp=48, **changes)
    model = build(config, None)
    params = jax.jit(model.init)(model.words(seed=1))
    # Tables that are all alike would hide what they are indexed by.
    return model, jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)


def batch_of(source_segments: np.ndarray, segments: np.ndarray) -> dict[str, jax.Array]:
    rng = np.random.default_rng(3)
    made = {}
    for prefix, of in (("source_", source_segments), ("", segments)):
        made |= {f"{prefix}tokens": rng.integers(0, VOCABULARY, of.shape), f"{prefix}segment_ids": of}
        made |= {f"{prefix}positions": positions_of(of)}
    return {name: jnp.asarray(value, jnp.int32) for name, value in made.items()}


def test_packed_documents_are_computed_as_alone() -> None:
    model, params = model_of()
    source = np.repeat([[1, 2, 3, 0]], [9, 20, 6, 5], axis=1)
    written = np.repeat([[1, 2, 3, 0]], [3, 7, 5, 1], axis=1)
    batch = batch_of(source, written)
    hidden = jax.jit(lambda batch: model.hidden(params, batch, runtime()))
    together = hidden(batch)
    for document in (1, 2, 3):
        own = {name: (source if "source" in name else written)[0] == document for name in batch}
        alone = {name: value[:, own[name]] for name, value in batch.items()}
        alone |= {name: jnp.ones_like(value) for name, value in alone.items() if "segment" in name}
        close(together[:, written[0] == document], hidden(alone))
    other = batch | {"source_tokens": batch["source_tokens"].at[0, 12].add(1) % VOCABULARY}
    changed = jnp.abs(hidden(other) - together).max(axis=(0, 2)) > 0
    assert changed.tolist() == (written[0] == 2).tolist(), "all of one document, and nothing of the others"


@pytest.mark.parametrize("changes", [{}, {"tied": False, "kv_heads": 2, "qk_norm": "head", "norm": "layer"}])
@pytest.mark.parametrize("attention", ["xla", "reference"])
def test_a_cache_gives_what_the_whole_gives(changes: dict, attention: str) -> None:
    model, params = model_of(**changes)
    length = 12
    batch = batch_of(np.repeat([[0, 1], [0, 1]], [4, 20], axis=1), np.ones((2, length), np.int32))
    own = runtime(attention)
    whole = jax.jit(lambda batch: model.logits(params, model.hidden(params, batch, own), own))(batch)
    cache = empty_cache(model.config, batch=2, slots=16, dtype=own.dtype) | model.read_source(params, batch, own)
    decode = jax.jit(lambda part, cache: model.decode(params, part, own, cache))
    for at in range(length):
        part = {name: batch[name][:, at : at + 1] for name in ("tokens", "segment_ids", "positions")}
        x, cache = decode(part, cache)
        np.testing.assert_allclose(model.logits(params, x, own)[:, 0], whole[:, at], atol=2e-5)


def test_rematerialisation_changes_nothing_but_memory() -> None:
    model, params = model_of()
    batch = batch_of(np.ones((2, 64), np.int32), np.ones((2, 64), np.int32))

    def compiled(policy: str):
        own = dataclasses.replace(runtime(), remat=policy)
        run = jax.jit(jax.value_and_grad(lambda params: (model.hidden(params, batch, own) ** 2).sum()))
        return run.lower(params).compile()

    none, full = compiled("none"), compiled("full")
    close(none(params), full(params))
    sizes = [program.memory_analysis().temp_size_in_bytes for program in (none, full)]
    assert sizes[1] < 0.9 * sizes[0], sizes
