"""Rematerialisation by name: the same loss and gradients from less memory, and what each policy keeps."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models.build import build
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import rules
from jaxlm.parallel.mesh import from_devices

EVERY_LAYER = ModelConfig(layers=6, embed=32, heads=4, mlp=128, vocabulary=100, dropout=0.1)
PERIODS = dataclasses.replace(EVERY_LAYER, layers=5, windows=(8, 0), gated=True, norm="rms", positions="rotary")
MODELS = {"gpt": EVERY_LAYER, "windows": PERIODS}
POLICIES = ("none", "dots", "selective", "full")
BATCH, LENGTH = 8, 64


def runtime(mesh: str = "dp1", **keys) -> Runtime:
    spec = parse(mesh)
    return Runtime(layout=rules.layout(from_devices(spec, jax.devices()[: spec.device_count])), **keys)


@cache
def compiled(style: str, policy: str, mesh: str = "dp1", dtype: str = "float32"):
    """Loss and gradients as a program, and its parameters."""
    model, how = build(MODELS[style], None), runtime(mesh, remat=policy, dtype=jnp.dtype(dtype))

    def loss(params, batch):
        x = model.hidden(params, batch, how, jax.random.key(1))
        return (x.astype(jnp.float32) ** 3).mean()

    def place(dims, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=how.layout.sharding(dims, leaf.shape))

    abstract = jax.tree.map(place, model.dims, model.abstract, is_leaf=lambda x: isinstance(x, tuple))
    rows = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=how.layout.sharding(("batch", "sequence")))
    batch = dict.fromkeys(("tokens", "segment_ids", "positions", "places"), rows)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    whole = how.layout.sharding(())
    return jax.jit(jax.value_and_grad(loss), out_shardings=(whole, shardings)).lower(abstract, batch).compile()


@cache
def arguments(style: str):
    model = build(MODELS[style], None)
    params = model.init(model.words(seed=0))
    at = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
    tokens = np.random.default_rng(0).integers(0, 100, at.shape).astype(np.int32)
    places = np.arange(at.size, dtype=np.int32).reshape(at.shape)
    return params, {"tokens": tokens, "segment_ids": np.ones_like(at), "positions": at, "places": places}


def temporary(*keys: str) -> int:
    return compiled(*keys).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("style, policies", [("gpt", POLICIES), ("windows", ("none", "full"))])
def test_policies_change_memory_and_nothing_else(style, policies):
    loss, grads = compiled(style, "none")(*arguments(style))
    for policy in policies[1:]:
        other, others = compiled(style, policy)(*arguments(style))
        assert float(other) == pytest.approx(float(loss), rel=1e-6)
        for a, b in zip(jax.tree.leaves(others), jax.tree.leaves(grads), strict=True):
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b) + 1e-12
    memory = [temporary(style, policy) for policy in reversed(policies)]
    assert memory == sorted(memory) and memory[0] < 0.7 * memory[-1], memory


def kept(style: str, policy: str) -> int:
    """Elements that a forward pass leaves for the backward."""
    model, (params, batch) = build(MODELS[style], None), arguments(style)

    def forward(params, batch):
        return jax.vjp(lambda p: model.hidden(p, batch, runtime(remat=policy), jax.random.key(1)), params)[1]

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(forward, params, batch)))


@pytest.mark.parametrize("style", list(MODELS))
def test_what_each_policy_keeps(style):
    sizes = {policy: kept(style, policy) for policy in POLICIES}
    tensor = BATCH * LENGTH * 32 * MODELS[style].layers  # [L, B, T, D]
    # Attention before and after its projection, and the log-sum-exp of each query head; the output of the feed-forward
    # is nowhere needed where no norm follows it.
    expected = 2 * tensor + tensor // 32 * MODELS[style].heads
    assert sizes["selective"] - sizes["full"] == pytest.approx(expected, rel=0.01)  # but for a bias
    assert sizes["selective"] < sizes["dots"] < sizes["none"], sizes


@pytest.mark.parametrize("style, policy", [("gpt", "none"), ("windows", "none"), ("windows", "full")])
def test_gathered_weights_are_made_again(style, policy):
    """Under fsdp each weight is gathered in the forward and in the backward, because it is not kept in between."""
    text = compiled(style, policy, "fsdp8").as_text()
    forward = [line for line in text.splitlines() if " all-gather(" in line and "transpose(" not in line]
    backward = [line for line in text.splitlines() if " all-gather(" in line and "transpose(" in line]
    matrices = (6 if style == "gpt" else 7) * len(MODELS[style].windows or (0,))
    assert len(forward) >= matrices and len(backward) >= matrices, (len(forward), len(backward))


def test_cast_weights_are_made_again():
    """With bfloat16 compute the cast copies of float32 weights, half their bytes, do not stay for the backward."""
    model = build(MODELS["gpt"], None)
    how = runtime(remat="none", dtype=jnp.dtype("bfloat16"))
    params, batch = arguments("gpt")
    batch = jax.tree.map(jnp.asarray, batch)
    _, pull = jax.vjp(lambda p: model.hidden(p, batch, how), params)
    kept = {(leaf.dtype.name, leaf.shape) for leaf in jax.tree.leaves(pull)}
    shapes = {leaf.shape for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim > 2}
    assert ("bfloat16", (6, BATCH, LENGTH, 32)) in kept or ("bfloat16", (6, BATCH * LENGTH, 32)) in kept
    assert not {shape for dtype, shape in kept if dtype == "bfloat16"} & shapes


def test_offload_is_refused_where_host_memory_is_the_devices_own():
    with pytest.raises(UserError, match=r"^remat 'offload': cpu has no host memory apart from its own; use selective"):
        compiled("gpt", "offload")
