"""Gradients through a pipeline: the model cut into stages, for the engine in `parallel.pipeline`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlm.config.checks import pipeline_chunks, pipeline_microbatches
from jaxlm.config.schema import RunConfig
from jaxlm.models.build import Model
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import pipeline
from jaxlm.parallel.rules import Layout, cut_by
from jaxlm.parallel.schedules import Table, build
from jaxlm.parallel.schedules.simulate import simulate
from jaxlm.train import local
from jaxlm.train.loss import token_losses


def table(config: RunConfig, layout: Layout) -> Table:
    """The schedule of a run."""
    sizes = {axis: layout.mesh.shape[axis] for axis in layout.mesh.axis_names}
    microbatches = pipeline_microbatches(
        config.pipeline.microbatches, config.data.batch_size, sizes["pipeline"], layout.axis_size("batch")
    )
    return build(
        config.pipeline.schedule,
        sizes["pipeline"],
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
    key: jax.Array | None,
    share: jax.Array,
    shardings: Any,
) -> tuple[Any, tuple[jax.Array, Load | None]]:
    """Float32 gradients of the loss sum times `share`, placed as `shardings`; the loss sum, and the loads [L, ...] of
    a mixture of experts.

    Args:
        batch: arrays [M, B / M, T].
        key: of dropout.
    """
    layout, plan = runtime.layout, table(config, runtime.layout)
    mesh = layout.mesh
    axes = local.axes(layout)
    manual = frozenset(axes)
    inner = replace(runtime, layout=layout.within(manual))
    numbers = pipeline.layer_numbers(model.config.layers, plan.stages, plan.chunks)
    automatic = frozenset(mesh.axis_names) - manual
    held = jax.tree.map(lambda leaf, dims: layout.spec(dims, leaf.shape), params, model.dims)
    wanted = jax.tree.map(lambda to, spec: pipeline.scattered(spec, to.spec, automatic), shardings, held)

    def by_hand(specs: Any) -> Any:
        return jax.tree.map(lambda spec: cut_by(spec, manual), specs)

    def on_device(params: Any, batch: dict[str, jax.Array], share: jax.Array, key: jax.Array | None):
        (chunks, shared), back = jax.vjp(lambda params: pipeline.cut_weights(params, held, numbers, automatic), params)
        parts = _parts(model, shared | {"blocks": chunks}, inner, config, key, ragged=bool((numbers < 0).any()))
        dchunks, dshared, total, loads = pipeline.gradients(plan, parts, chunks, shared, numbers, batch, share)
        (grads,) = back(jax.tree.map(lambda g, w: g.astype(w.dtype), (dchunks, dshared), (chunks, shared)))
        grads = pipeline.reduce_gradients(grads, held, wanted, [a for a in axes if mesh.shape[a] > 1], automatic)
        loads = pipeline.in_layer_order(loads, numbers, model.config.layers)
        return grads, jax.lax.psum((total, loads), axes)

    rows = cut_by(layout.spec((None, "batch", "sequence")), manual)
    whole = PartitionSpec()
    grads, sums = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(by_hand(held), rows, whole, whole),
        out_specs=(by_hand(wanted), whole),
        axis_names=manual,
        check_vma=False,
    )(params, batch, share, key)
    return jax.lax.with_sharding_constraint(grads, shardings), sums


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
