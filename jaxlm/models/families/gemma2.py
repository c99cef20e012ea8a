"""Gemma 2 (Gemma Team 2024): norms around each sublayer, capped logits, a window in every other layer."""

from jaxlm.models.families.entries import (
    SIZES,
    Activation,
    Biases,
    Key,
    LayerTypes,
    QueryScale,
    Rope,
    head_size,
    kv_heads,
)
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_AROUND

FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    fixed={
        "norm": "rms_offset",
        "norm_placement": "sandwich",
        "gated": True,
        "positions": "rotary",
        "embed_scale": True,
    },
    entries=(
        *SIZES,
        kv_heads(REQUIRED),
        head_size(256),
        Key("mlp", "intermediate_size"),
        Key("tied", "tie_word_embeddings", True),
        Key("attention_softcap", "attn_logit_softcapping", 50.0),
        Key("logit_softcap", "final_logit_softcapping", 30.0),
        Activation("hidden_activation", preferred="gelu_pytorch_tanh", default="gelu_pytorch_tanh"),
        Biases(),
        QueryScale(),
        Rope(),
        LayerTypes(lambda i, period: period > 0 and (i + 1) % period > 0, "sliding_window_pattern", 2),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_AROUND),
    only={},
    harmless=frozenset({"hidden_act"}),  # of the first files; `hidden_activation` is what counts
)
