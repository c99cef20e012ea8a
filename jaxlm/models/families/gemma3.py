"""Gemma 3's language model (Gemma Team 2025): head norms, five layers with a window to one without."""

from jaxlm.models.families.entries import (
    SIZES,
    Activation,
    Biases,
    Key,
    LayerTypes,
    QueryScale,
    RopeOfTwo,
    head_size,
    kv_heads,
)
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, MLP, NORMS_AROUND

FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fixed={
        "norm": "rms_offset",
        "norm_placement": "sandwich",
        "qk_norm": "head",
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
        Key("attention_softcap", "attn_logit_softcapping", None),
        Key("logit_softcap", "final_logit_softcapping", None),
        Activation("hidden_activation", preferred="gelu_pytorch_tanh", default="gelu_pytorch_tanh"),
        Biases(),
        QueryScale(),
        LayerTypes(lambda i, period: period > 0 and (i + 1) % period > 0, "sliding_window_pattern", 6),
        RopeOfTwo(),
    ),
    rows=(*ENDS, *ATTENTION, *MLP, *NORMS_AROUND),
    only={},
    harmless=frozenset({"_sliding_window_pattern"}),  # repeats what `layer_types` says
)
