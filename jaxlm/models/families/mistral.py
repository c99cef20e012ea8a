"""Mistral 7B (Jiang et al. 2023): Llama with a window."""

from jaxlm.models.families.entries import SIZES, Activation, Key, Rope, Window, head_size, kv_heads
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_BEFORE

FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    fixed={
        "norm": "rms",
        "gated": True,
        "positions": "rotary",
        "biases": (),
    },
    entries=(
        *SIZES,
        kv_heads(REQUIRED),
        head_size(),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Rope(),
        Window(default=REQUIRED),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_BEFORE),
    only={},
)
