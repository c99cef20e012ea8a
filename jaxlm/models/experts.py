"""Mixture of experts: many feed-forward layers, of which each token goes through a few.

Each device routes the tokens it has. Experts are dealt out over the mesh axis `expert`, and rows travel to them and
back (`models.dispatch`); `model` cuts the width of every expert, whose partial results are summed when they are back.

Legend: B batch, T length, N tokens (B x T), D embed, F mlp, E experts, K experts of a token, R rows of one expert.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.dispatch import capped, dropless
from jaxlm.models.layers import Linear, Mlp, activate, normal, parameter, zeros
from jaxlm.models.router import Load, measure, route, within_capacity
from jaxlm.models.runtime import Runtime
from jaxlm.parallel.rules import Dims, Layout
from jaxlm.parallel.sequence import gathered, scattered


class Bank(nnx.Module):
    """An affine map for each expert."""

    def __init__(self, rngs, shape: tuple[int, int, int], dims: Dims, *, bias: bool, std: float):
        self.kernel = parameter(rngs, shape, dims, normal(std))
        self.bias = parameter(rngs, (shape[0], shape[2]), (dims[0], dims[2]), zeros) if bias else None


class Mlps(nnx.Module):
    """The parameters of E feed-forward layers, each as in `layers.Mlp`."""

    def __init__(self, rngs, config: ModelConfig):
        experts, embed, mlp, bias = config.experts, config.embed, config.mlp, "mlp" in config.biases
        inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.up = Bank(rngs, (experts, embed, mlp), inwards, bias=bias, std=embed**-0.5)
        self.gate = Bank(rngs, (experts, embed, mlp), inwards, bias=bias, std=embed**-0.5) if config.gated else None
        self.down = Bank(rngs, (experts, mlp, embed), outwards, bias=bias, std=(mlp * 2 * config.layers) ** -0.5)


class Experts(nnx.Module):
    """For each token the weighted sum of its K experts, and of the shared ones with weight 1."""

    def __init__(self, rngs, config: ModelConfig):
        self.config = config
        self.router = Linear(rngs, (config.embed, config.experts), ("embed", None), bias=False, std=config.embed**-0.5)
        self.routing_bias = parameter(rngs, (config.experts,), (None,), zeros) if config.balance_rate else None
        self.experts = Mlps(rngs, config)
        wide = replace(config, mlp=config.mlp * config.shared_experts)
        self.shared = Mlp(rngs, wide) if config.shared_experts else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], segments_BT: Int[Array, "B T"], runtime: Runtime, *, drop: bool = True
    ) -> tuple[Float[Array, "B T D"], Load]:
        """Their output, and how even the choice was: of all rows, or of this device's where the batch axes are manual.

        Tokens of segment 0 are padding: they go to no expert and count for nothing.

        Args:
            drop: whether a capacity is kept to. A token that is generated has no sequence beside it to be measured by.
        """
        layout, parameters = runtime.layout, self._parameters()
        dims: dict[str, Dims] = {name: p.get_metadata()["dims"] for name, p in parameters.items()}
        values = {name: runtime.own(p) for name, p in parameters.items()}
        inner = replace(runtime, pick=None, layout=replace(layout, manual=frozenset(layout.mesh.axis_names)))
        run = partial(self._on_device, dims=dims, runtime=inner, drop=drop, parted=runtime.cuts_residual)
        y_BTD, loads = _on_devices(run, layout, dims)(x_BTD, segments_BT, values)
        if self.shared is not None:
            y_BTD += self.shared(x_BTD, runtime)
        return y_BTD, jax.tree.map(lambda parts: parts.sum(axis=0), loads)

    def _parameters(self) -> dict[str, nnx.Param]:
        """All but those of the shared experts."""
        named: dict[str, nnx.Param | None] = {"router": self.router.kernel, "routing_bias": self.routing_bias}
        for name, bank in (("up", self.experts.up), ("gate", self.experts.gate), ("down", self.experts.down)):
            if bank is not None:
                named |= {f"{name}.kernel": bank.kernel, f"{name}.bias": bank.bias}
        return {name: p for name, p in named.items() if p is not None}

    def _on_device(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array,
        values: dict[str, jax.Array],
        *,
        dims: dict[str, Dims],
        runtime: Runtime,
        drop: bool,
        parted: bool,
    ) -> tuple[jax.Array, Load]:
        """This device's tokens through the experts, wherever they are, and its part of the load as [1, ...].

        Args:
            parted: whether the devices along `model`, which all work on the same tokens, have and want a part of them.
        """
        config, layout = self.config, runtime.layout
        cut = layout.manual_axes("mlp")
        if parted:
            x_BTD = gathered(x_BTD)
        batch, length, embed = x_BTD.shape
        real_BT, x_ND = segments_BT != 0, x_BTD.reshape(-1, embed)
        kernel_DE = runtime.whole(values["router"], dims["router"], jnp.float32)
        bias_E = values.get("routing_bias")
        bias_E = None if bias_E is None else bias_E.astype(jnp.float32)
        routing = route(x_ND, kernel_DE, bias_E, real_BT.reshape(-1), config)
        load = measure(routing, real_BT, config, layout.manual_axes("sequence"))

        def parameters() -> dict[str, jax.Array]:
            made = {name: runtime.whole(value, dims[name]) for name, value in values.items() if "." in name}
            if cut and "down.bias" in made:  # what the devices along `cut` compute is summed
                made["down.bias"] = jnp.where(jax.lax.axis_index(cut) == 0, made["down.bias"], 0)
            return made

        feed, experts_NK, axes = partial(_feed, config.activation), routing.experts_NK, layout.manual_axes("experts")
        move = partial(dropless, ragged=runtime.platform != "cpu")
        if drop and config.capacity_factor:
            share = config.capacity_factor * length * config.experts_per_token / config.experts
            capacity = min(math.ceil(share - 1e-6), length)  # 1.1 x 10 is more than 11 in binary
            experts_NK = within_capacity(experts_NK, rows=batch, capacity=capacity, experts=config.experts)
            load = load._replace(dropped=(experts_NK != routing.experts_NK).sum(dtype=jnp.float32))
            move = partial(capped, rows=batch, capacity=capacity)
        y_ND = move(
            feed,
            parameters,
            x_ND,
            routing.weights_NK,
            experts_NK,
            experts=config.experts,
            axis=axes[0] if axes else None,
        )
        y_BTD = y_ND.reshape(x_BTD.shape)
        if parted:
            y_BTD = scattered(y_BTD, runtime.platform)
        elif cut:
            y_BTD = _sum_over(cut, y_BTD)
        return y_BTD, jax.tree.map(lambda part: part[None], load)


def _on_devices(run, layout: Layout, dims: dict[str, Dims]):
    """`run` on what each device holds: under a shard_map over the axes that none has taken over yet."""
    free = [axis for axis in layout.mesh.axis_names if axis not in layout.manual]
    if all(layout.mesh.shape[axis] == 1 for axis in free):
        return run
    # An axis that is not mentioned costs an all-reduce of the gradients, even where its size is 1.
    alone = tuple(axis for axis in free if layout.mesh.shape[axis] == 1)

    def spec(*of: str | None) -> PartitionSpec:
        first, *rest = (layout.axes(dim) for dim in of)
        return PartitionSpec((*first, *alone), *rest)

    tokens, stream = spec("batch", "sequence"), spec("batch", "residual")
    parts = PartitionSpec((*layout.axes("batch"), *layout.axes("sequence"), *alone))
    return jax.shard_map(
        run,
        mesh=jax.sharding.get_abstract_mesh() if layout.manual else layout.mesh,
        in_specs=(stream, tokens, {name: spec(*of) for name, of in dims.items()}),
        out_specs=(stream, parts),
        axis_names=frozenset(free),
        check_vma=False,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_over(axes: tuple[str, ...], y: jax.Array) -> jax.Array:
    """A psum whose result all devices along `axes` use alike. So its gradient is the same on all of them too, and needs
    no psum of its own."""
    return jax.lax.psum(y, axes)


_sum_over.defvjp(lambda axes, y: (_sum_over(axes, y), None), lambda axes, _, g: (g * jax.lax.axis_size(axes),))


def _feed(activation: str, x_RD: jax.Array, weights_R: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
    """One expert's weighted output. Weighting its hidden layer leaves a sum to be made of the outputs, for whose
    gradient they need not be kept."""

    def affine(x: jax.Array, name: str) -> jax.Array:
        y = x @ p[f"{name}.kernel"]
        return y + p[f"{name}.bias"][None] if f"{name}.bias" in p else y

    h = affine(x_RD, "up")
    h = activate(activation, affine(x_RD, "gate"), h) if "gate.kernel" in p else activate(activation, h, None)
    y = _weighted(h, weights_R) @ p["down.kernel"]
    if "down.bias" in p:
        y += _weighted(jnp.broadcast_to(p["down.bias"], y.shape), weights_R)
    return y


def _weighted(x_RD: jax.Array, weights_R: jax.Array) -> jax.Array:
    return (x_RD.astype(jnp.float32) * weights_R[:, None]).astype(x_RD.dtype)
