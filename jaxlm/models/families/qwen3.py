"""Qwen 3 (Yang et al. 2025): a norm of each head's queries and keys."""

from jaxlm.models.families.entries import SIZES, Activation, Biases, Key, LayerTypes, Rope, head_size, kv_heads
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_BEFORE

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fixed={"norm": "rms", "gated": True, "positions": "rotary", "qk_norm": "head"},
    entries=(
        *SIZES,
        kv_heads(REQUIRED),
        head_size(128),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Biases(),
        Rope(),
        LayerTypes(lambda i, first: i >= first, "max_window_layers", 28, switch="use_sliding_window"),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_BEFORE),
    only={},
)
