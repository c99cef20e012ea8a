"""The decoder: embedding, a scanned stack of blocks, a final norm, an output layer.

Legend: B batch, T query length, S cache length, D embed, V vocabulary (padded), K kv heads, H head size, L layers.
"""

import math
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
from jaxlm.models.block import Block, LayerCache, Tokens, head_size, kv_heads
from jaxlm.models.layers import Linear, Norm, dropout, normal, parameter
from jaxlm.models.rope import Rotation, rotation
from jaxlm.models.runtime import Runtime

MOST_UNROLLED = 4
"""Layers of the deepest model whose loop over layers is written out."""

Cache = dict[str, Any]
"""k, v [L, B, S, K, H]; positions, segments [B, S] (segment -1: empty); length, the slots used."""


class Embedding(nnx.Module):
    """A table of vectors, one a row."""

    def __init__(self, rngs, rows: int, embed: int, dim: str | None):
        self.embedding = parameter(rngs, (rows, embed), (dim, "embed"), normal(0.02))


class Decoder(nnx.Module):
    """A causal language model up to its final norm; `output_matrix` turns its result into logits."""

    def __init__(self, rngs, config: ModelConfig, vocabulary: int):
        self.config = config
        self.tokens = Embedding(rngs, vocabulary, config.embed, "vocab")
        if config.positions == "learned":
            self.positions = Embedding(rngs, config.max_positions, config.embed, None)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(rngs, config)

        self.blocks = stack(rngs)
        self.final_norm = Norm(rngs, config, size=config.embed)
        if not config.tied:
            self.head = Linear(rngs, (config.embed, vocabulary), ("embed", "vocab"), bias=False, std=config.embed**-0.5)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        runtime: Runtime,
        *,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with this call's keys and values in it."""
        config, layout = self.config, runtime.layout
        x = runtime.use(self.tokens.embedding)[tokens_BT]
        if config.embed_scale:
            x = x * jnp.asarray(math.sqrt(config.embed), x.dtype)
        if config.positions == "learned":
            x = x + runtime.use(self.positions.embedding)[positions_BT]
        x = dropout(x, config.dropout, None if key is None else jax.random.fold_in(key, config.layers))
        x = layout.constrain(x, "batch", "sequence", None)
        where = Tokens(positions_BT, segments_BT)
        if cache is not None:
            cache = _append_tokens(cache, positions_BT, segments_BT)
            where = Tokens(positions_BT, segments_BT, cache["positions"], cache["segments"])
        x, cache = _run_stack(self.blocks, config, x, where, runtime, key=key, cache=cache)
        return self.final_norm(x, runtime), cache

    def output_matrix(self, runtime: Runtime) -> tuple[jax.Array, bool]:
        """The output layer's weights, and whether they stand as [V, D] (tied) rather than [D, V]."""
        if self.config.tied:
            return runtime.use(self.tokens.embedding), True
        return runtime.use(self.head.kernel), False


def empty_cache(config: ModelConfig, *, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache for `batch` sequences of up to `slots` tokens."""
    shape = (config.layers, batch, slots, kv_heads(config), head_size(config))
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.zeros((batch, slots), jnp.int32),
        "segments": jnp.full((batch, slots), -1, jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def _append_tokens(cache: Cache, positions: jax.Array, segments: jax.Array) -> Cache:
    at = (jnp.zeros((), jnp.int32), cache["length"])
    return cache | {
        "positions": jax.lax.dynamic_update_slice(cache["positions"], positions, at),
        "segments": jax.lax.dynamic_update_slice(cache["segments"], segments, at),
    }


def _run_stack(
    blocks: Block,
    config: ModelConfig,
    x: jax.Array,
    where: Tokens,
    runtime: Runtime,
    *,
    key: jax.Array | None,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """Scan over the layers, a whole period of the window pattern at a turn, so that every window is static."""
    graph, stacked = nnx.split(blocks)
    windows = config.windows or (0,)
    period = len(windows)
    turns = _rotations(config, windows, where.positions_BT)
    start: Any = None if cache is None else cache["length"]

    def apply(i: int, picked: bool, params, x: jax.Array, layer: jax.Array, kv) -> tuple[jax.Array, Any]:
        block, window = nnx.merge(graph, params), windows[i % period]
        layer_cache = None if kv is None else LayerCache(kv[0], kv[1], start)
        layer_key = None if key is None else jax.random.fold_in(key, layer)
        # Picking happens where weights are used: slices made out here would be kept, whole, for the backward pass.
        own = replace(runtime, pick=i) if picked else runtime
        x, layer_cache = block(x, where, own, window=window, turn=turns[window], cache=layer_cache, key=layer_key)
        return x, None if layer_cache is None else tuple(layer_cache[:2])

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

    kv = None if cache is None else (cache["k"], cache["v"])
    xs = (stacked, jnp.arange(config.layers, dtype=jnp.int32), kv)
    main = jax.tree.map(lambda a: _periods(a[:whole] if whole < config.layers else a, period), xs)
    x, out = jax.lax.scan(turn, x, main, unroll=_unroll(config, runtime))
    if period > 1:
        out = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)
    for i in range(whole, config.layers):
        number, rest = jax.tree.map(lambda a, i=i: a[i], xs[1:])
        x, last = layer(i, picked=True, scanned=False)(stacked, x, number, rest)
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), out, last)
    if cache is None:
        return x, None
    return x, cache | {"k": out[0], "v": out[1], "length": cache["length"] + where.positions_BT.shape[1]}


def _rotations(config: ModelConfig, windows: tuple[int, ...], positions: jax.Array) -> dict[int, Rotation | None]:
    """The rotary angles of each kind of layer: those with a window may have a base of their own, never stretched."""
    if config.positions != "rotary":
        return dict.fromkeys(windows)
    local = config
    if config.rope_local_theta is not None:
        local = replace(config, rope_theta=config.rope_local_theta, rope_scaling="none")
    return {w: rotation(local if w else config, head_size(config), positions) for w in windows}


def _unroll(config: ModelConfig, runtime: Runtime) -> int | bool:
    """Whether to write the layers out, one after the other, instead of looping: on CPU a loop's bookkeeping of what the
    backward needs costs a tenth of the time of a small model. Where something is recomputed only a loop keeps XLA from
    merging it with the forward pass."""
    small = config.layers <= MOST_UNROLLED and runtime.platform == "cpu"
    return small and runtime.remat == "none" and not runtime.copies_weights


def _periods(a: jax.Array, period: int) -> jax.Array:
    return a if period == 1 else a.reshape(-1, period, *a.shape[1:])
