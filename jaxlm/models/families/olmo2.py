"""OLMo 2 (OLMo Team 2024): norms behind each sublayer, and of whole projections of queries and keys."""

from jaxlm.models.families.entries import SIZES, Activation, Biases, Key, Rope, kv_heads
from jaxlm.models.families.family import Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_AFTER

FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    fixed={
        "norm": "rms",
        "norm_placement": "post",
        "qk_norm": "projection",
        "gated": True,
        "positions": "rotary",
    },
    entries=(
        *SIZES[:-1],
        Key("norm_epsilon", "rms_norm_eps", 1e-5),
        kv_heads(),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Biases(),
        Rope(),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_AFTER),
    only={},
)
