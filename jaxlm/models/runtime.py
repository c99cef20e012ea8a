"""How a model is computed, as opposed to what it is: devices, number formats, kernels, what is recomputed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.config.schema import PrecisionConfig
from jaxlm.parallel import sequence
from jaxlm.parallel.rules import Dims, Layout, across, sum_scatter
from jaxlm.parallel.zigzag import zigzag

Tree = Any


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Settings that leave the mathematics alone."""

    layout: Layout
    attention: str = "xla"
    """Backend of `models.attention.attend`."""
    context: str = "ring"
    """How it reaches across a sequence that is cut over `context`."""
    dtype: jnp.dtype = jnp.dtype("float32")
    """Of matmuls and activations."""
    remat: str = "none"
    """Policy of `models.remat`."""

    pick: int | None = None
    """Where parameters come stacked, the layer that is meant: `use` takes it out."""

    def use(self, parameter: nnx.Param, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """A parameter as a computation wants it: in the compute dtype, and whole where `fsdp` cuts it.

        The cast comes first, so that what travels is small; the gradient goes back to the parameter's own sharding
        and dtype at once (a reduce-scatter where `fsdp` cuts it).
        """
        return self.whole(self.own(parameter), parameter.get_metadata()["dims"], dtype)

    def own(self, parameter: nnx.Param) -> jax.Array:
        """A parameter of this layer as it is stored."""
        return parameter[...] if self.pick is None else parameter[...][self.pick]

    def whole(self, value: jax.Array, dims: Dims, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
        """`use`, of a value that was taken out of its parameter already."""
        cast = jnp.dtype(dtype or self.dtype)
        if "embed" in dims and (axes := self.layout.manual_axes("embed")):
            return _gather_by_hand(self.layout, dims, axes, cast, value)
        return _gather(self.layout, dims, cast, value) if self._gathers(dims) else value.astype(cast)

    def arrange(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch of arrays [B, T] with its tokens in the order in which attention wants a cut sequence."""
        return batch if self.context == "ulysses" else zigzag(batch, self.layout)

    def project(self, run: Callable[[jax.Array], Tree], x: jax.Array) -> Tree:
        """`run`, matmuls over `model`, of `copies` of the residual stream [B, T, D]: the backward makes them again."""

        def of_copies(x: jax.Array) -> Tree:
            return run(self.copies(x))

        # A matmul's backward does not need its result, so nothing is computed again but the gather.
        again = self.cuts_residual and self.remat == "none"
        return jax.checkpoint(of_copies, prevent_cse=False)(x) if again else of_copies(x)

    def copies(self, x: jax.Array) -> jax.Array:
        """The residual stream x [B, T, D] for what is cut over `model`: under sequence parallelism a copy for each of
        its devices [B, T, S, D], otherwise x itself."""
        return sequence.gather_copies(x, self.layout) if self.cuts_residual else x

    def summed(self, y: jax.Array) -> jax.Array:
        """The residual stream [B, T, D] of what each device of `model` adds to it, [B, T, S, D]."""
        return sequence.sum_copies(y, self.layout) if self.cuts_residual else y.sum(axis=2)

    def cuts(self, dim: str | None) -> bool:
        """Whether `model` cuts `dim`."""
        return "model" in self.layout.axes(dim)

    @property
    def cuts_residual(self) -> bool:
        """Sequence parallelism: `model` cuts the residual stream by sequence."""
        return self.layout.axes("residual") != self.layout.axes("sequence")

    @property
    def platform(self) -> str:
        """Of the devices: "cpu", "gpu" or "tpu"."""
        return self.layout.mesh.devices.flat[0].platform

    @property
    def copies_weights(self) -> bool:
        """Whether `use` makes copies of weights, which the backward pass should make again rather than keep."""
        gathered = self.layout.axis_size("embed") > 1 or self.layout.manual_axes("embed")
        return bool(self.pick is not None or self.dtype != jnp.float32 or gathered)

    def _gathers(self, dims: Dims) -> bool:
        return "embed" in dims and self.layout.axis_size("embed") > 1


def compute_dtype(config: PrecisionConfig, platform: str) -> jnp.dtype:
    """The number format of matmuls and activations on `platform` ("cpu", "gpu" or "tpu")."""
    if config.compute == "auto":
        return jnp.dtype("float32" if platform == "cpu" else "bfloat16")
    return jnp.dtype(config.compute)


def _gather_by_hand(layout: Layout, dims: Dims, axes: tuple[str, ...], dtype: jnp.dtype, value: jax.Array) -> jax.Array:
    """As `_gather`, where fsdp is manual. What travels is in the compute dtype, what is summed in the parameter's."""
    dim, spec = dims.index("embed"), layout.spec(dims)

    @jax.custom_vjp
    def gather(value: jax.Array) -> jax.Array:
        run = partial(jax.lax.all_gather, axis_name=axes, axis=dim, tiled=True)
        return across(run, value.astype(dtype), spec)

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        run = partial(sum_scatter, axes=axes, dim=dim)
        return (across(run, gradient.astype(value.dtype), spec),)

    gather.defvjp(lambda value: (gather(value), None), backward)
    return gather(value)


def _gather(layout: Layout, dims: Dims, dtype: jnp.dtype, value: jax.Array) -> jax.Array:
    whole = tuple(None if dim == "embed" else dim for dim in dims)

    @jax.custom_vjp
    def gather(value: jax.Array) -> jax.Array:
        return layout.constrain(value.astype(dtype), *whole)

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        # Whole first: else the sharding asked for spreads back into the scatter of an embedding's gradient, which the
        # partitioner then can only do on replicated activations.
        return (layout.constrain(layout.constrain(gradient, *whole), *dims).astype(value.dtype),)

    gather.defvjp(lambda value: (gather(value), None), backward)
    return gather(value)
