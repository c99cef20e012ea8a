"""Optimizers as chains of named optax transforms, and learning-rate schedules."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxlm.config.schema import OptimizerConfig

MATRICES = ("kernel", "embedding")
"""Parameter names that weight decay applies to ..."""

TABLES = ("positions", "distances")
"""... but for those under these names: where a token stands is not a matter of size."""


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step (0-based): linear warmup to the peak, then the chosen shape over the rest of `steps`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    rest = max(steps - warmup, 1)
    cooldown = max(round(config.decay_fraction * steps), 1)
    final = config.final_fraction
    after: optax.Schedule = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, peak * final, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=final),
        "wsd": optax.linear_schedule(peak, peak * final, cooldown, transition_begin=max(rest - cooldown, 0)),
        "inverse_sqrt": lambda step: peak * jnp.sqrt(max(warmup, 1) / (step + max(warmup, 1))),
    }[config.schedule]
    if warmup:
        # The first step already learns: warmup counts 1/w, 2/w, ..., 1.
        rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
        after = optax.join_schedules([rise, after], [warmup])

    def rate(step: jax.Array) -> jax.Array:
        with _optax_promotion():
            return jnp.asarray(after(step), jnp.float32)

    return rate


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformationExtraArgs:
    """The update rule: clip, precondition, decay, step.

    Sources: AdamW (Loshchilov and Hutter 2019), Adafactor (Shazeer and Stern 2018, without parameter scaling, so that
    `learning_rate` means what it means for AdamW), Lion (Chen et al. 2023), Muon (Jordan et al. 2024; embeddings,
    output layer, norms and biases go to AdamW), SGD with momentum.

    Its `update` takes `keep` too, a bool scalar: where it is false, the new state is the old one.
    """
    chain = optax.chain(
        _clip(config.clip_norm) if config.clip_norm > 0 else optax.identity(),
        _adam(config) if config.name == "adamw" else _held(_precondition(config)),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        _held(optax.scale_by_learning_rate(schedule(config, steps))),
    )

    def update(updates: Any, state: Any, params: Any = None, *, keep: jax.Array | bool = True) -> tuple[Any, Any]:
        with _optax_promotion():
            return chain.update(updates, state, params, keep=keep)

    return optax.GradientTransformationExtraArgs(chain.init, update)


@contextmanager
def _optax_promotion() -> Iterator[None]:
    """optax mixes its integer counters with floats, which the strict promotion that our tests run under refuses."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def decayed(params: Any) -> Any:
    """True for each parameter that weight decay applies to."""

    def is_matrix(path: tuple, _: Any) -> bool:
        names = [key.key for key in path]
        return names[-1] in MATRICES and not any(name in TABLES for name in names)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _clip(largest: float) -> optax.GradientTransformation:
    """As `optax.clip_by_global_norm`, by one factor: XLA joins a product, unlike a division, to what follows."""

    def clip(updates: Any, _: Any) -> Any:
        factor = jnp.minimum(1.0, largest / optax.tree.norm(updates))
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)


def _adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, held where not `keep`, whose updates are computed from the moments that it hands out.

    Otherwise XLA:CPU computes them once more from the old moments, of which it then keeps copies. On an accelerator one
    kernel computes moments and updates, which a barrier would cut in two.
    """
    beta1, beta2 = config.beta1, config.beta2

    def update(grads: Any, state: Any, params: Any = None, *, keep: jax.Array | bool, **_: Any) -> tuple[Any, Any]:
        tried = optax.ScaleByAdamState(
            count=optax.safe_increment(state.count),
            mu=optax.tree.update_moment(grads, state.mu, beta1, 1),
            nu=optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2),
        )
        new = _where(keep, tried, state)
        new = jax.lax.platform_dependent(new, cpu=jax.lax.optimization_barrier, default=lambda new: new)
        mean = optax.tree.bias_correction(new.mu, beta1, new.count)
        square = optax.tree.bias_correction(new.nu, beta2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + config.epsilon), mean, square), new

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam().init, update)


def _held(rule: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`rule`, whose state stays where not `keep`."""

    def update(updates: Any, state: Any, params: Any = None, *, keep: jax.Array | bool, **_: Any) -> tuple[Any, Any]:
        updates, tried = rule.update(updates, state, params)
        return updates, _where(keep, tried, state)

    return optax.GradientTransformationExtraArgs(rule.init, update)


def _where(keep: jax.Array | bool, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)


def _precondition(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.name == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.name == "sgd":
        return optax.trace(config.beta1)
    if config.name == "adafactor":
        return _by_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)))
    return contrib.muon(
        learning_rate=-1.0,  # the chain scales by the (negated) learning rate
        beta=config.beta1,
        eps=config.epsilon,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=_matrix_dims,
        # Updates of AdamW's size, so that one learning rate serves both parts (Liu et al. 2025).
        consistent_rms=0.2,
    )


def _by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """`rule` with each layer of the stacked blocks, and each expert in it, as arrays of its own: what it factors and
    averages is a matrix."""

    def each(rule: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.GradientTransformation(
            lambda params: jax.vmap(rule.init)(params),
            lambda updates, state, params=None: jax.vmap(rule.update)(updates, state, params),
        )

    rules = {"rest": rule, "layers": each(rule), "experts": each(each(rule))}

    def label(path: tuple, _: Any) -> str:
        names = [key.key for key in path]
        return "experts" if "experts" in names else "layers" if "blocks" in names else "rest"

    def parted(tree: Any) -> optax.GradientTransformationExtraArgs:
        labels = jax.tree_util.tree_map_with_path(label, tree)
        used = set(jax.tree.leaves(labels))
        return optax.partition({name: rule for name, rule in rules.items() if name in used}, labels)

    return optax.GradientTransformation(
        lambda params: parted(params).init(params),
        lambda updates, state, params=None: parted(updates).update(updates, state, params),
    )


def _matrix_dims(params: Any) -> Any:
    """For Muon: which dims of a stacked block kernel are the matrix's rows and columns; None leaves it to AdamW."""

    def dims(path: tuple, leaf: Any) -> contrib.MuonDimensionNumbers | None:
        names = [key.key for key in path]
        if "blocks" not in names or names[-1] != "kernel":
            return None
        stacked = 2 if "experts" in names else 1
        inputs = stacked + (2 if names[-2] == "output" else 1)
        return contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(stacked, inputs)), output_axis=tuple(range(inputs, leaf.ndim))
        )

    return jax.tree_util.tree_map_with_path(dims, params)
