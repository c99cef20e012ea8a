"""Small models of each family: config.json as transformers 4 and 5 write it, and what is odd about each."""

from typing import Any

SIZES = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
WIDE = {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 12, "vocab_size": 128}
"""As many key-value heads as heads, whose width is hidden_size / heads, and a vocabulary without padding."""
BERT = {
    **{"vocab_size": 301, "hidden_size": 48, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 6},
    **{"max_position_embeddings": 64, "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"},
}
PAD = {"pad_token_id": 1}
T5 = {
    **{"vocab_size": 301, "d_model": 48, "d_kv": 10, "d_ff": 52, "num_layers": 3, "num_heads": 6},
    **{"pad_token_id": 0, "is_encoder_decoder": True},
}
ONE = {"num_key_value_heads": 1, "num_hidden_layers": 1}

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "as published": {"vocab_size": 301, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "an output layer of its own": {
            **{"vocab_size": 128, "n_embd": 30, "n_layer": 1, "n_head": 5, "n_positions": 40, "n_inner": 44},
            **{"tie_word_embeddings": False, "activation_function": "relu", "layer_norm_epsilon": 1e-4},
        },
    },
    "llama": {
        "grouped": SIZES,
        "llama3 positions, biases, tied": {
            **SIZES,
            **{"rope_theta": 500000.0, "rope_scaling": LLAMA3, "tie_word_embeddings": True},
            **{"attention_bias": True, "mlp_bias": True},
        },
        "all heads, linear positions": {**SIZES, **WIDE, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "one kv head": {**SIZES, **ONE, "hidden_act": "gelu"},
    },
    "mistral": {
        "window": {**SIZES, "sliding_window": 7},
        "no window": {**SIZES, **WIDE, "sliding_window": None, "tie_word_embeddings": True},
    },
    "qwen2": {
        "no window": {**SIZES, "use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1},
        "window above layer 1": {
            **{**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            "tie_word_embeddings": True,
        },
        "yarn": {**SIZES, **WIDE, "rope_theta": 1000000.0, "rope_scaling": YARN},
    },
    "qwen3": {
        "tied": {**SIZES, "tie_word_embeddings": True},
        "biases": {**SIZES, **WIDE, "attention_bias": True, "rope_scaling": YARN},
    },
    "gemma2": {
        "as published": {**SIZES, "query_pre_attn_scalar": 24, "sliding_window": 7},
        "no caps": {
            **{**SIZES, **WIDE, "attn_logit_softcapping": None, "final_logit_softcapping": None},
            **{"num_hidden_layers": 5, "sliding_window": 5, "attention_bias": True},
        },
    },
    "gemma3_text": {
        "as published": {
            **{**SIZES, "num_hidden_layers": 7, "sliding_window": 7, "query_pre_attn_scalar": 24},
            **{"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
        },
        "stretched": {
            **{**SIZES, "sliding_window": 5, "sliding_window_pattern": 2, "num_key_value_heads": 1},
            **{"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": False},
        },
    },
    "olmo2": {
        "grouped": {**{key: value for key, value in SIZES.items() if key != "head_dim"}, "hidden_size": 60},
        "all heads": {
            **{key: value for key, value in (SIZES | WIDE).items() if key != "head_dim"},
            **{"attention_bias": True, "rope_theta": 500000.0, "tie_word_embeddings": True},
        },
    },
    "mixtral": {
        "2 of 4": {**SIZES, "num_local_experts": 4},
        "2 of 3, window": {
            **{**SIZES, **WIDE, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6},
            "intermediate_size": 20,
        },
    },
    "qwen3_moe": {
        "3 of 5": {
            **{**SIZES, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20},
            "norm_topk_prob": True,
        },
        "weights that do not sum to 1": {
            **{**SIZES, **WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
            **{"norm_topk_prob": False, "tie_word_embeddings": True, "attention_bias": True},
        },
    },
    "bert": {
        "as published": BERT,
        "one kind of token, no padding of the vocabulary": {
            **{**BERT, "vocab_size": 128, "hidden_size": 30, "num_hidden_layers": 1, "num_attention_heads": 5},
            **{"type_vocab_size": 1, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "max_position_embeddings": 24},
        },
    },
    "roberta": {
        "as published": {**BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **PAD},
        "two kinds of tokens": {**BERT, "max_position_embeddings": 26, "num_hidden_layers": 2, **PAD},
    },
    "t5": {
        "v1.0": {**T5, "feed_forward_proj": "relu", "tie_word_embeddings": True},
        "v1.1": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "gate, tied, a vocabulary without padding": {
            **{**T5, "vocab_size": 128, "d_model": 30, "num_layers": 1, "num_heads": 5, "d_kv": 6},
            **{"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        },
        "no gate, an output layer of its own": {
            **{**T5, "num_layers": 2, "feed_forward_proj": "gelu_new", "tie_word_embeddings": False},
        },
    },
}
"""Family -> shape -> fields. The first shape of a family is in the default suite."""

ACTIVATIONS = {"gemma2": "hidden_activation", "gemma3_text": "hidden_activation"}


def config_json(family: str, shape: str) -> dict[str, Any]:
    """config.json of a shape."""
    fields = SHAPES[family][shape]
    if family in ("mistral", "mixtral"):
        fields = {"sliding_window": None, **fields}
    if family not in ("gpt2", "bert", "roberta", "t5", *ACTIVATIONS):
        fields = {"hidden_act": "silu", **fields}
    return {"model_type": family, **fields}


EVERY = [(family, shape) for family, shapes in SHAPES.items() for shape in shapes]
FIRST = [(family, next(iter(shapes))) for family, shapes in SHAPES.items()]
