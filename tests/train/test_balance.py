"""Balancing experts: what a step reports, the loss that evaluation leaves out, and biases that follow the load."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.models.router import Load
from jaxlm.train import balance
from jaxlm.train import step as steps
from tests.train.battery import MOE, MOE_SHARED, batch, build, configuration, place

ROUTED = {"expert_load_max_over_mean", "balance_loss", "dropped_tokens"}


def test_summary_by_hand() -> None:
    loads = Load(
        loss=jnp.array([5.0, 7.0]),
        balance=jnp.array([12.0, 8.0]),
        tokens_E=jnp.array([[4.0, 4.0, 4.0, 4.0], [10.0, 2.0, 2.0, 2.0]]),
        dropped=jnp.array([0.0, 3.0]),
    )
    found = balance.summary(loads, configuration("moe", model__experts=4).model)
    assert {name: float(value) for name, value in found.items()} == {
        "expert_load_max_over_mean": 2.5,  # 10 of a mean of 4
        "balance_loss": 1.25,  # of 8 tokens with 2 experts each: 12 / 8 and 8 / 8
        "dropped_tokens": 3.0,
    }


def test_biases_follow_the_load_of_the_whole_step() -> None:
    """Up for experts with fewer tokens than the mean, down for those with more; of all microbatches together."""
    config = configuration("moe_shared", train__microbatches=4)
    assembly = build(config, "dp2")
    arrays = place(assembly, batch(config, 0))
    state = assembly.init()
    loads = jax.jit(lambda p, b: assembly.model.forward(p, b, assembly.runtime)[1])(state["params"], arrays)
    tokens_LE = np.asarray(loads.tokens_E)
    assert tokens_LE.sum(axis=1) == pytest.approx(2 * np.count_nonzero(batch(config, 0)["segment_ids"]))
    state, metrics = assembly.compile()(state, arrays)
    wanted = MOE_SHARED.balance_rate * np.sign(tokens_LE.mean(axis=1, keepdims=True) - tokens_LE)
    np.testing.assert_allclose(state["params"]["blocks"]["mlp"]["routing_bias"], wanted)
    assert (wanted > 0).any() and (wanted < 0).any()
    uneven = (tokens_LE.max(axis=1) / tokens_LE.mean(axis=1)).max()
    assert float(metrics["expert_load_max_over_mean"]) == pytest.approx(uneven)


def test_a_skipped_step_leaves_biases_alone() -> None:
    config = configuration("moe_shared")
    assembly = build(config, "ep2")
    compiled, arrays, state = assembly.compile(), place(assembly, batch(config, 0)), assembly.init()
    state, _ = compiled(state, arrays)
    held = np.asarray(state["params"]["blocks"]["mlp"]["routing_bias"])
    scale = state["params"]["final_norm"]["scale"]
    state["params"]["final_norm"]["scale"] = jax.device_put(jnp.full_like(scale, jnp.nan), scale.sharding)
    state, metrics = compiled(state, arrays)
    assert int(metrics["skipped_steps"]) == 1
    np.testing.assert_array_equal(state["params"]["blocks"]["mlp"]["routing_bias"], held)
    assert held.any()


@pytest.mark.slow
def test_biases_even_out_the_load() -> None:
    config = configuration("moe_shared", model__balance_rate=0.03, model__balance_loss=0.0)
    assembly = build(config, "dp1")
    compiled, arrays, state = assembly.compile(), place(assembly, batch(config, 0)), assembly.init()
    uneven = []
    for _ in range(20):
        state, metrics = compiled(state, arrays)
        uneven.append(float(metrics["expert_load_max_over_mean"]))
    assert min(uneven[-3:]) - 1 < (uneven[0] - 1) / 2, uneven


def test_only_a_mixture_of_experts_reports_its_load() -> None:
    for style, there in (("gpt", set()), ("moe", ROUTED)):
        assembly = build(configuration(style), "dp1")
        _, metrics = jax.eval_shape(assembly.step, assembly.plan.abstract, assembly.batch)
        assert ROUTED & metrics.keys() == there


def test_routing_adds_to_the_loss_that_is_trained_on_and_not_to_the_one_that_is_reported() -> None:
    config = configuration("moe")
    assembly = build(config, "dp1")
    params, arrays = assembly.init()["params"], place(assembly, batch(config, 0))

    def sums(params, arrays, plain):
        return steps.loss_sums(assembly.model, params, arrays, assembly.runtime, config, plain=plain)

    (trained, count, loads), (plain, *_) = (jax.jit(sums, static_argnums=2)(params, arrays, p) for p in (False, True))
    assert float(trained - plain) == pytest.approx(float(loads.loss.sum()), rel=1e-3)
    assert float(loads.loss.sum() / count) > MOE.balance_loss * MOE.layers, "the balance of a layer is at least 1 or so"
