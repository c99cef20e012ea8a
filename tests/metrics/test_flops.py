"""The FLOPs of training against arithmetic by hand, the compiler's count, and the model that is really built."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxlm.config.schema import ModelConfig
from jaxlm.metrics.flops import (
    attention_flops_per_token,
    explain,
    flops_per_token,
    matmul_parameters,
    mfu,
    parameter_count,
    peak_flops,
)
from jaxlm.models.build import build

GPT2 = ModelConfig(layers=12, embed=768, heads=12, mlp=3072)
LLAMA_8B = ModelConfig(
    layers=32,
    embed=4096,
    heads=32,
    kv_heads=8,
    mlp=14336,
    gated=True,
    norm="rms",
    positions="rotary",
    biases=(),
    tied=False,
)


def test_gpt2_by_hand():
    assert parameter_count(GPT2, 50257) == 124_439_808  # the published count
    by_hand = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    assert matmul_parameters(GPT2, 50257) == by_hand == 123_532_032
    assert attention_flops_per_token(GPT2, 1024) == 12 * 12 * 768 * 512
    assert flops_per_token(GPT2, 50257, 1024) == 6 * 123_532_032 + 56_623_104 == 797_815_296


def test_llama_8b_by_hand():
    assert parameter_count(LLAMA_8B, 128256) == 8_030_261_248  # the published count
    by_hand = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) + 4096 * 128256
    assert matmul_parameters(LLAMA_8B, 128256) == by_hand == 7_504_658_432
    assert flops_per_token(LLAMA_8B, 128256, 8192) == 6 * by_hand + 12 * 32 * 4096 * 4096


MIXTRAL = replace(LLAMA_8B, experts=8)


def test_mixtral_8x7b_by_hand():
    assert parameter_count(MIXTRAL, 32000) == 46_702_792_704  # the published count
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 2 * 3 * 4096 * 14336 + 4096 * 8
    assert matmul_parameters(MIXTRAL, 32000) == 32 * layer + 4096 * 32000 == 12_748_587_008


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"shared_experts": 2, "router": "sigmoid", "balance_rate": 0.1},
        {"gated": True, "biases": ("qkv", "output"), "shared_experts": 1},
    ],
)
def test_experts_of_the_model_that_is_built(keys):
    model = ModelConfig(experts=4, experts_per_token=3, vocabulary=256, **keys)
    held = jax.tree.leaves(build(model, None).abstract)
    assert sum(leaf.size for leaf in held) == parameter_count(model, 256)


@pytest.mark.parametrize("window", [1, 7, 100, 256])
def test_windows_count_the_keys_that_a_token_sees(window):
    length = 256
    model = ModelConfig(layers=2, embed=64, heads=4, windows=(window, 0))
    pairs = sum(min(i + 1, window) for i in range(length)) + sum(i + 1 for i in range(length))
    exact = 12 * 64 * pairs / length
    ours = attention_flops_per_token(model, length)
    assert ours == pytest.approx(exact, abs=12 * 64)  # by convention the diagonal counts half, in each of two layers


def test_a_window_longer_than_the_sequence_changes_nothing():
    wide = ModelConfig(windows=(4096,))
    assert attention_flops_per_token(wide, 256) == attention_flops_per_token(ModelConfig(), 256)


def test_six_flops_a_parameter_is_what_the_compiler_counts():
    tokens, inputs, outputs = 32, 64, 128

    def loss(w, x):
        return (jax.nn.relu(x @ w) @ w.T).sum()  # two matmuls, whose inputs both need a gradient

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(inputs, outputs), (tokens, inputs)]]
    cost = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile().cost_analysis()
    assert cost["flops"] == pytest.approx(6 * tokens * 2 * inputs * outputs, rel=0.2)


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H200", "float32", 494.5e12),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("TPU v6 lite", "float32", 918e12),
        ("TPU7x", "bfloat16", 1153.5e12),
        ("cpu", "float32", None),
        ("NVIDIA H20", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("Tesla V100-SXM2-16GB", "bfloat16", None),
        ("TPU v4 lite", "bfloat16", None),
    ],
)
def test_peak_by_device_kind(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak


def test_mfu():
    assert mfu(1e9, 470e3, 1, 940e12) == pytest.approx(0.5)
    assert mfu(1e9, 470e3, 2, 940e12) == pytest.approx(0.25)
    assert mfu(1e9, 470e3, 1, None) is None


BERT = ModelConfig(
    architecture="encoder", layers=12, embed=768, heads=12, mlp=3072, norm_placement="sum", token_types=2,
    max_positions=512,
)  # fmt: skip


def test_bert_by_hand():
    assert parameter_count(BERT, 30522) == 109_514_298  # the published count, without the pooler
    by_hand = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 768 + 768 * 30522
    assert matmul_parameters(BERT, 30522) == by_hand
    assert attention_flops_per_token(BERT, 512) == 12 * 12 * 768 * 512  # all keys, where a decoder sees half
    assert "attention = " in explain(BERT, 30522, 512, "cpu", "float32")


def test_an_encoder_decoder_by_hand():
    """T5 small: a token that is read goes through the encoder, and each layer of the decoder makes keys of it."""
    t5 = ModelConfig(
        architecture="encoder_decoder", positions="relative", layers=6, embed=512, heads=8, head_size=64, mlp=2048,
        norm="rms", biases=(), query_scale=1.0, activation="relu",
    )  # fmt: skip
    assert parameter_count(t5, 32128) == 60_506_624  # the published count
    attention, mlp = 4 * 512 * 512, 2 * 512 * 2048
    read = 6 * (attention + mlp + 2 * 512 * 512)
    written = 6 * (attention + mlp + 2 * 512 * 512) + 512 * 32128
    assert matmul_parameters(t5, 32128, 0.25) == read + written / 4
    keys = 512 + 128 / 4 / 2 + 512 / 4  # of the encoder, of the decoder itself, of the source
    assert attention_flops_per_token(t5, 512, 0.25) == 12 * 512 * 6 * keys
    assert "0.250 tokens written for each read" in explain(t5, 32128, 512, "cpu", "float32", 0.25)


def test_explain_shows_the_arithmetic_and_the_peak():
    line = explain(GPT2, 50257, 1024, "NVIDIA H200", "bfloat16")
    assert "6 x 123.5M" in line and "= 797.8 MFLOP a token" in line and "peak 989 TFLOP/s" in line
    assert "no mfu" in explain(GPT2, 50257, 1024, "cpu", "float32")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kv_heads": 1, "head_size": 48, "gated": True, "tied": False, "positions": "rotary"},
        {"norm": "rms", "norm_placement": "sandwich", "qk_norm": "head", "biases": ("output", "mlp")},
        {"norm": "rms", "norm_placement": "post", "qk_norm": "projection", "kv_heads": 2, "biases": ("qkv", "output")},
        {"biases": ("qkv", "mlp"), "positions": "none", "mlp": 100},
        {"architecture": "encoder", "norm_placement": "sum", "token_types": 2},
        {"architecture": "encoder", "norm": "rms", "tied": False},
        {"architecture": "encoder_decoder", "positions": "relative", "norm": "rms", "biases": (), "head_size": 48},
        {"architecture": "encoder_decoder", "positions": "relative", "norm_placement": "sandwich", "tied": False},
        {"architecture": "encoder_decoder", "positions": "relative", "kv_heads": 2, "qk_norm": "head", "gated": True},
    ],
)
def test_parameter_count_is_that_of_the_model_built(change):
    config = ModelConfig(**change)
    leaves = jax.tree.leaves(build(config, 256).abstract)
    assert parameter_count(config, 256) == sum(leaf.size for leaf in leaves)
