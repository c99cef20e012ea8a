"""How many floating-point operations training takes, and what share of the hardware's peak that is.

A multiply-add is 2 FLOPs, and the backward pass takes twice the forward, so a parameter that is multiplied costs 6
FLOPs a token, and a query-key pair of a head of size H costs 3 x (2 H for the logit + 2 H for the value) = 12 H:

    FLOPs per token = 6 x matmul parameters + 12 x heads x head_size x sum over layers of the mean keys a token sees
    mean keys       = T / 2 under the causal mask, w - w^2 / (2 T) in a layer with a window of w < T tokens,
                      T in an encoder
    an encoder-decoder: a token is one that is read; for each of them the decoder writes a share of one, which sees
                      half of what is written and all T that were read
    mfu             = FLOPs per token x tokens per second / (devices x peak FLOP/s of a device)

Matmul parameters are the projections of attention and feed-forward and the output layer, tied or not; looking up an
embedding multiplies nothing. Of a mixture of experts they are the router and the experts that a token goes through,
dropped or not. Recomputation (remat) and padding are not counted: MFU is about the model, as in PaLM (Chowdhery et al.
2022, appendix B), which counts attention without the causal half. Document masks are not counted either, so packed
short documents flatter the figure.
"""

import re

from jaxlm.config.schema import ModelConfig

PEAK_FLOPS: dict[str, dict[str, float]] = {
    # https://docs.cloud.google.com/tpu/docs: of a JAX device, which is a chip, but half a chip for v2, v3 and 7x.
    "TPU v2": {"bfloat16": 46e12 / 2},
    "TPU v3": {"bfloat16": 123e12 / 2},
    "TPU v4": {"bfloat16": 275e12},
    "TPU v5": {"bfloat16": 459e12},  # how v5p calls itself
    "TPU v5p": {"bfloat16": 459e12},
    "TPU v5e": {"bfloat16": 197e12},
    "TPU v5 lite": {"bfloat16": 197e12},
    "TPU v6e": {"bfloat16": 918e12},
    "TPU v6 lite": {"bfloat16": 918e12},
    "TPU7x": {"bfloat16": 2307e12 / 2},
    # NVIDIA data sheets, without sparsity; float32 is TF32 where the tensor cores have it.
    "Tesla V100": {"float16": 125e12, "float32": 15.7e12},
    "Tesla T4": {"float16": 65e12, "float32": 8.1e12},
    "NVIDIA A10": {"bfloat16": 125e12, "float16": 125e12, "float32": 62.5e12},
    "NVIDIA A10G": {"bfloat16": 70e12, "float16": 70e12, "float32": 35e12},
    "NVIDIA A100": {"bfloat16": 312e12, "float16": 312e12, "float32": 156e12},
    "NVIDIA L4": {"bfloat16": 121e12, "float16": 121e12, "float32": 60e12},
    "NVIDIA L40S": {"bfloat16": 362e12, "float16": 362e12, "float32": 183e12},
    "NVIDIA H100": {"bfloat16": 989e12, "float16": 989e12, "float32": 494.5e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float16": 756e12, "float32": 378e12},
    "NVIDIA H100 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417.5e12},
    "NVIDIA H200": {"bfloat16": 989e12, "float16": 989e12, "float32": 494.5e12},
    "NVIDIA H200 NVL": {"bfloat16": 835e12, "float16": 835e12, "float32": 417.5e12},
    "NVIDIA GH200": {"bfloat16": 989e12, "float16": 989e12, "float32": 494.5e12},
    "NVIDIA B200": {"bfloat16": 2250e12, "float16": 2250e12, "float32": 1125e12},
    "NVIDIA GB200": {"bfloat16": 2500e12, "float16": 2500e12, "float32": 1250e12},
}
"""Start of `device.device_kind` -> dtype of the matmul's inputs -> dense peak FLOP/s of one JAX device.

A TPU multiplies float32 in one bfloat16 pass at JAX's default precision, so its float32 peak is that of bfloat16.
"""


RELATIVE_BUCKETS = 32
"""Of relative positions, in each stack (`models.relative`)."""


def matmul_parameters(model: ModelConfig, vocabulary: int, share: float = 1.0) -> int | float:
    """Parameters that a token is multiplied with.

    Args:
        share: of an encoder-decoder, tokens that are written for each that is read; here and below.
    """
    if model.architecture == "encoder_decoder":
        query, kv = _attention_widths(model)
        read = model.layers * (_attention_kernels(model) + _mlp_kernels(model) + model.embed * 2 * kv)
        written = model.layers * (_attention_kernels(model) + _mlp_kernels(model) + model.embed * 2 * query)
        return read + share * (written + model.embed * vocabulary)
    transform = 0 if model.causal else model.embed**2
    return model.layers * (_attention_kernels(model) + _mlp_kernels(model)) + transform + model.embed * vocabulary


def parameter_count(model: ModelConfig, vocabulary: int) -> int:
    """All parameters, for a vocabulary without padding."""
    embed, (query, kv) = model.embed, _attention_widths(model)
    norm = embed * (2 if model.norm == "layer" else 1)
    qk_norms = {"none": 0, "head": 2 * model.head_width, "projection": query + kv}[model.qk_norm]
    block = _attention_kernels(model) + qk_norms
    block += norm * (4 if model.norm_placement == "sandwich" else 2)
    block += (query + 2 * kv) * ("qkv" in model.biases) + embed * ("output" in model.biases)
    block += max(model.experts, 1) * _mlp_parameters(model, model.mlp)
    if model.experts:
        block += (embed + (model.balance_rate > 0)) * model.experts
        block += _mlp_parameters(model, model.mlp * model.shared_experts) if model.shared_experts else 0
    tables = embed * vocabulary * (1 if model.tied else 2)
    tables += embed * model.max_positions * (model.positions == "learned") + embed * model.token_types
    if model.architecture == "encoder_decoder":
        cross = _attention_kernels(model) + qk_norms + norm * (2 if model.norm_placement == "sandwich" else 1)
        cross += (query + 2 * kv) * ("qkv" in model.biases) + embed * ("output" in model.biases)
        return model.layers * (2 * block + cross) + 2 * norm + tables + 2 * RELATIVE_BUCKETS * model.heads
    transform = 0 if model.causal else embed * (embed + 1) + norm + vocabulary
    return model.layers * block + norm + tables + transform


def attention_flops_per_token(model: ModelConfig, sequence_length: int, share: float = 1.0) -> float:
    """Forward and backward FLOPs of one token's logits and weighted values, over all layers."""
    if model.architecture == "encoder_decoder":
        keys = sequence_length * (1 + share + share * share / 2)
        return 12 * model.heads * model.head_width * model.layers * keys
    windows = [model.windows[i % len(model.windows)] if model.windows else 0 for i in range(model.layers)]
    mean_keys = 0.0
    for window in windows:
        seen = min(window or sequence_length, sequence_length)
        mean_keys += seen - seen * seen / (2 * sequence_length) if model.causal else seen
    return 12 * model.heads * model.head_width * mean_keys


def flops_per_token(model: ModelConfig, vocabulary: int, sequence_length: int, share: float = 1.0) -> float:
    """Training FLOPs of one token, forward and backward, by the formula at the head of this file."""
    return 6 * matmul_parameters(model, vocabulary, share) + attention_flops_per_token(model, sequence_length, share)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Dense peak FLOP/s of one JAX device, from its `device_kind`; None where we do not know it.

    A slice of a GPU (MIG) is unknown: its share depends on how it was cut.
    """
    if re.search(r"\bMIG\b", device_kind):
        return None
    names = [name for name in PEAK_FLOPS if re.match(re.escape(name) + r"(?!\w| lite)", device_kind)]
    if not names:
        return None
    peaks = PEAK_FLOPS[max(names, key=len)]
    if device_kind.startswith("TPU") and dtype == "float32":
        dtype = "bfloat16"
    return peaks.get(dtype)


def mfu(flops_per_token: float | int, tokens_per_second: float | int, devices: int, peak: float | None) -> float | None:
    """Share (0 to 1) of the devices' peak that the model's FLOPs use; None where the peak is not known."""
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak)


def explain(
    model: ModelConfig, vocabulary: int, sequence_length: int, device_kind: str, dtype: str, share: float = 1.0
) -> str:
    """The arithmetic behind the MFU of a run, in one line; says so where the peak is not known."""
    parameters, half = matmul_parameters(model, vocabulary, share), " (causal half)" if model.causal else ""
    if model.architecture == "encoder_decoder":
        half = f", {share:.3f} tokens written for each read"
    attention = attention_flops_per_token(model, sequence_length, share)
    total = flops_per_token(model, vocabulary, sequence_length, share)
    peak = peak_flops(device_kind, dtype)
    work = f"{total / 1e9:.2f} GFLOP" if total >= 1e9 else f"{total / 1e6:.1f} MFLOP"
    of_peak = (
        f"peak {peak / 1e12:g} TFLOP/s a device ({device_kind}, {dtype}, dense)"
        if peak
        else f"no mfu: the peak of {device_kind!r} in {dtype} is not known"
    )
    return (
        f"6 x {parameters / 1e6:.1f}M matmul parameters + {attention / 1e6:.1f} MFLOP attention{half} "
        f"= {work} a token; {of_peak}"
    )


def _attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths of all queries and of all keys together."""
    return model.heads * model.head_width, model.key_value_heads * model.head_width


def _attention_kernels(model: ModelConfig) -> int:
    query, kv = _attention_widths(model)
    return model.embed * (2 * query + 2 * kv)


def _mlp_kernels(model: ModelConfig) -> int:
    """Parameters of the feed-forward layer that a token is multiplied with."""
    one = model.embed * model.mlp * (3 if model.gated else 2)
    if not model.experts:
        return one
    return one * (model.experts_per_token + model.shared_experts) + model.embed * model.experts


def _mlp_parameters(model: ModelConfig, width: int) -> int:
    """All parameters of one feed-forward layer of this width."""
    inwards = 2 if model.gated else 1
    return model.embed * width * (inwards + 1) + (width * inwards + model.embed) * ("mlp" in model.biases)
