"""The train step: (state, batch) -> (state, metrics), one pure function compiled once.

Legend: B batch, T length, D embed, V vocabulary, M microbatches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.schema import RunConfig
from jaxlm.data.spans import target_length
from jaxlm.models.build import Model
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import flags, keys
from jaxlm.train import balance, local, stages
from jaxlm.train.loss import token_losses
from jaxlm.train.state import State, StatePlan

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

BATCH_DTYPES = {
    "tokens": "int32",
    "targets": "int32",
    "segment_ids": "int32",
    "positions": "int32",
    "loss_mask": "float32",
}
"""The arrays of a batch, [B, T] each; `data.loader` makes them."""

SOURCE_DTYPES = {"source_tokens": "int32", "source_segment_ids": "int32", "source_positions": "int32"}
"""And those of what an encoder-decoder reads, [B, S] each."""

SCALE_GROWTH_STEPS = 1000
"""Finite steps after which a dynamic loss scale doubles."""


def abstract_batch(config: RunConfig, runtime: Runtime) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of each array of a batch."""
    sharding = runtime.layout.sharding(("batch", "sequence"))
    rows, length = config.data.batch_size, config.data.sequence_length

    def arrays(dtypes: dict[str, str], length: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {k: jax.ShapeDtypeStruct((rows, length), jnp.dtype(d), sharding=sharding) for k, d in dtypes.items()}

    if config.objective != "spans":
        return arrays(BATCH_DTYPES, length)
    return arrays(BATCH_DTYPES, target_length(length, config.data.noise)) | arrays(SOURCE_DTYPES, length)


def loss_sums(
    model: Model,
    params: Any,
    batch: Batch,
    runtime: Runtime,
    config: RunConfig,
    *,
    key: jax.Array | None = None,
    plain: bool = False,
) -> tuple[jax.Array, jax.Array, Load | None]:
    """The loss summed over the counted tokens, their number (float32 scalars), and the loads of a mixture of experts.

    Args:
        key: of dropout; None in evaluation.
        plain: cross-entropy alone, without z-loss, label smoothing and what routing adds (what evaluation reports).
    """
    x_BTD, loads = model.forward(params, batch, runtime, key)
    total, count = token_losses(model, params, x_BTD, batch, runtime, config, plain=plain)
    return total if plain or loads is None else total + loads.loss.sum(), count, loads


def gradients(
    model: Model,
    params: Any,
    batch: Batch,
    runtime: Runtime,
    config: RunConfig,
    *,
    key: jax.Array | None = None,
    scale: jax.Array | None = None,
    shardings: Any,
) -> tuple[Any, jax.Array, jax.Array, Load | None]:
    """Gradients of the mean loss (each token counted once, however the batch is cut), the loss sum, the token count and
    the loads of a mixture of experts.

    `shardings` say where they go; with microbatches they are accumulated in float32. `scale` multiplies the loss
    of the backward pass and is divided out again: what float16 needs to keep small gradients.
    """
    count = batch["loss_mask"].sum()
    share = (1.0 if scale is None else scale) / jnp.maximum(count, 1.0)
    run = stages.gradients if runtime.layout.mesh.shape["pipeline"] > 1 else _accumulated
    grads, sums = local.summed(
        partial(run, model, config),
        params,
        batch,
        runtime,
        dims=model.dims,
        shardings=shardings,
        key=key,
        share=share,
    )
    if scale is not None:
        grads = jax.tree.map(lambda g: g / scale.astype(g.dtype), grads)
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), sums[0], count, sums[1]


def _accumulated(
    model: Model,
    config: RunConfig,
    params: Any,
    batch: Batch,
    runtime: Runtime,
    *,
    cut: local.Cut,
    key: jax.Array | None,
    share: jax.Array,
) -> tuple[Any, tuple[jax.Array, Load | None]]:
    """Of a device's rows, one microbatch after the other: gradients of the loss sum times `share`, reduced; the loss
    sum, and the loads. ZeRO-2 reduces those of each microbatch, because what it keeps of them is less."""
    parts = config.train.microbatches
    at_once = parts == 1 or config.optimizer.shard == "data"

    def scaled_loss(params: Any, part: Batch) -> tuple[jax.Array, tuple[jax.Array, Load | None]]:
        total, _, loads = loss_sums(model, params, part, runtime, config, key=key)
        return total * share, (total, loads)

    def one(part: Batch) -> tuple[Any, tuple[jax.Array, Load | None]]:
        grads, sums = jax.grad(scaled_loss, has_aux=True)(params, part)
        return cut.reduce(grads) if at_once else grads, sums

    if parts == 1:
        return one(batch)
    batch = local.microbatches(batch, parts)

    def accumulate(sums: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, one(part)), None

    kept = jax.eval_shape(cut.reduce, params) if at_once else params
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), kept)
    start = (zeros, (jnp.float32(0), Load.none(model.config, model.config.layers)))
    grads, sums = jax.lax.scan(accumulate, start, batch)[0]
    return grads if at_once else cut.reduce(grads), sums


def train_step(
    model: Model,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    config: RunConfig,
    runtime: Runtime,
    plan: StatePlan,
    *,
    keep_gradients: bool = False,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The pure step. A step whose loss or gradient is not finite changes nothing but the counters.

    With `keep_gradients` the metrics hold the gradients too: for proofs, at the price of their memory.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        params, scale = state["params"], state.get("loss_scale", {}).get("scale")
        key = None
        if model.config.dropout:
            key = jax.random.fold_in(keys.key(config.train.seed + 1), state["step"])
            batch = batch | _places(batch, runtime)
        batch = runtime.arrange(batch)
        grads, total, count, loads = gradients(
            model, params, batch, runtime, config, key=key, scale=scale, shardings=plan.gradients
        )
        norm = optax.tree.norm(grads)
        loss = total / jnp.maximum(count, 1.0)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], params, keep=finite)
        tried = optax.apply_updates(params, updates)
        if loads is not None and model.config.balance_rate:
            tried = balance.rebalanced(tried, loads, model.config.balance_rate)
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), tried, params)
        new = {"params": kept, "optimizer": optimizer_state}
        bad = jnp.where(finite, 0, 1)
        new["step"] = state["step"] + 1
        new["skipped"] = state["skipped"] + bad
        new["streak"] = (state["streak"] + 1) * bad
        if "loss_scale" in state:
            new["loss_scale"] = _next_scale(state["loss_scale"], finite)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state["step"] - state["skipped"]),
            "tokens": count,
            "skipped_steps": new["skipped"],
            "streak": new["streak"],
        }
        if loads is not None:
            metrics |= balance.summary(loads, model.config)
        if keep_gradients:
            metrics["gradients"] = grads
        return new, metrics

    return step


def _places(batch: Batch, runtime: Runtime) -> Batch:
    """The number of each token in the batch, and in its source where it has one."""
    made = {}
    for of, name in (("tokens", "places"), ("source_tokens", "source_places")):
        if of in batch:
            places = jnp.arange(batch[of].size, dtype=jnp.int32).reshape(batch[of].shape)
            made[name] = runtime.layout.constrain(places, "batch", "sequence")
    return made


def _next_scale(scale: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
    """Halve on overflow; double after a run of finite steps (Micikevicius et al. 2018)."""
    grown = scale["good_steps"] + 1 >= SCALE_GROWTH_STEPS
    up = jnp.where(grown, jnp.minimum(scale["scale"] * 2, 2.0**24), scale["scale"])
    return {
        "scale": jnp.where(finite, up, jnp.maximum(scale["scale"] / 2, 1.0)),
        "good_steps": jnp.where(finite & ~grown, scale["good_steps"] + 1, 0),
    }


def lower_step(
    step: Callable[[State, Batch], tuple[State, Metrics]], plan: StatePlan, batch: dict[str, jax.ShapeDtypeStruct]
) -> jax.stages.Lowered:
    """The step for the compiler, donating the state. Its program cannot recompile: other shapes are an error."""
    mesh = jax.tree.leaves(plan.abstract)[0].sharding.mesh
    out_shardings = (plan.shardings, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings).lower(plan.abstract, batch)


def compile_step(
    lowered: jax.stages.Lowered, device: jax.Device, announce: Callable[[str], None]
) -> jax.stages.Compiled:
    """Compile it for devices like this one, with the options of `parallel.flags`, and say in one line if any are."""
    options = flags.options(device.platform, device.device_kind)
    if options:
        announce(f"{len(options)} compiler options hide communication behind computation (--explain lists them)")
    return flags.compile_with(lowered, options, announce)


def eval_step(
    model: Model, config: RunConfig, runtime: Runtime
) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(params, batch, byte_lengths [V]) -> summed cross-entropy in nats, counted tokens, bytes of their text."""

    def step(params: Any, batch: Batch, byte_lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch = runtime.arrange(batch)
        total, count, _ = loss_sums(model, params, batch, runtime, config, plain=True)
        size = (byte_lengths[batch["targets"]].astype(jnp.float32) * batch["loss_mask"]).sum()
        return total, count, size

    return jax.jit(step)
