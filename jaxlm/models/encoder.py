"""The encoder (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): a decoder's layers without causality, and another
output layer.

Legend: B batch, T length, D embed, V vocabulary (padded).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlm.config.schema import ModelConfig
from jaxlm.models.decoder import Decoder, Output
from jaxlm.models.layers import Linear, Norm, activate, parameter, zeros
from jaxlm.models.runtime import Runtime


class Transform(nnx.Module):
    """norm(activation(dense(x))), between the last block and the output layer."""

    def __init__(self, rngs, config: ModelConfig):
        self.activation = config.activation
        # Each device of tp has all of it: beside the output layer it is small.
        self.dense = Linear(rngs, (config.embed, config.embed), ("embed", None), bias=True, std=config.embed**-0.5)
        self.norm = Norm(rngs, config, size=config.embed)

    def __call__(self, x: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        return self.norm(activate(self.activation, self.dense(x, runtime), None), runtime)


class Encoder(Decoder):
    """Predicts hidden tokens from all of their document; that its attention looks both ways is in `ModelConfig`."""

    def __init__(self, rngs, config: ModelConfig, vocabulary: int):
        super().__init__(rngs, config, vocabulary)
        self.transform = Transform(rngs, config)
        self.output_bias = parameter(rngs, (vocabulary,), ("vocab",), zeros)

    def before_output(self, x_BTD: Float[Array, "B T D"], runtime: Runtime) -> Float[Array, "B T D"]:
        return self.transform(x_BTD, runtime)

    def output_layer(self, runtime: Runtime) -> Output:
        return super().output_layer(runtime)._replace(bias=runtime.use(self.output_bias, jnp.float32))
