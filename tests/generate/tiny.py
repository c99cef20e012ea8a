"""Tiny models for the tests of generation: a GPT, a Llama with everything Gemma adds, multi-query attention, a mixture
of experts, and an encoder-decoder."""

from dataclasses import replace

import jax
import numpy as np

from jaxlm.config import mesh_spec
from jaxlm.config.schema import ModelConfig
from jaxlm.models.build import Model, Params, build
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
    norm="rms_offset",
    norm_placement="sandwich",
    positions="rotary",
    rope_local_theta=1000.0,
    biases=(),
    qk_norm="head",
    windows=(5, 0),
    attention_softcap=5.0,
    logit_softcap=10.0,
    tied=False,
    embed_scale=True,
)
MULTI_QUERY = ModelConfig(layers=2, embed=32, heads=4, kv_heads=1, mlp=64, positions="rotary", norm="rms")
EXPERTS = replace(LLAMA, experts=4, router="sigmoid", shared_experts=1, balance_rate=0.1)
ANSWERS = ModelConfig(
    architecture="encoder_decoder", layers=2, embed=32, heads=4, head_size=6, mlp=48, gated=True, norm="rms",
    positions="relative", query_scale=1.0, biases=(), tied=False,
)  # fmt: skip
CONFIGS = {"gpt": GPT, "llama": LLAMA, "multi_query": MULTI_QUERY, "experts": EXPERTS}
VOCABULARY = 100


def make(
    config: ModelConfig, mesh: str = "dp1", vocabulary: int = VOCABULARY, **runtime
) -> tuple[Model, Params, Runtime]:
    """Model, parameters with weights large enough that every token depends on its context, and runtime on `mesh`."""
    spec = mesh_spec.parse(mesh)
    devices = jax.devices()[: spec.device_count]
    layout = rules.layout(meshes.from_devices(spec, devices), kv_heads=config.key_value_heads, variant="decode")
    model = build(config, vocabulary)
    random = np.random.default_rng(3)

    def weights(path, leaf, dims):
        scale = path[-1].key == "scale" and config.norm != "rms_offset"
        values = scale + 0.3 * random.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values, layout.sharding(dims, leaf.shape))

    params = jax.tree_util.tree_map_with_path(weights, model.abstract, model.dims)
    return model, params, Runtime(layout=layout, **runtime)
