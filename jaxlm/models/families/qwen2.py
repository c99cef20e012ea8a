"""Qwen 2 and 2.5 (Yang et al. 2024): biases on queries, keys and values."""

from jaxlm.models.families.entries import SIZES, Activation, Key, LayerTypes, Rope, head_size, kv_heads
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_BEFORE

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fixed={
        "norm": "rms",
        "gated": True,
        "positions": "rotary",
        "biases": ("qkv",),
    },
    entries=(
        *SIZES,
        kv_heads(REQUIRED),
        head_size(),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Rope(),
        LayerTypes(lambda i, first: i >= first, "max_window_layers", 28, switch="use_sliding_window"),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_BEFORE),
    only={},
)
