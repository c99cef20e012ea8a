"""BERT (Devlin et al. 2019) and what is built like it, such as MiniLM: an encoder with norms of its sums."""

from dataclasses import dataclass
from typing import Any

from jaxlm.config.schema import ModelConfig
from jaxlm.models.families.entries import Activation, Key
from jaxlm.models.families.family import Family, Json, Row

LAYER = "encoder.layer.{layer}."


def linear(theirs: str, ours: str, inputs: int = 1) -> tuple[Row, ...]:
    """A torch Linear with its bias."""
    return (
        Row(f"{theirs}.weight", (f"{ours}.kernel",), turned=True, inputs=inputs),
        Row(f"{theirs}.bias", (f"{ours}.bias",)),
    )


def norm(theirs: str, ours: str) -> tuple[Row, ...]:
    """A LayerNorm."""
    return Row(f"{theirs}.weight", (f"{ours}.scale",)), Row(f"{theirs}.bias", (f"{ours}.bias",))


def body(prefix: str, first_position: int = 0) -> tuple[Row, ...]:
    """The tensors but for those of the output layer; position 0 is row `first_position` of their table."""
    table, layer = f"{prefix}embeddings.", prefix + LAYER
    return (
        Row(f"{table}word_embeddings.weight", ("tokens.embedding",)),
        Row(f"{table}position_embeddings.weight", ("positions.embedding",), first=first_position),
        Row(f"{table}token_type_embeddings.weight", ("types.embedding",)),
        *norm(f"{table}LayerNorm", "embed_norm"),
        *linear(f"{layer}attention.self.query", "blocks.attention.query"),
        *linear(f"{layer}attention.self.key", "blocks.attention.key"),
        *linear(f"{layer}attention.self.value", "blocks.attention.value"),
        *linear(f"{layer}attention.output.dense", "blocks.attention.output", inputs=2),
        *norm(f"{layer}attention.output.LayerNorm", "blocks.attention_sum_norm"),
        *linear(f"{layer}intermediate.dense", "blocks.mlp.up"),
        *linear(f"{layer}output.dense", "blocks.mlp.down"),
        *norm(f"{layer}output.LayerNorm", "blocks.mlp_sum_norm"),
    )


@dataclass(frozen=True)
class Dropout:
    """Of training alone: written, because transformers would take 0.1 for what is missing, and not taken over."""

    def read(self, json: Json) -> dict[str, Any]:
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": 0.0}


FIXED = {
    "architecture": "encoder",
    "norm": "layer",
    "norm_placement": "sum",
    "gated": False,
    "positions": "learned",
    "tied": True,
}
ENTRIES = (
    Key("layers", "num_hidden_layers"),
    Key("embed", "hidden_size"),
    Key("heads", "num_attention_heads"),
    Key("mlp", "intermediate_size"),
    Key("vocabulary", "vocab_size"),
    Key("max_positions", "max_position_embeddings", 512),
    Key("token_types", "type_vocab_size", 2),
    Key("norm_epsilon", "layer_norm_eps", 1e-12),
    Activation(preferred="gelu_new", default="gelu"),
    Dropout(),
)
ONLY = {"tie_word_embeddings": True, "is_decoder": False, "position_embedding_type": "absolute"}
HEAD = ("transform.", "output_bias")
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

FAMILY = Family(
    name="bert",
    architecture="BertForMaskedLM",
    fixed=FIXED,
    entries=ENTRIES,
    rows=(
        *body("bert."),
        *linear("cls.predictions.transform.dense", "transform.dense"),
        *norm("cls.predictions.transform.LayerNorm", "transform.norm"),
        Row("cls.predictions.bias", ("output_bias",)),
    ),
    only=ONLY,
    harmless=frozenset(
        {
            *("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers"),
            *("pooler_size_per_head", "pooler_type"),  # of the first files; nothing reads them
        }
    ),
    prefix="bert.",
    buffers=(".position_ids",),
    also=("BertForPreTraining",),
    renamed=RENAMED,
    repeats={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    head=HEAD,
    aside=("bert.pooler.", "cls.seq_relationship."),
)
