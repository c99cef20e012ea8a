"""The layers alone: what each computes and what its parameters are."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models.layers import ACTIVATIONS, Linear, Mlp, Noise, Norm, dropout, normal, parameter
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import rules
from jaxlm.parallel.keys import Keys, words
from jaxlm.parallel.mesh import from_devices

RMS = ModelConfig(norm="rms", embed=16, mlp=24, norm_epsilon=1e-2)


def runtime(mesh: str = "dp1", **keys) -> Runtime:
    spec = parse(mesh)
    return Runtime(layout=rules.layout(from_devices(spec, jax.devices()[: spec.device_count])), **keys)


def rngs() -> Keys:
    return Keys(**words(seed=0, layers=1))


def array(*shape: int, seed: int = 0, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_a_parameter_needs_a_dim_for_each_of_its_own():
    made = parameter(rngs(), (2, 3), ("embed", None), normal(1.0))
    assert made.get_metadata()["dims"] == ("embed", None)
    with pytest.raises(ValueError, match=r"shape \(2, 3\) needs 2 dims"):
        parameter(rngs(), (2, 3), ("embed",), normal(1.0))


@pytest.mark.parametrize("inputs", [1, 2])
def test_linear_contracts_its_first_dims(inputs):
    layer = Linear(rngs(), (4, 3, 5), ("embed", None, None), inputs=inputs, bias=True, std=1.0)
    layer.bias[...] = array(*(4, 3, 5)[inputs:], seed=1)
    x = array(2, 6, *(4, 3, 5)[:inputs])
    wanted = np.tensordot(np.asarray(x), np.asarray(layer.kernel[...]), axes=inputs) + np.asarray(layer.bias[...])
    np.testing.assert_allclose(layer(x, runtime()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learn", [True, False])
def test_a_bias_that_cannot_matter_does_not_learn(learn):
    layer = Linear(rngs(), (4, 3), ("embed", None), bias=True, std=1.0, learn_bias=learn)
    graph, state = nnx.split(layer)
    grads = jax.grad(lambda s: nnx.merge(graph, s)(array(2, 4), runtime()).sum())(state)
    assert bool(jnp.any(grads["bias"][...] != 0)) == learn


@pytest.mark.parametrize("kind", ["layer", "rms", "rms_offset"])
def test_norm(kind):
    config = dataclasses.replace(RMS, norm=kind)
    layer = Norm(rngs(), config, size=16)
    x = array(2, 3, 16) * 0.1 + 3.0
    centred = np.asarray(x, np.float64)
    if kind == "layer":
        centred = centred - centred.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2)
    np.testing.assert_allclose(layer(x, runtime()), wanted, rtol=1e-4, atol=1e-5)  # fresh: times one, plus nothing
    assert float(layer.scale[...][0]) == (0.0 if kind == "rms_offset" else 1.0)
    assert (layer.bias is None) == (kind != "layer")


def test_norm_counts_in_float32_whatever_comes():
    layer = Norm(rngs(), RMS, size=16)
    x = array(1, 1, 16, dtype="bfloat16")
    found = layer(x, runtime(dtype=jnp.dtype("bfloat16")))
    exact = layer(x.astype(jnp.float32), runtime())
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))


def test_norm_keeps_only_its_input_for_the_backward():
    layer = Norm(rngs(), RMS, size=16)
    _, pull = jax.vjp(lambda x: layer(x, runtime()), array(2, 3, 16))
    assert sum(leaf.size for leaf in jax.tree.leaves(pull)) <= 2 * 3 * 16 + 16 + 8


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp(activation, gated):
    layer = Mlp(rngs(), dataclasses.replace(RMS, activation=activation, gated=gated))
    x = array(2, 3, 16)
    up, down = layer.up.kernel[...], layer.down.kernel[...]
    h = ACTIVATIONS[activation](x @ layer.gate.kernel[...]) * (x @ up) if gated else ACTIVATIONS[activation](x @ up)
    np.testing.assert_allclose(layer(x, runtime()), h @ down, rtol=1e-4, atol=1e-5)


def test_activations_at_known_points():
    values = {name: float(function(jnp.float32(1.0))) for name, function in ACTIVATIONS.items()}
    assert values["gelu"] == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=1e-6)
    assert values["gelu_tanh"] == pytest.approx(0.8411920, abs=1e-6)
    assert values["silu"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)
    assert values["relu"] == 1.0 and float(ACTIVATIONS["relu"](jnp.float32(-1.0))) == 0.0


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate):
    x, noise = jnp.ones((64, 32, 16)), Noise(jax.random.key(0), jnp.arange(64 * 32).reshape(64, 32))
    y = np.asarray(dropout(x, rate, noise))
    assert (y == 0).mean() == pytest.approx(rate, abs=0.01)
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    assert dropout(x, rate, None) is x and dropout(x, 0.0, noise) is x
    assert dropout(x.astype(jnp.bfloat16), rate, noise).dtype == jnp.bfloat16


def test_dropout_goes_with_the_token():
    x, places = jnp.ones((8, 4, 16)), jnp.arange(32).reshape(8, 4)
    noise = Noise(jax.random.key(0), places)
    y = np.asarray(dropout(x, 0.5, noise))
    np.testing.assert_array_equal(dropout(x, 0.5, noise._replace(places_BT=places[::-1, ::-1])), y[::-1, ::-1])
    assert (y != np.asarray(dropout(x, 0.5, noise.of(1)))).mean() == pytest.approx(0.5, abs=0.1)
    assert len({row.tobytes() for row in y.reshape(-1, 16)}) == 32


def test_use_gathers_over_fsdp_and_scatters_the_gradient():
    how = runtime("fsdp4,tp2", dtype=jnp.dtype("bfloat16"))
    kernel = parameter(rngs(), (16, 8), ("embed", "mlp"), normal(1.0))
    own = how.layout.sharding(("embed", "mlp"))
    kernel[...] = jax.device_put(kernel[...], own)
    graph, state = nnx.split(kernel)

    def used(state):
        return how.use(nnx.merge(graph, state))

    whole = jax.jit(used)(state)
    assert whole.dtype == jnp.bfloat16
    assert {shard.data.shape for shard in whole.addressable_shards} == {(16, 4)}
    (leaf,) = jax.tree.leaves(jax.jit(jax.grad(lambda s: used(s).sum().astype(jnp.float32)))(state))
    assert leaf.dtype == jnp.float32 and {shard.data.shape for shard in leaf.addressable_shards} == {(4, 4)}


def test_use_picks_a_layer():
    stack = parameter(rngs(), (3, 4, 5), (None, "embed", None), normal(1.0))
    stack = stack.replace(stack[...], dims=("embed", None))
    for i in range(3):
        np.testing.assert_array_equal(runtime(pick=i).use(stack), stack[...][i])
    assert not runtime().copies_weights and runtime(pick=0).copies_weights
