"""Llama 2, 3, 3.1 and 3.2 (Touvron et al. 2023), and what is built like it."""

from jaxlm.models.families.entries import SIZES, Activation, Biases, Key, Rope, head_size, kv_heads
from jaxlm.models.families.family import Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_BEFORE

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fixed={"norm": "rms", "gated": True, "positions": "rotary"},
    entries=(
        *SIZES,
        kv_heads(),
        head_size(),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Biases(mlp="mlp_bias"),
        Rope(),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_BEFORE),
    only={},
)
