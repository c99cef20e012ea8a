"""The blocks one after the other: a loop over parameters that are stacked on a leading `layers` dim.

Legend: B batch, T query length, S cache length, D embed, K kv heads, H head size, L layers.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models import remat
from jaxlm.models.block import Block, LayerCache, Tokens
from jaxlm.models.layers import Noise
from jaxlm.models.rope import Rotation, rotation
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime

MOST_UNROLLED = 4
"""Layers of the deepest model whose loop over layers is written out."""


def run_stack(
    blocks: Block,
    config: ModelConfig,
    x: jax.Array,
    where: Tokens,
    runtime: Runtime,
    *,
    noise: Noise | None,
    cache: dict[str, Any] | None,
) -> tuple[jax.Array, dict[str, Any] | None, Load | None]:
    """Scan over the layers, a whole period of the window pattern at a turn, so that every window is static.

    Returns x, the cache, and of a mixture of experts the layers' loads, [L, ...].
    """
    graph, stacked = nnx.split(blocks)
    windows = config.windows or (0,)
    period = len(windows)
    turns = _rotations(config, windows, where.positions_BT)
    start: Any = None if cache is None else cache["length"]

    def apply(i: int, picked: bool, params, x: jax.Array, layer: jax.Array, kv) -> tuple[jax.Array, Any]:
        block, window = nnx.merge(graph, params), windows[i % period]
        layer_cache = None if kv is None else LayerCache(kv[0], kv[1], start, kv[2:] or None)
        own_noise = None if noise is None else noise.of(layer)
        # Picking happens where weights are used: slices made out here would be kept, whole, for the backward pass.
        own = replace(runtime, pick=i) if picked else runtime
        x, layer_cache, load = block(
            x, where, own, window=window, turn=turns[window], cache=layer_cache, noise=own_noise
        )
        return x, (None if layer_cache is None else tuple(layer_cache[:2]), load)

    whole = config.layers // period * period

    def layer(i: int, *, picked: bool, scanned: bool) -> Callable:
        return remat.checkpoint(partial(apply, i, picked), runtime, scanned=scanned and whole > period)

    def turn(x: jax.Array, xs):
        params, numbers, kv = xs
        if period == 1:
            return layer(0, picked=False, scanned=True)(params, x, numbers, kv)
        outs = []
        for i in range(period):
            x, out = layer(i, picked=True, scanned=True)(params, x, numbers[i], jax.tree.map(lambda a, i=i: a[i], kv))
            outs.append(out)
        return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    kv = _keys(cache)
    xs = (stacked, jnp.arange(config.layers, dtype=jnp.int32), kv)
    main = jax.tree.map(lambda a: _periods(a[:whole] if whole < config.layers else a, period), xs)
    x, out = jax.lax.scan(turn, x, main, unroll=_unroll(config, runtime))
    if period > 1:
        out = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)
    for i in range(whole, config.layers):
        number, rest = jax.tree.map(lambda a, i=i: a[i], xs[1:])
        x, last = layer(i, picked=True, scanned=False)(stacked, x, number, rest)
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), out, last)
    kv, loads = out
    if cache is None:
        return x, None, loads
    return x, cache | {"k": kv[0], "v": kv[1], "length": cache["length"] + where.positions_BT.shape[1]}, loads


def run_chunk(
    blocks: Block,
    config: ModelConfig,
    numbers_L: Int[Array, "L"],
    x_BTD: Float[Array, "B T D"],
    where: Tokens,
    runtime: Runtime,
    *,
    ragged: bool,
    noise: Noise | None,
) -> tuple[Float[Array, "B T D"], Load | None]:
    """The blocks that a pipeline's stage holds; `numbers_L` are their places in the model, known only as it runs.

    Where the model does not divide over its stages (`ragged`), a number of -1 marks a layer that is not there: it hands
    x on. The loads [L, ...] of a mixture of experts come in the order of `numbers_L`.
    """
    graph, stacked = nnx.split(blocks)
    windows = config.windows or (0,)
    turns = _rotations(config, windows, where.positions_BT)

    def block(window: int) -> Callable:
        def apply(params, x: jax.Array, number: jax.Array) -> tuple[jax.Array, Load | None]:
            own_noise = None if noise is None else noise.of(number)
            run = nnx.merge(graph, params)
            x, _, load = run(x, where, runtime, window=window, turn=turns[window], noise=own_noise)
            return x, load

        return remat.checkpoint(apply, runtime, scanned=True)

    # Every kind of layer that there is, compiled once each: which one a stage runs depends on the stage.
    kinds = sorted(set(windows))
    kind_of_layer = jnp.asarray([kinds.index(windows[i % len(windows)]) for i in range(config.layers)], jnp.int32)
    idle = Load.none(config)
    branches = [*(block(window) for window in kinds), *([lambda params, x, number: (x, idle)] if ragged else [])]

    def layer(x: jax.Array, xs: tuple[Any, jax.Array]) -> tuple[jax.Array, Load | None]:
        params, number = xs
        if len(branches) == 1:
            return branches[0](params, x, number)
        kind = jnp.where(number < 0, len(kinds), kind_of_layer[jnp.maximum(number, 0)])
        return jax.lax.switch(kind, branches, params, x, number)

    return jax.lax.scan(layer, x_BTD, (stacked, numbers_L))


def _rotations(config: ModelConfig, windows: tuple[int, ...], positions: jax.Array) -> dict[int, Rotation | None]:
    """The rotary angles of each kind of layer: those with a window may have a base of their own, never stretched."""
    if config.positions != "rotary":
        return dict.fromkeys(windows)
    local = config
    if config.rope_local_theta is not None:
        local = replace(config, rope_theta=config.rope_local_theta, rope_scaling="none")
    return {w: rotation(local if w else config, config.head_width, positions) for w in windows}


def _keys(cache: dict[str, Any] | None) -> tuple[jax.Array, ...] | None:
    """Keys and values of all layers, [L, ...], and those of a source."""
    names = ("k", "v", "source_k", "source_v")
    return None if cache is None else tuple(cache[name] for name in names if name in cache)


def _unroll(config: ModelConfig, runtime: Runtime) -> int | bool:
    """Whether to write the layers out, one after the other, instead of looping: on CPU a loop's bookkeeping of what the
    backward needs costs a tenth of the time of a small model. Where something is recomputed only a loop keeps XLA from
    merging it with the forward pass."""
    small = config.layers <= MOST_UNROLLED and runtime.platform == "cpu"
    return small and runtime.remat == "none" and not runtime.copies_weights


def _periods(a: jax.Array, period: int) -> jax.Array:
    return a if period == 1 else a.reshape(-1, period, *a.shape[1:])
