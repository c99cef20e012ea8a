"""T5 (Raffel et al. 2020) and T5 v1.1: an encoder-decoder with relative positions. The two differ in the feed-forward
layer and in the output layer: that of T5 is the embedding, and reads what is scaled by embed ** -0.5."""

from dataclasses import dataclass
from typing import Any

from jaxlm.config.schema import ModelConfig
from jaxlm.models.families.entries import ACTIVATIONS, Key, checked
from jaxlm.models.families.family import Family, Json, Row
from jaxlm.models.relative import BUCKETS, FAR

GATED = "gated-"


@dataclass(frozen=True)
class Layers:
    """As many in the decoder as in the encoder."""

    def read(self, json: Json) -> dict[str, Any]:
        layers = checked(json, "num_layers", int, json.take("num_layers"))
        if json.take("num_decoder_layers", None) not in (None, layers):
            raise json.refuse("num_decoder_layers", f"is not num_layers={layers}: both stacks have as many with us")
        return {"layers": layers}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"num_layers": model.layers, "num_decoder_layers": model.layers}


@dataclass(frozen=True)
class FeedForward:
    """The nonlinearity, and whether it is a gate: "relu", "gated-gelu"."""

    def read(self, json: Json) -> dict[str, Any]:
        given = json.take("feed_forward_proj", "relu")
        gated = isinstance(given, str) and given.startswith(GATED)
        name = "gelu_new" if given == "gated-gelu" else given[len(GATED) :] if gated else given
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise json.refuse(
                "feed_forward_proj", f"is not one of {' '.join(ACTIVATIONS)}, or such with {GATED} before"
            )
        return {"activation": ACTIVATIONS[name], "gated": gated}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        name = next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)
        if model.activation == "gelu_tanh":
            name = "gelu" if model.gated else "gelu_new"
        return {"feed_forward_proj": GATED * model.gated + name}


@dataclass(frozen=True)
class Tied:
    """transformers 5 says that all are tied, and where they are not, that what the output layer reads is not scaled."""

    def read(self, json: Json) -> dict[str, Any]:
        given = {name: json.take(name, True) for name in ("tie_word_embeddings", "scale_decoder_outputs")}
        for name, value in given.items():
            checked(json, name, bool, value)
        return {"tied": all(given.values())}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"tie_word_embeddings": model.tied}


@dataclass(frozen=True)
class Dropout:
    """Of training alone: written, because transformers would take 0.1 for what is missing, and not taken over."""

    def read(self, json: Json) -> dict[str, Any]:
        return {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"dropout_rate": model.dropout}


def linear(theirs: str, ours: str, inputs: int = 1, gated: bool | None = None) -> Row:
    """A torch Linear, none of which has a bias."""
    return Row(f"{theirs}.weight", (f"{ours}.kernel",), turned=True, inputs=inputs, gated=gated)


def attention(theirs: str, ours: str) -> tuple[Row, ...]:
    """Its four kernels."""
    return (
        linear(f"{theirs}.q", f"{ours}.query"),
        linear(f"{theirs}.k", f"{ours}.key"),
        linear(f"{theirs}.v", f"{ours}.value"),
        linear(f"{theirs}.o", f"{ours}.output", inputs=2),
    )


def stack(name: str, ours: str) -> tuple[Row, ...]:
    """The tensors of the encoder or the decoder; ours begin with `ours`."""
    layer, blocks, last = f"{name}.block.{{layer}}.layer", f"{ours}blocks", 2 if name == "decoder" else 1
    mlp = f"{layer}.{last}.DenseReluDense"
    cross = (
        *attention(f"{layer}.1.EncDecAttention", f"{blocks}.cross"),
        Row(f"{layer}.1.layer_norm.weight", (f"{blocks}.cross_norm.scale",)),
    )
    return (
        *attention(f"{layer}.0.SelfAttention", f"{blocks}.attention"),
        Row(f"{layer}.0.layer_norm.weight", (f"{blocks}.attention_norm.scale",)),
        *(cross if name == "decoder" else ()),
        linear(f"{mlp}.wi", f"{blocks}.mlp.up", gated=False),
        linear(f"{mlp}.wi_0", f"{blocks}.mlp.gate", gated=True),
        linear(f"{mlp}.wi_1", f"{blocks}.mlp.up", gated=True),
        linear(f"{mlp}.wo", f"{blocks}.mlp.down"),
        Row(f"{layer}.{last}.layer_norm.weight", (f"{blocks}.mlp_norm.scale",)),
        Row(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (f"{ours}distances.embedding",)),
        Row(f"{name}.final_layer_norm.weight", (f"{ours}final_norm.scale",)),
    )


FAMILY = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    fixed={
        "architecture": "encoder_decoder",
        "norm": "rms",
        "norm_placement": "pre",
        "positions": "relative",
        "biases": (),
        "query_scale": 1.0,
    },
    entries=(
        Layers(),
        Key("embed", "d_model"),
        Key("heads", "num_heads"),
        Key("head_size", "d_kv", written=lambda model: model.head_width),
        Key("mlp", "d_ff"),
        Key("vocabulary", "vocab_size"),
        Key("norm_epsilon", "layer_norm_epsilon", 1e-6),
        FeedForward(),
        Tied(),
        Dropout(),
    ),
    rows=(
        Row("shared.weight", ("tokens.embedding",)),
        *stack("encoder", "encoder."),
        *stack("decoder", ""),
        Row("lm_head.weight", ("head.kernel",), turned=True),
    ),
    only={
        "is_encoder_decoder": True,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": FAR,
    },
    harmless=frozenset({"n_positions", "output_past", "initializer_factor", "dense_act_fn", "is_gated_act"}),
    prefix="",
    buffers=(".EncDecAttention.relative_attention_bias.weight",),  # of the first files; nothing reads it
    also=("T5WithLMHeadModel",),
    repeats={f"{name}.embed_tokens.weight": "shared.weight" for name in ("encoder", "decoder")},
)
