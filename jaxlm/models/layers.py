"""The layers a block is made of. A parameter states shape, dtype, logical dims and initializer once, in `parameter`.

Legend: B batch, T length, D embed, F mlp, N query heads, K kv heads, H head size, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.runtime import Runtime
from jaxlm.parallel.keys import Keys
from jaxlm.parallel.rules import Dims

Side = Literal["inputs", "outputs"]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def normal(std: float) -> Initializer:
    """Gaussian of standard deviation `std`, cut at two of them so that no weight starts as an outlier."""
    return jax.nn.initializers.truncated_normal(std)


def parameter(
    rngs: Keys, shape: tuple[int, ...], dims: Dims, init: Initializer, dtype: jnp.dtype = jnp.float32
) -> nnx.Param:
    """A parameter with a logical name for each dim (`parallel.rules`)."""
    if len(shape) != len(dims):
        raise ValueError(f"a parameter of shape {shape} needs {len(shape)} dims, not {dims}")
    return nnx.Param(init(rngs.params(), shape, dtype), dims=dims)


class Linear(nnx.Module):
    """An affine map from the first `inputs` dims of its kernel to the rest.

    Where `model` cuts the rest it reads what `Runtime.copies` gives, and where it cuts the inputs the residual stream
    comes out, summed (Megatron-LM's column and row parallel layers).
    """

    def __init__(self, rngs, shape, dims, *, inputs: int = 1, bias: bool, std: float, learn_bias: bool = True):
        self.inputs, self.learn_bias = inputs, learn_bias
        self.kernel = parameter(rngs, shape, dims, normal(std))
        self.bias = parameter(rngs, shape[inputs:], dims[inputs:], zeros) if bias else None

    def __call__(self, x: Float[Array, "..."], runtime: Runtime) -> Float[Array, "..."]:
        inwards, outwards = (self.kernel.get_metadata()["dims"][at] for at in (0, self.inputs))
        cut: Side | None = "inputs" if runtime.cuts(inwards) else "outputs" if runtime.cuts(outwards) else None
        return affine(x, lambda: self.use_kernel(runtime), self.use_bias(runtime), runtime, self.inputs, cut)

    def use_kernel(self, runtime: Runtime) -> jax.Array:
        return runtime.use(self.kernel)

    def use_bias(self, runtime: Runtime) -> jax.Array | None:
        if self.bias is None:
            return None
        bias = runtime.use(self.bias)
        return bias if self.learn_bias else jax.lax.stop_gradient(bias)


def affine(
    x: Float[Array, "..."],
    make_kernel: Callable[[], Float[Array, "..."]],
    bias: Float[Array, "..."] | None,
    runtime: Runtime,
    inputs: int = 1,
    cut: Side | None = None,
) -> Float[Array, "..."]:
    """Contract the last `inputs` dims of `x` with the first of the kernel, and add the bias.

    `cut` names the side of the kernel that `model` cuts. Under sequence parallelism `x` then comes as copies
    [..., S, D] ("outputs"), or the result is summed over the devices as it becomes the residual stream ("inputs").

    `x.reshape(-1, in) @ kernel.reshape(in, out)`: as a plain 2-D matmul its weight gradient is one too, which XLA:CPU
    runs faster than the einsum over batch and length. A cut sequence stays a dim of its own, because a device's tokens
    of several rows do not lie together in [B * T]. Where `make_kernel` makes a copy of parameters, the backward makes
    it again rather than keep it.
    """
    out = jax.eval_shape(make_kernel).shape[inputs:]
    copied, partial_sums = (runtime.cuts_residual and cut == side for side in ("outputs", "inputs"))
    lead = x.shape[: x.ndim - inputs - copied]
    rows = lead if runtime.layout.axis_size("residual") > 1 else (math.prod(lead),)
    width, shards = math.prod(x.shape[x.ndim - inputs :]), runtime.layout.axis_size("shards")

    def multiply(x: jax.Array) -> jax.Array:
        kernel = make_kernel()
        if copied:
            y = jnp.einsum("...sd,dsf->...sf", x, kernel.reshape(width, shards, -1))
            return y.reshape(*rows, -1)
        if partial_sums:
            return jnp.einsum(
                "...sf,sfd->...sd", x.reshape(*rows, shards, -1), kernel.reshape(shards, width // shards, -1)
            )
        kernel = kernel.reshape(width, -1)
        tall = runtime.platform == "cpu" and kernel.shape[0] > kernel.shape[1] and len(rows) == 1
        return _tall_matmul(x, kernel) if tall else x @ kernel

    if runtime.remat == "none" and runtime.copies_weights:
        # Without a policy around the block all would be kept for the backward, whole or cast copies of weights too.
        multiply = jax.checkpoint(multiply, prevent_cse=False)
    y = multiply(x if copied else x.reshape(*rows, -1))
    y = runtime.summed(y) if partial_sums else y
    return (y if bias is None else y + bias.reshape(*[1] * len(rows), -1)).reshape(*lead, *out)


@jax.custom_vjp
def _tall_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, whose weight gradient XLA:CPU computes twice as fast with the smaller dim first, then turned."""
    return x @ kernel


def _tall_matmul_backward(kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    # The barrier keeps XLA from folding the turn back into the product.
    return g @ kernel.T, jax.lax.optimization_barrier(g.T @ x).T


_tall_matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _tall_matmul_backward)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last dim, in float32."""

    def __init__(self, rngs, config: ModelConfig, *, size: int, kind: str | None = None, dim: str | None = "embed"):
        kind = kind or config.norm
        self.epsilon, self.offset = config.norm_epsilon, config.norm == "rms_offset"
        self.scale = parameter(rngs, (size,), (dim,), zeros if self.offset else ones)
        self.bias = parameter(rngs, (size,), (dim,), zeros) if kind == "layer" else None

    def __call__(self, x: Float[Array, "... D"], runtime: Runtime) -> Float[Array, "... D"]:
        scale = runtime.use(self.scale, jnp.float32)
        bias = None if self.bias is None else runtime.use(self.bias, jnp.float32)
        return _normalise(x, scale + 1.0 if self.offset else scale, bias, self.epsilon)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """(x - mean) / deviation * scale + bias; without a bias the mean stays. The backward keeps x and the statistics."""
    return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x, scale, bias, epsilon):
    y = x.astype(jnp.float32)
    mean = None if bias is None else y.mean(-1, keepdims=True)
    y = y if mean is None else y - mean
    inverse = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + epsilon)
    lead = (1,) * (x.ndim - 1)
    y = y * inverse * scale.reshape(*lead, -1)
    y = y if bias is None else y + bias.reshape(*lead, -1)
    return y.astype(x.dtype), (x, scale, mean, inverse)


def _normalise_backward(epsilon, kept, g):
    x, scale, mean, inverse = kept
    lead = tuple(range(x.ndim - 1))
    y, g = x.astype(jnp.float32), g.astype(jnp.float32)
    y = (y if mean is None else y - mean) * inverse
    gs = g * scale.reshape((1,) * len(lead) + (-1,))
    dx = gs - y * (gs * y).mean(-1, keepdims=True)
    dx = dx if mean is None else dx - gs.mean(-1, keepdims=True)
    return (dx * inverse).astype(x.dtype), (g * y).sum(lead), None if mean is None else g.sum(lead)


_normalise.defvjp(_normalise_forward, _normalise_backward)


class Identity(nnx.Module):
    """Stands where a norm does not."""

    def __call__(self, x: Float[Array, "..."], runtime: Runtime) -> Float[Array, "..."]:
        return x


@jax.custom_vjp
def _gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU (Hendrycks and Gimpel 2016), with a derivative of few passes."""
    return x * _gelu_gate(x)[0]


def _gelu_gate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gate (1 + tanh(u)) / 2 and du / dx."""
    c, square = math.sqrt(2 / math.pi), x * x
    return 0.5 * (1 + jnp.tanh(c * x * (1 + 0.044715 * square))), c * (1 + 3 * 0.044715 * square)


def _gelu_tanh_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    gate, slope = _gelu_gate(x)
    return (g * (gate + 2 * x * gate * (1 - gate) * slope),)


_gelu_tanh.defvjp(lambda x: (_gelu_tanh(x), x), _gelu_tanh_backward)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": _gelu_tanh,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class Mlp(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where gated (Shazeer 2020)."""

    def __init__(self, rngs, config: ModelConfig):
        embed, mlp, bias = config.embed, config.mlp, "mlp" in config.biases
        std = embed**-0.5
        self.activation = config.activation
        self.up = Linear(rngs, (embed, mlp), ("embed", "mlp"), bias=bias, std=std)
        self.gate = Linear(rngs, (embed, mlp), ("embed", "mlp"), bias=bias, std=std) if config.gated else None
        # Residual outputs start smaller in deep models, so that the stream's variance does not grow with depth (GPT-2).
        self.down = Linear(
            rngs, (mlp, embed), ("mlp", "embed"), bias=bias, std=mlp**-0.5 / math.sqrt(2 * config.layers)
        )

    def __call__(self, x: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        first = [layer for layer in (self.gate, self.up) if layer is not None]
        hidden = runtime.project(lambda x: [layer(x, runtime) for layer in first], x)
        h = activate(self.activation, hidden[0], hidden[1] if self.gate is not None else None)
        return self.down(h, runtime)


@partial(jax.checkpoint, static_argnums=0, prevent_cse=False)  # the backward needs only the matmuls' results
def activate(name: str, x: jax.Array, gated: jax.Array | None) -> jax.Array:
    """ACTIVATIONS[name](x), times `gated` where there is such."""
    y = ACTIVATIONS[name](x)
    return y if gated is None else y * gated


class Noise(NamedTuple):
    """Randomness that a token takes with it, whatever the mesh, the microbatches or the order of the tokens."""

    key: jax.Array
    places_BT: Int[Array, "B T"]
    """Number of each token in the batch."""

    def of(self, number: int | jax.Array) -> "Noise":
        """Another, for each `number`."""
        return self._replace(key=jax.random.fold_in(self.key, number))


def dropout(x: Float[Array, "B T D"], rate: float, noise: Noise | None) -> Float[Array, "B T D"]:
    """Zero each element with probability `rate` and scale the others up; without noise (evaluation), the identity."""
    if noise is None or rate == 0.0:
        return x

    def keep_token(place: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(noise.key, place), 1.0 - rate, x.shape[-1:])

    keep = jax.vmap(jax.vmap(keep_token))(noise.places_BT)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
