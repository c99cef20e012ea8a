"""Mixtral (Jiang et al. 2024): Mistral with a mixture of experts."""

from jaxlm.models.families.entries import SIZES, Activation, Key, Rope, Window, head_size, kv_heads
from jaxlm.models.families.family import REQUIRED, Family
from jaxlm.models.families.tensors import ATTENTION, ENDS, NORMS_BEFORE, experts

EXPERT = "block_sparse_moe.experts.{expert}."

FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    fixed={
        "norm": "rms",
        "gated": True,
        "positions": "rotary",
        "biases": (),
        "router": "topk_softmax",
    },
    entries=(
        *SIZES[:-1],
        Key("norm_epsilon", "rms_norm_eps", 1e-5),
        kv_heads(REQUIRED),
        head_size(),
        Key("mlp", "intermediate_size"),
        Key("experts", "num_local_experts", 8),
        Key("experts_per_token", "num_experts_per_tok", 2),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Rope(theta=1_000_000.0),
        Window(),
    ),
    rows=(
        *ENDS,
        *ATTENTION,
        *NORMS_BEFORE,
        *experts("block_sparse_moe.gate", gate=f"{EXPERT}w1", up=f"{EXPERT}w3", down=f"{EXPERT}w2"),
    ),
    only={},
)
