"""Optimizers against their papers' arithmetic, schedules at their corners, decay where it belongs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.config.schema import OptimizerConfig
from jaxlm.train import optimizer
from tests.train.battery import build, configuration, flat

PARAMS = {
    "tokens": {"embedding": jnp.full((4, 3), 2.0)},
    "positions": {"embedding": jnp.full((4, 3), 2.0)},
    "blocks": {"mlp": {"up": {"kernel": jnp.full((2, 3, 5), 2.0), "bias": jnp.full((2, 5), 2.0)}}},
    "final_norm": {"scale": jnp.full((3,), 2.0)},
}


def rates(steps: int = 100, **keys) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **keys)
    schedule = optimizer.schedule(config, steps)
    return [float(schedule(jnp.int32(step))) for step in range(steps)]


def test_warmup_rises_from_the_first_step_to_the_peak() -> None:
    found = rates(schedule="constant", warmup_steps=4)
    assert found[:6] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("name", "middle", "last"),
    [
        ("linear", 0.1 + 0.9 * 0.5, 0.1),
        ("cosine", 0.1 + 0.9 * 0.5, 0.1),
        ("wsd", 1.0, 0.1),
        ("inverse_sqrt", math.sqrt(10 / 55), math.sqrt(10 / 99)),
        ("constant", 1.0, 1.0),
    ],
)
def test_schedules(name: str, middle: float, last: float) -> None:
    found = rates(schedule=name, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    assert max(found) == pytest.approx(1.0)
    assert found[55] == pytest.approx(middle, abs=1e-6)
    assert found[99] == pytest.approx(last, abs=0.05)
    assert all(a >= b - 1e-6 for a, b in zip(found[10:], found[11:], strict=False)), "never rises after warmup"


def test_wsd_decays_only_over_its_last_part() -> None:
    found = rates(schedule="wsd", warmup_steps=10, decay_fraction=0.2)
    assert found[79] == 1.0 and found[81] < 1.0


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_decay_spares_norms_biases_and_positions(name: str) -> None:
    """With zero gradients all that moves is what decays."""
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5, warmup_steps=0, schedule="constant")
    rule = optimizer.build(config, 10)
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = rule.update(grads, rule.init(PARAMS), PARAMS)
    moved = {name for name, update in flat(updates).items() if np.abs(update).max() > 1e-6}
    assert moved == {"tokens.embedding", "blocks.mlp.up.kernel"}
    np.testing.assert_allclose(flat(updates)["tokens.embedding"], -0.1 * 0.5 * 2.0, rtol=1e-5)


def test_adamw_is_adamw() -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.01, warmup_steps=0, schedule="constant", clip_norm=0.0)
    rule, random = optimizer.build(config, 10), np.random.default_rng(0)
    params = np.full((4, 3), 2.0)
    state = rule.init({"tokens": {"embedding": jnp.asarray(params, jnp.float32)}})
    m, v = np.zeros_like(params), np.zeros_like(params)
    for t in range(1, 4):
        g = random.normal(size=params.shape)
        updates, state = rule.update(
            {"tokens": {"embedding": jnp.asarray(g, jnp.float32)}},
            state,
            {"tokens": {"embedding": jnp.asarray(params, jnp.float32)}},
        )
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.01 * params
        np.testing.assert_allclose(updates["tokens"]["embedding"], -0.1 * step, rtol=2e-5)
        params = params - 0.1 * step


def test_adamw_is_optaxs_to_the_bit() -> None:
    config = OptimizerConfig()
    ours, theirs = optimizer._adam(config), optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    states, random = [ours.init(PARAMS), theirs.init(PARAMS)], np.random.default_rng(0)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            grads = jax.tree.map(lambda p: jnp.asarray(random.normal(size=p.shape), jnp.float32), PARAMS)
            updates, states[0] = ours.update(grads, states[0], keep=True)
            wanted, states[1] = theirs.update(grads, states[1])
            jax.tree.map(np.testing.assert_array_equal, (updates, states[0]), (wanted, states[1]))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_a_step_that_is_not_kept_leaves_the_state(name: str) -> None:
    rule = optimizer.build(OptimizerConfig(name=name, warmup_steps=0), 10)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = rule.update(grads, rule.init(PARAMS), PARAMS)
    bad = jax.tree.map(lambda g: g * jnp.inf, grads)
    _, held = rule.update(bad, state, PARAMS, keep=jnp.bool_(False))
    jax.tree.map(np.testing.assert_array_equal, held, state)
    _, gone_on = rule.update(grads, state, PARAMS, keep=jnp.bool_(True))
    assert not all(map(np.array_equal, jax.tree.leaves(gone_on), jax.tree.leaves(state)))


def test_clipping_bounds_the_global_norm() -> None:
    config = OptimizerConfig(name="sgd", learning_rate=1.0, weight_decay=0.0, warmup_steps=0, schedule="constant")
    rule = optimizer.build(config, 10)
    grads = jax.tree.map(lambda p: jnp.full_like(p, 7.0), PARAMS)
    updates, _ = rule.update(grads, rule.init(PARAMS), PARAMS)
    assert math.sqrt(sum(float((u**2).sum()) for u in flat(updates).values())) == pytest.approx(1.0, rel=1e-5)


def test_adafactor_keeps_rows_and_columns_of_each_layer() -> None:
    """Its state for large matrices is far smaller than Adam's, and layers do not share statistics."""
    sizes = {}
    for name in ("adamw", "adafactor"):
        config = configuration("gpt", name, model__embed=128, model__mlp=512)
        state = build(config, "dp1").plan.abstract["optimizer"]
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes["adafactor"] < sizes["adamw"] / 3
    rule = optimizer.build(OptimizerConfig(name="adafactor", warmup_steps=0, clip_norm=0.0, weight_decay=0.0), 10)
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(2, 128, 160)), jnp.float32)
    both = {"blocks": {"kernel": kernel}}
    scaled = {"blocks": {"kernel": kernel * jnp.asarray([1.0, 1000.0], jnp.float32)[:, None, None]}}
    updates = [rule.update(g, rule.init(both), both)[0]["blocks"]["kernel"] for g in (both, scaled)]
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-4)


def test_adafactor_takes_each_expert_by_itself() -> None:
    """What an expert's update is does not depend on the other experts' gradients."""
    rule = optimizer.build(OptimizerConfig(name="adafactor", warmup_steps=0, clip_norm=0.0, weight_decay=0.0), 10)
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(2, 3, 128, 160)), jnp.float32)
    other = kernel * jnp.asarray([1.0, 1000.0, 1e-3], jnp.float32)[None, :, None, None]
    trees = [{"blocks": {"mlp": {"experts": {"kernel": kernel}}}, "head": kernel[0, 0]} for kernel in (kernel, other)]
    updates = [rule.update(g, rule.init(g), g)[0]["blocks"]["mlp"]["experts"]["kernel"] for g in trees]
    np.testing.assert_allclose(updates[0], updates[1], rtol=1e-4)
    largest = max(leaf.size for leaf in jax.tree.leaves(rule.init(trees[0])))
    assert largest < kernel.size / 100, "more than rows and columns of matrices"


def test_muon_orthogonalises_each_matrix() -> None:
    config = OptimizerConfig(name="muon", learning_rate=1.0, weight_decay=0.0, warmup_steps=0, schedule="constant")
    rule, random = optimizer.build(config, 10), np.random.default_rng(0)
    dense, experts = (jnp.asarray(random.normal(size=s), jnp.float32) for s in ((2, 16, 4, 8), (2, 3, 8, 12)))
    params = {"blocks": {"up": {"kernel": dense}, "mlp": {"experts": {"up": {"kernel": experts}}}}}
    updates, _ = rule.update(params, rule.init(params), params)
    matrices = np.asarray(updates["blocks"]["up"]["kernel"]).reshape(2, 16, 32)
    experts = np.asarray(updates["blocks"]["mlp"]["experts"]["up"]["kernel"]).reshape(6, 8, 12)
    for layer in (*matrices, *experts):
        values = np.linalg.svd(layer, compute_uv=False)
        assert values.max() / values.min() < 2.0, "singular values are not alike"
