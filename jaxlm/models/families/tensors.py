"""The tensors that families share, by our names and theirs (`family.Row`).

A row counts where the model has its parameters: one table serves models with and without biases, gates or an output
layer of their own.
"""

from jaxlm.models.families.family import Row

LAYER = "model.layers.{layer}."


def linear(theirs: str, ours: str, inputs: int = 1) -> tuple[Row, ...]:
    """A torch Linear of each layer and its bias."""
    return (
        Row(f"{LAYER}{theirs}.weight", (f"blocks.{ours}.kernel",), turned=True, inputs=inputs),
        Row(f"{LAYER}{theirs}.bias", (f"blocks.{ours}.bias",)),
    )


def norm(theirs: str, ours: str) -> Row:
    """An RMSNorm of each layer."""
    return Row(f"{LAYER}{theirs}.weight", (f"blocks.{ours}.scale",))


ENDS = (
    Row("model.embed_tokens.weight", ("tokens.embedding",)),
    Row("model.norm.weight", ("final_norm.scale",)),
    Row("lm_head.weight", ("head.kernel",), turned=True),
)
"""What stands before and behind the layers."""

ATTENTION = (
    *linear("self_attn.q_proj", "attention.query"),
    *linear("self_attn.k_proj", "attention.key"),
    *linear("self_attn.v_proj", "attention.value"),
    *linear("self_attn.o_proj", "attention.output", inputs=2),
    norm("self_attn.q_norm", "attention.query_norm"),
    norm("self_attn.k_norm", "attention.key_norm"),
)

MLP = (
    *linear("mlp.gate_proj", "mlp.gate"),
    *linear("mlp.up_proj", "mlp.up"),
    *linear("mlp.down_proj", "mlp.down"),
)

NORMS_BEFORE = (norm("input_layernorm", "attention_norm"), norm("post_attention_layernorm", "mlp_norm"))
NORMS_AFTER = (
    norm("post_attention_layernorm", "attention_post_norm"),
    norm("post_feedforward_layernorm", "mlp_post_norm"),
)
NORMS_AROUND = (
    norm("input_layernorm", "attention_norm"),
    norm("pre_feedforward_layernorm", "mlp_norm"),
    *NORMS_AFTER,
)


def experts(router: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """A router, and three torch Linears for each expert."""
    names = {"gate": gate, "up": up, "down": down}
    return (
        Row(f"{LAYER}{router}.weight", ("blocks.mlp.router.kernel",), turned=True),
        *(
            Row(f"{LAYER}{theirs}.weight", (f"blocks.mlp.experts.{ours}.kernel",), turned=True)
            for ours, theirs in names.items()
        ),
    )
