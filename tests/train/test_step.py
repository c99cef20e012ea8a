"""The step: token-exact accumulation, skipped steps, loss scaling, dtypes, where memory goes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.schema import PrecisionConfig
from jaxlm.train import step as steps
from tests.train.battery import Result, batch, build, configuration, flat, leaf_bytes, measure, place, relative


@pytest.fixture(scope="module")
def whole() -> Result:
    return measure(configuration("gpt"), "dp1")


@pytest.mark.parametrize("microbatches", [2, 4, 16])
def test_accumulation_is_token_exact_under_uneven_masks(microbatches: int, whole: Result) -> None:
    """Row 0 counts every token, the last row one in twenty: a mean of means would be far off."""
    config = configuration("gpt", train__microbatches=microbatches)
    counts = batch(config, 0)["loss_mask"].sum(axis=1)
    assert counts.max() > 4 * counts.min()
    found = measure(config, "dp1")
    assert max(relative(found.gradients[name], g) for name, g in whole.gradients.items()) < 1e-5


def test_a_mean_of_means_would_be_caught(whole: Result) -> None:
    """The batch is uneven enough for the test above to fail on the usual mistake."""
    config = configuration("gpt", data__batch_size=8)
    assembly, full = build(config, "dp1"), batch(configuration("gpt"), 0)
    params = assembly.init()["params"]

    def gradients(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        arguments = {"runtime": assembly.runtime, "config": config, "shardings": assembly.plan.gradients}
        fn = jax.jit(lambda params, batch: steps.gradients(assembly.model, params, batch, **arguments)[0])
        return flat(fn(params, place(assembly, part)))

    parts = [gradients({name: a[half::2] for name, a in full.items()}) for half in (0, 1)]
    rows = [gradients({name: np.roll(a, 0)[half : half + 8] for name, a in full.items()}) for half in (0, 8)]
    for halves in (parts, rows):
        mean = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
        assert max(relative(mean[name], g) for name, g in whole.gradients.items()) > 1e-3


def poisoned(config, assembly):
    """A state whose final norm makes the loss not finite."""
    state = assembly.init()
    state["params"]["final_norm"]["scale"] = jnp.full_like(state["params"]["final_norm"]["scale"], jnp.nan)
    return state


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters() -> None:
    config = configuration("gpt")
    assembly = build(config, "dp4,tp2")
    compiled, arrays = assembly.compile(), place(build(config, "dp4,tp2"), batch(config, 0))
    before = flat(poisoned(config, assembly))
    state, metrics = compiled(poisoned(config, assembly), arrays)
    after = flat(state)
    assert not np.isfinite(float(metrics["loss"]))
    for name, value in before.items():
        if name.split(".")[0] in ("params", "optimizer"):
            np.testing.assert_array_equal(after[name], value, err_msg=name)
    assert (after["step"], after["skipped"], after["streak"]) == (1, 1, 1)
    state, metrics = compiled(state, arrays)
    assert (int(metrics["skipped_steps"]), int(metrics["streak"])) == (2, 2)
    state["params"] = assembly.init()["params"]
    state, metrics = compiled(state, arrays)
    assert (int(metrics["skipped_steps"]), int(metrics["streak"])) == (2, 0)
    assert float(metrics["learning_rate"]) == pytest.approx(3e-4), "a skipped step does not count in the schedule"


def test_float16_scales_the_loss_halves_on_overflow_and_learns() -> None:
    config = configuration("gpt", precision=PrecisionConfig(compute="float16"))
    assembly = build(config, "dp2")
    compiled, arrays = assembly.compile(), place(assembly, batch(config, 0))
    state = assembly.init()
    state["loss_scale"]["scale"] = jnp.asarray(2.0**40, jnp.float32, device=state["loss_scale"]["scale"].sharding)
    state, metrics = compiled(state, arrays)
    assert float(state["loss_scale"]["scale"]) == 2.0**39 and int(metrics["skipped_steps"]) == 1
    state = assembly.init()
    losses = []
    for _ in range(4):
        state, metrics = compiled(state, arrays)
        losses.append(float(metrics["loss"]))
    assert int(metrics["skipped_steps"]) == 0 and losses[-1] < losses[0] - 0.005
    exact = measure(configuration("gpt"), "dp1")
    assert losses[0] == pytest.approx(exact.losses[0], rel=2e-3)


def test_bfloat16_computes_in_bfloat16_and_updates_in_float32() -> None:
    config = configuration("gpt", precision=PrecisionConfig(compute="bfloat16"))
    assembly = build(config, "dp2")
    traced = jax.jit(assembly.step).trace(assembly.plan.abstract, assembly.batch)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()  # CPU lacks some products, which are float32 there
    assert "dot_general" in text
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert all("bf16" in line for line in dots), "a matmul ran in another dtype"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(assembly.plan.abstract["params"])} == {"float32"}


def test_zero_shards_optimizer_state_and_accumulators_over_data() -> None:
    plain = build(configuration("gpt"), "dp8")
    zero = build(configuration("gpt", optimizer__shard="data"), "dp8")
    held = [leaf_bytes(assembly.init()["optimizer"]) for assembly in (plain, zero)]
    assert held[1] < held[0] / 7, "optimizer state is not an eighth"
    parameters = [leaf_bytes(assembly.init()["params"]) for assembly in (plain, zero)]
    assert parameters[0] == parameters[1]
    sharded = [
        sum(
            np.prod(s.shard_shape(leaf.shape))
            for s, leaf in zip(
                jax.tree.leaves(a.plan.gradients), jax.tree.leaves(a.plan.abstract["params"]), strict=True
            )
        )
        for a in (plain, zero)
    ]
    assert sharded[1] < sharded[0] / 7, "gradients are not an eighth"


def test_fsdp_shards_everything() -> None:
    whole, cut = (leaf_bytes(build(configuration("gpt"), mesh).init()) for mesh in ("dp1", "fsdp8"))
    assert cut < whole / 7


def test_zero_accumulators_take_less_memory_in_the_compiled_step() -> None:
    config = configuration("gpt", model__embed=256, model__mlp=1024, data__batch_size=32, train__microbatches=4)
    plain, zero = (
        build(dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, shard=shard)), "dp8")
        for shard in ("none", "data")
    )
    temporaries = [assembly.compile().memory_analysis().temp_size_in_bytes for assembly in (plain, zero)]
    parameters = leaf_bytes(plain.init()["params"])
    assert temporaries[1] < temporaries[0] - parameters / 2


def test_nothing_large_is_copied_or_turned_around() -> None:
    """Optimizer moments are written where they lay, and the logits of a shard stay as the matmul made them."""
    assembly = build(configuration("gpt", model__vocabulary=640), "dp2,tp2")
    text = assembly.compile().as_text()
    entry = text[text.index("ENTRY") :]
    copies = [list(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", entry)]
    assert max(map(math.prod, copies), default=0) <= 128, "the largest arrays that are copied: biases, at the most"
    tokens, columns = 16 * 32 // 2, assembly.model.padded_vocabulary // 2
    assert f"f32[{tokens},{columns}]" in text, "a device's logits"
    assert f"f32[{columns},{tokens}]" not in text


def test_the_same_model_is_born_on_every_mesh() -> None:
    wanted = flat(build(configuration("llama"), "dp1").init()["params"])
    for mesh in ("fsdp8", "dp2,fsdp2,tp2"):
        found = flat(build(configuration("llama"), mesh).init()["params"])
        for name, value in wanted.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{mesh} {name}")


def test_another_shape_is_refused_rather_than_compiled_anew() -> None:
    config = configuration("gpt")
    assembly = build(config, "dp1")
    compiled = assembly.compile()
    short = {name: value[:, :16] for name, value in batch(config, 0).items()}
    with pytest.raises(TypeError):
        compiled(assembly.init(), {name: jnp.asarray(value) for name, value in short.items()})
