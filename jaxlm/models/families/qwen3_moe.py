"""Qwen 3 with a mixture of experts in every layer (Yang et al. 2025)."""

from dataclasses import dataclass
from typing import Any

from jaxlm.config.schema import ModelConfig
from jaxlm.models.families.entries import SIZES, Activation, Biases, Key, Rope, Window, checked, head_size, kv_heads
from jaxlm.models.families.family import REQUIRED, Family, Json
from jaxlm.models.families.tensors import ATTENTION, ENDS, NORMS_BEFORE, experts

EXPERT = "mlp.experts.{expert}."


@dataclass(frozen=True)
class Router:
    """Whether the weights of a token's experts sum to 1."""

    def read(self, json: Json) -> dict[str, Any]:
        among_chosen = checked(json, "norm_topk_prob", bool, json.take("norm_topk_prob", False))
        return {"router": "topk_softmax" if among_chosen else "softmax"}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"norm_topk_prob": model.router == "topk_softmax"}


FAMILY = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fixed={"norm": "rms", "gated": True, "positions": "rotary", "qk_norm": "head"},
    entries=(
        *SIZES,
        kv_heads(REQUIRED),
        head_size(),
        Key("mlp", "moe_intermediate_size", 768),
        Key("experts", "num_experts", also="num_local_experts"),
        Key("experts_per_token", "num_experts_per_tok", 8),
        Key("tied", "tie_word_embeddings", False),
        Activation(),
        Biases(),
        Router(),
        Rope(),
        Window(default=None, switch="use_sliding_window"),
    ),
    rows=(
        *ENDS,
        *ATTENTION,
        *NORMS_BEFORE,
        *experts("mlp.gate", gate=f"{EXPERT}gate_proj", up=f"{EXPERT}up_proj", down=f"{EXPERT}down_proj"),
    ),
    only={"decoder_sparse_step": 1, "mlp_only_layers": []},
    harmless=frozenset({"intermediate_size", "max_window_layers"}),  # of layers without experts, and nothing
)
