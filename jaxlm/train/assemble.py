"""From a configuration and a mesh to all a step needs: model, optimizer, where the state lives, the step itself."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxlm.config import checks
from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig, RunConfig
from jaxlm.models import attention, build
from jaxlm.models.runtime import Runtime, compute_dtype
from jaxlm.parallel import rules
from jaxlm.train import optimizer, stages, state
from jaxlm.train import step as steps


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The parts of a run that know devices, all decided before an array exists."""

    config: RunConfig
    model: build.Model
    runtime: Runtime
    optimizer: optax.GradientTransformationExtraArgs
    plan: state.StatePlan
    step: Callable[[state.State, steps.Batch], tuple[state.State, steps.Metrics]]
    """Not compiled yet: see `compile`."""
    batch: dict[str, jax.ShapeDtypeStruct]

    def lower(self) -> jax.stages.Lowered:
        """The step as it is given to the compiler: all that Python has to do with it."""
        return steps.lower_step(self.step, self.plan, self.batch)

    def compile(
        self, announce: Callable[[str], None] = lambda line: None, lowered: jax.stages.Lowered | None = None
    ) -> jax.stages.Compiled:
        """The step as a program that cannot recompile.

        Args:
            announce: told in one line that options of the compiler are set (`parallel.flags`).
            lowered: what `lower` returned, where it was called already.
        """
        return steps.compile_step(lowered or self.lower(), self.runtime.layout.mesh.devices.flat[0], announce)

    def init(self, params: build.Params | None = None) -> state.State:
        """A fresh state, born sharded, or one that begins with `params`."""
        return state.init(self.model, self.optimizer, self.plan, self.config.train.seed, params)

    def unpiped(self, variant: str) -> Runtime:
        """For a forward pass without a pipeline: as in training, but laid out as `variant` of `parallel.rules`.

        Where the batch has too few rows to give the pipeline's axis some of its own, its devices repeat each other.
        """
        layout = self.runtime.layout
        if layout.mesh.shape["pipeline"] == layout.axis_size("residual") == 1:
            return self.runtime
        other = _layout(self.config, layout.mesh, variant)
        if variant == "forward" and self.config.data.batch_size % other.axis_size("batch"):
            other = _layout(self.config, layout.mesh, "dealt")
        return replace(self.runtime, layout=other)

    def moved(self, params: build.Params, runtime: Runtime) -> build.Params:
        """The parameters as `runtime` lays them out."""
        shardings = jax.tree.map(lambda leaf, dims: runtime.layout.sharding(dims, leaf.shape), params, self.model.dims)
        if shardings == self.plan.shardings["params"]:
            return params
        return jax.jit(lambda params: params, out_shardings=shardings)(params)


def assemble(
    config: RunConfig,
    mesh: Mesh,
    tokenizer_vocabulary: int | None,
    announce: Callable[[str], None] = lambda line: None,
) -> Assembly:
    """Put the parts of a run together.

    Args:
        tokenizer_vocabulary: ids of the data's tokenizer; None in a dry run, where `model.vocabulary` must be set.
        announce: told in one line each choice that was left to us.

    Raises:
        UserError: model, mesh and kernels do not go together.
    """
    device = mesh.devices.flat[0]
    model = build.build(config.model, tokenizer_vocabulary)
    for problem in checks.vocabulary(model.vocabulary, mesh.shape["model"]):
        raise UserError(problem)
    even = (
        checks.pipeline_chunks(config.pipeline.schedule, config.pipeline.chunks) == 1
        and config.model.layers % mesh.shape["pipeline"] == 0
    )
    layout = _layout(config, mesh, "stages" if even else "dealt")
    if not layout.rules["kv_heads"] and mesh.shape["model"] > 1:
        announce(f"{config.model.key_value_heads} kv heads are kept whole on each of tp{mesh.shape['model']}'s devices")
    if "model" in layout.axes("residual"):
        part = config.data.sequence_length // layout.axis_size("residual")
        announce(f"sequence parallelism: norms and residuals of {part} tokens of a sequence a device")
    dtype = compute_dtype(config.precision, device.platform)
    choice = _choose_attention(config, config.model, device, dtype, cut=mesh.shape["context"] > 1)
    if (cuts := mesh.shape["context"]) > 1:
        part = config.data.sequence_length // cuts
        announce(f"context: attention over cp{cuts} by {config.context.method}, {part} tokens of a sequence a device")
    announce(f"attention: {choice.name} ({choice.reason}); compute {dtype}, parameters {config.precision.params}")
    runtime = Runtime(
        layout=layout, attention=choice.name, dtype=dtype, remat=config.remat, context=config.context.method
    )
    if mesh.shape["pipeline"] > 1:
        announce(stages.describe(config, layout))
    rule = optimizer.build(config.optimizer, config.train.steps)
    plan = state.plan(
        model,
        rule,
        layout,
        config.optimizer,
        dtype=jnp.dtype(config.precision.params),
        scaled=dtype == jnp.float16,
    )
    schedule = optimizer.schedule(config.optimizer, config.train.steps)
    return Assembly(
        config=config,
        model=model,
        runtime=runtime,
        optimizer=rule,
        plan=plan,
        step=steps.train_step(model, rule, schedule, config, runtime, plan),
        batch=steps.abstract_batch(config, runtime),
    )


def _layout(config: RunConfig, mesh: Mesh, variant: str) -> rules.Layout:
    asked = config.context.sequence_parallel
    if config.model.architecture == "encoder_decoder":
        asked = "off"
    if asked == "auto":
        # A CPU's simulated devices have one memory and no network: cutting costs and saves nothing.
        fits = config.data.sequence_length % (mesh.shape["context"] * mesh.shape["model"]) == 0
        asked = "on" if fits and mesh.devices.flat[0].platform != "cpu" else "off"
    kv_heads = config.model.key_value_heads
    return rules.layout(mesh, kv_heads=kv_heads, variant=variant, sequence_parallel=asked == "on")


def _choose_attention(
    config: RunConfig, model: ModelConfig, device: jax.Device, dtype: jnp.dtype, *, cut: bool
) -> attention.Choice:
    return attention.choose(
        config.attention,
        platform=device.platform,
        compute_dtype=str(dtype),
        head_size=model.head_width,
        sequence_length=config.data.sequence_length,
        softcap=model.attention_softcap,
        compute_capability=str(device.compute_capability) if device.platform == "gpu" else None,
        context=config.context.method if cut else None,
        biased=model.positions == "relative",
    )
