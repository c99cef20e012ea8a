"""Decoding with a KV cache: the same tokens as without one, on any mesh, in any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config import mesh_spec
from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig
from jaxlm.generate import decode
from jaxlm.generate.decode import Generator, bucket, generate, left_padded
from jaxlm.generate.sampling import Sampling
from jaxlm.models.block import kv_heads
from jaxlm.models.build import build
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import rules

GPT = ModelConfig(layers=2, embed=32, heads=4, mlp=64, max_positions=64)
LLAMA = ModelConfig(
    layers=3,
    embed=32,
    heads=4,
    kv_heads=2,
    head_size=16,
    mlp=48,
    gated=True,
    activation="silu",
    norm="rms",
    norm_offset=True,
    norm_placement="sandwich",
    positions="rotary",
    rope_local_theta=1000.0,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm="head",
    windows=(5, 0),
    attention_softcap=5.0,
    logit_softcap=10.0,
    tied=False,
    embed_scale=True,
)
MULTI_QUERY = ModelConfig(layers=2, embed=32, heads=4, kv_heads=1, mlp=64, positions="rotary", norm="rms")
CONFIGS = {"gpt": GPT, "llama": LLAMA, "multi_query": MULTI_QUERY}
VOCABULARY = 100
PROMPTS = [[7, 3, 99], list(range(20, 39)), [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW = 20


def make(config, mesh="dp1", **runtime):
    """Model, parameters with weights large enough that every token depends on its context, and runtime on `mesh`."""
    spec = mesh_spec.parse(mesh)
    layout = rules.layout(meshes.from_devices(spec, jax.devices()[: spec.device_count]), kv_heads=kv_heads(config))
    model = build(config, VOCABULARY)
    random = np.random.default_rng(3)

    def weights(path, leaf, dims):
        scale = path[-1].key == "scale" and not config.norm_offset
        values = scale + 0.3 * random.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values, layout.sharding(dims, leaf.shape))

    params = jax.tree_util.tree_map_with_path(weights, model.abstract, model.dims)
    return model, params, Runtime(layout=layout, **runtime)


def without_cache(config, prompts, count, eos_id=None):
    """Greedy continuations, each token by a forward pass over the whole text, a row at a time, on one device."""
    model, params, runtime = make(config)
    length = 64

    @jax.jit
    def following(params, batch, end):
        x = model.hidden(params, batch, runtime)
        return jnp.argmax(model.logits(params, x, runtime)[0, end - 1])

    new = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(count):
            rows = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
            rows["tokens"][0, : len(text)] = text
            rows["segment_ids"][0, : len(text)] = 1
            rows["positions"][0] = np.arange(length)
            text.append(int(following(params, rows, len(text))))
            if text[-1] == eos_id:
                text.pop()
                break
        new.append(text[len(prompt) :])
    return new


@pytest.fixture(scope="module")
def expected():
    return {name: without_cache(config, PROMPTS, NEW) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("mesh", ["dp1", "dp2,tp2", "fsdp2,tp4", "rep2,dp2,fsdp2"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_with_cache_is_greedy_without(name, mesh, expected):
    new = generate(*make(CONFIGS[name], mesh), PROMPTS, max_new_tokens=NEW)
    assert new == expected[name]
    assert len({token for row in new for token in row}) > 8, "a model that repeats itself proves little"
    assert len(set(map(tuple, new))) == len(PROMPTS)
