"""Gradients through a pipeline: the model cut into stages, for the engine in `parallel.pipeline`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.config.checks import pipeline_chunks, pipeline_microbatches
from jaxlm.config.schema import RunConfig
from jaxlm.models.build import Model
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import pipeline
from jaxlm.parallel.rules import Layout
from jaxlm.parallel.schedules import Table, build
from jaxlm.parallel.schedules.simulate import simulate
from jaxlm.train import local
from jaxlm.train.loss import token_losses


def table(config: RunConfig, layout: Layout) -> Table:
    """The schedule of a run."""
    stages = layout.mesh.shape["pipeline"]
    rows = math.prod(layout.mesh.shape[axis] for axis in layout.rules["batch"])  # also those that are manual
    microbatches = pipeline_microbatches(config.pipeline.microbatches, config.data.batch_size, stages, rows)
    return build(
        config.pipeline.schedule,
        stages,
        microbatches,
        pipeline_chunks(config.pipeline.schedule, config.pipeline.chunks),
    )


def describe(config: RunConfig, layout: Layout) -> str:
    """The schedule of a run, in a line."""
    plan = table(config, layout)
    chunks = f", {plan.chunks} chunks a stage" if plan.chunks > 1 else ""
    return (
        f"pipeline: {plan.name}, {plan.stages} stages{chunks}, {plan.microbatches} microbatches in {plan.ticks} ticks, "
        f"bubble {simulate(plan).bubble:.0%}, room for {plan.activation_slots} stage inputs"
    )


def gradients(
    model: Model,
    config: RunConfig,
    params: Any,
    batch: dict[str, jax.Array],
    runtime: Runtime,
    *,
    cut: local.Cut,
    key: jax.Array | None,
    share: jax.Array,
) -> tuple[Any, tuple[jax.Array, Load | None]]:
    """Of a device's rows: gradients of the loss sum times `share`, reduced; the loss sum, and the loads [L, ...] of a
    mixture of experts.

    Args:
        key: of dropout.
    """
    plan = table(config, runtime.layout)
    numbers = pipeline.layer_numbers(model.config.layers, plan.stages, plan.chunks)
    weights, back = jax.vjp(lambda params: pipeline.cut_weights(params, cut.held, numbers, cut.automatic), params)
    chunks, shared = weights
    parts = _parts(model, shared | {"blocks": chunks}, runtime, config, key, ragged=bool((numbers < 0).any()))
    batch = local.microbatches(batch, plan.microbatches)
    *grads, total, loads = pipeline.gradients(plan, parts, chunks, shared, numbers, batch, share)
    (own,) = back(jax.tree.map(lambda g, w: g.astype(w.dtype), tuple(grads), weights))
    return cut.reduce(own), (total, pipeline.in_layer_order(loads, numbers, model.config.layers))


def _parts(
    model: Model, whole: Any, runtime: Runtime, config: RunConfig, key: jax.Array | None, *, ragged: bool
) -> pipeline.Parts:
    """The engine's view of `model`; of each part's weights, those of other parts are taken from `whole`, unused."""

    def chunk(blocks, numbers, x, batch):
        params = whole | {"blocks": blocks}
        y, loads = model.chunk(params, numbers, x, batch, runtime, ragged=ragged, key=key)
        return (y, jnp.zeros((), jnp.float32) if loads is None else loads.loss.sum()), loads

    def first(shared, batch):
        return model.embed(whole | shared, batch, runtime, key)

    def last(shared, y, batch):
        params = whole | shared
        return token_losses(model, params, model.finish(params, y, runtime), batch, runtime, config)[0]

    def pin(x):
        return runtime.layout.constrain(x, *[None] * (x.ndim - 3), "batch", "residual", None)

    return pipeline.Parts(first=first, chunk=chunk, last=last, pin=pin)
