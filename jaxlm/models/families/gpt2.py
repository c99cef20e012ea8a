"""GPT-2 (Radford et al. 2019), whose kernels lie as ours do, queries, keys and values side by side in one."""

from dataclasses import dataclass
from typing import Any

from jaxlm.config.schema import ModelConfig
from jaxlm.models.families.entries import Activation, Key, checked
from jaxlm.models.families.family import Family, Json, Row

LAYER = "transformer.h.{layer}."
QKV = ("query", "key", "value")


def _norm(theirs: str, ours: str) -> tuple[Row, ...]:
    return Row(f"{theirs}.weight", (f"{ours}.scale",)), Row(f"{theirs}.bias", (f"{ours}.bias",))


def _conv(theirs: str, *ours: str, inputs: int = 1) -> tuple[Row, ...]:
    """What transformers calls Conv1D: [inputs, outputs]."""
    return (
        Row(f"{LAYER}{theirs}.weight", tuple(f"blocks.{name}.kernel" for name in ours), inputs=inputs),
        Row(f"{LAYER}{theirs}.bias", tuple(f"blocks.{name}.bias" for name in ours)),
    )


@dataclass(frozen=True)
class Dropout:
    """Of training alone: written, because transformers would take 0.1 for what is missing, and not taken over."""

    def read(self, json: Json) -> dict[str, Any]:
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}


@dataclass(frozen=True)
class Width:
    """Of the feed-forward layer: 4 x embed where it is left open."""

    def read(self, json: Json) -> dict[str, Any]:
        own = checked(json, "n_inner", int | None, json.take("n_inner", None))
        return {"mlp": own or 4 * checked(json, "n_embd", int, json.take("n_embd"))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"n_inner": model.mlp}


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    fixed={"norm": "layer", "gated": False, "positions": "learned"},
    entries=(
        Key("layers", "n_layer"),
        Key("embed", "n_embd"),
        Key("heads", "n_head"),
        Width(),
        Dropout(),
        Key("vocabulary", "vocab_size"),
        Key("max_positions", "n_positions"),
        Key("norm_epsilon", "layer_norm_epsilon", 1e-5),
        Key("tied", "tie_word_embeddings", True),
        Activation("activation_function", preferred="gelu_new", default="gelu_new"),
    ),
    rows=(
        Row("transformer.wte.weight", ("tokens.embedding",)),
        Row("transformer.wpe.weight", ("positions.embedding",)),
        Row("lm_head.weight", ("head.kernel",), turned=True),
        *_norm("transformer.ln_f", "final_norm"),
        *_norm(f"{LAYER}ln_1", "blocks.attention_norm"),
        *_norm(f"{LAYER}ln_2", "blocks.mlp_norm"),
        *_conv("attn.c_attn", *(f"attention.{name}" for name in QKV)),
        *_conv("attn.c_proj", "attention.output", inputs=2),
        *_conv("mlp.c_fc", "mlp.up"),
        *_conv("mlp.c_proj", "mlp.down"),
    ),
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    harmless=frozenset(
        {
            *("n_ctx", "reorder_and_upcast_attn"),  # said by n_positions; a matter of rounding
            *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels"),
        }
    ),
    prefix="transformer.",
    buffers=(".attn.bias", ".attn.masked_bias"),
)
