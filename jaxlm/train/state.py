"""The training state: a plain dict of sharded arrays, and where each of them lives."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.schema import OptimizerConfig
from jaxlm.models.build import Model, Params
from jaxlm.parallel import flags
from jaxlm.parallel.rules import Layout, spread

State = dict[str, Any]
"""params, optimizer, step (int32: updates tried), skipped and streak (int32); with float16 compute, loss_scale."""

INITIAL_LOSS_SCALE = 2.0**15


@dataclass(frozen=True, kw_only=True)
class StatePlan:
    """Shape, dtype and sharding of every array of the state, known before any of them exists."""

    abstract: State
    """ShapeDtypeStructs with shardings."""
    gradients: Any
    """Shardings of gradients and their accumulators, as a tree like the parameters."""

    @property
    def shardings(self) -> State:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)


def plan(
    model: Model,
    optimizer: optax.GradientTransformation,
    layout: Layout,
    config: OptimizerConfig,
    *,
    dtype: jnp.dtype,
    scaled: bool,
) -> StatePlan:
    """Decide where the state lives.

    Parameters follow the rules; optimizer state follows its parameter, also split over `data` where `optimizer.shard`
    says so (ZeRO-1), and then gradients and their accumulators too (ZeRO-2).

    Args:
        dtype: of parameters and optimizer state.
        scaled: whether a dynamic loss scale is kept (float16 compute).

    Raises:
        UserError: naming a parameter that its rules cannot shard.
    """
    mesh = layout.mesh
    abstract = jax.eval_shape(lambda params: _fresh(optimizer, params, dtype, scaled), model.abstract)
    names = {path: jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in _leaves(abstract["params"])}
    dims = {path: leaf for path, leaf in _leaves(model.dims, is_leaf=lambda leaf: isinstance(leaf, tuple))}
    param_specs = {path: layout.spec(dims[path], leaf.shape, names[path]) for path, leaf in _leaves(abstract["params"])}
    shapes = {path: leaf.shape for path, leaf in _leaves(abstract["params"])}

    def zero(spec: PartitionSpec, shape: tuple[int, ...], name: str) -> PartitionSpec:
        return spread(spec, shape, mesh, "data", name) if config.shard == "data" else spec

    def of_optimizer(path: tuple, leaf: jax.ShapeDtypeStruct) -> PartitionSpec:
        owner = next((p for p in shapes if path[-len(p) :] == p), None)
        if owner is None:
            return PartitionSpec()
        return zero(_inherit(leaf.shape, shapes[owner], param_specs[owner]), leaf.shape, names[owner])

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        part, rest = path[0].key, path[1:]
        spec = PartitionSpec()
        if part == "params":
            spec = param_specs[rest]
        elif part == "optimizer":
            spec = of_optimizer(rest, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    gradients = jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, zero(param_specs[path], leaf.shape, names[path])), abstract["params"]
    )
    return StatePlan(abstract=jax.tree_util.tree_map_with_path(place, abstract), gradients=gradients)


def init(
    model: Model, optimizer: optax.GradientTransformation, plan: StatePlan, seed: int, params: Params | None = None
) -> State:
    """A fresh state, born sharded: no device ever holds more than its part. The same values on every mesh.

    Args:
        params: those to begin with, laid out as the plan has them, in any dtype; they are given away. None: fresh ones.
    """
    dtype = jax.tree.leaves(plan.abstract["params"])[0].dtype
    scaled = "loss_scale" in plan.abstract
    platform = jax.tree.leaves(plan.shardings)[0].mesh.devices.flat[0].platform
    words = model.words(seed)
    make = jax.jit(
        lambda words, params: _fresh(optimizer, model.init(words) if params is None else params, dtype, scaled),
        out_shardings=plan.shardings,
        donate_argnums=1,
    ).lower(words, params)
    # Options that this compiler lacks are no loss.
    return flags.compile_with(make, flags.initialisation(platform), announce=lambda line: None)(words, params)


def _fresh(optimizer: optax.GradientTransformation, params: Params, dtype: jnp.dtype, scaled: bool) -> State:
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    state: State = {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "streak": jnp.zeros((), jnp.int32),
    }
    if scaled:
        state["loss_scale"] = {"scale": jnp.float32(INITIAL_LOSS_SCALE), "good_steps": jnp.zeros((), jnp.int32)}
    return state


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[tuple, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def _inherit(shape: tuple[int, ...], param: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The spec of optimizer state of `shape` from its parameter's: each dim takes that of the dim it came from.

    Factored statistics (Adafactor) lack some of the parameter's dims; a dim that matches none is not split.
    """
    entries = [*spec, *[None] * (len(param) - len(spec))]
    found, at = [], 0
    for size in shape:
        match = next((i for i in range(at, len(param)) if param[i] == size), None)
        found.append(None if match is None else entries[match])
        at = at if match is None else match + 1
    return PartitionSpec(*found)
