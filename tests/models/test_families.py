"""config.json of published models is read as what they are, and nonsense in it is a line, never a traceback."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint.matching import matches
from jaxlm.config.errors import UserError
from jaxlm.models import families
from jaxlm.models.build import build
from tests.checkpoint.shapes import FIRST, config_json

COMMON = {"initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16", "attention_dropout": 0.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
PUBLISHED = {
    "gpt2": (
        124_439_808,
        {
            **{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1},
            **{"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02},
            **{"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12},
            **{"n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None},
            **{"summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index"},
            **{"summary_use_proj": True, "vocab_size": 50257},
            "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        },
        {"positions": "learned", "mlp": 3072, "tied": True, "activation": "gelu_tanh"},
    ),
    "Llama-2-7b": (
        6_738_415_616,
        {
            **{**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "pretraining_tp": 1},
            **{"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "hidden_act": "silu"},
            **{"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "vocab_size": 32000},
            **{"max_position_embeddings": 4096, "rope_scaling": None, "tie_word_embeddings": False},
        },
        {"kv_heads": 32, "rope_theta": 10000.0, "tied": False},
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            **{**COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False},
            **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "hidden_act": "silu"},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-05},
            **{"max_position_embeddings": 131072, "rope_scaling": {"factor": 32.0, **LLAMA3}, "rope_theta": 500000.0},
            **{"vocab_size": 128256, "tie_word_embeddings": True, "mlp_bias": False, "pretraining_tp": 1},
            **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "transformers_version": "4.45.0"},
        },
        {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_length": 8192, "tied": True},
    ),
    "Mistral-7B-v0.1": (
        7_241_732_096,
        {
            **{**COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"},
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096},
            **{"vocab_size": 32000, "tie_word_embeddings": False, "max_position_embeddings": 32768},
        },
        {"windows": (4096,), "kv_heads": 8},
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        {
            **{**COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
            **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
            **{"num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768},
            **{"use_sliding_window": False, "max_window_layers": 24, "use_mrope": False, "vocab_size": 151936},
            **{"tie_word_embeddings": True, "max_position_embeddings": 32768},
        },
        {"biases": ("qkv",), "windows": ()},
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            **{**COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"},
            **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
            **{"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-06, "rope_theta": 1000000},
            **{"use_sliding_window": False, "max_window_layers": 28, "sliding_window": None, "vocab_size": 151936},
            **{"tie_word_embeddings": True, "attention_bias": False, "rope_scaling": None},
        },
        {"qk_norm": "head", "head_size": 128},
    ),
    "gemma-2-2b": (
        2_614_341_888,
        {
            **{**COMMON, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False},
            **{"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"},
            **{"head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"},
            **{"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8},
            **{"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
            **{"sliding_window": 4096, "vocab_size": 256000},
        },
        {"windows": (4096, 0), "attention_softcap": 50.0, "logit_softcap": 30.0, "query_scale": 1 / 16, "tied": True},
    ),
    "gemma-3-1b": (
        999_885_952,
        {
            **{**COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False},
            **{"attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid"},
            **{"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6},
            **{"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4},
            **{"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_scaling": None},
            **{"rope_theta": 1000000, "rope_local_base_freq": 10000, "sliding_window": 512, "vocab_size": 262144},
            **{"eos_token_id": [1, 106], "bos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 32768},
        },
        {"rope_local_theta": 10000.0, "rope_theta": 1000000.0, "logit_softcap": None, "norm": "rms_offset"},
    ),
    "OLMo-2-7B": (
        7_298_617_344,
        {
            **{**COMMON, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False},
            **{"hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32},
            **{"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_theta": 500000},
            **{"rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 100352},
        },
        {"norm_placement": "post", "qk_norm": "projection"},
    ),
    "Mixtral-8x7B": (
        46_702_792_704,
        {
            **{**COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu"},
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8, "rms_norm_eps": 1e-05},
            **{"output_router_logits": False, "router_aux_loss_coef": 0.02, "rope_theta": 1000000.0},
            **{"sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000},
        },
        {"experts": 8, "experts_per_token": 2, "router": "topk_softmax", "windows": ()},
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            **{**COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu"},
            **{"decoder_sparse_step": 1, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144},
            **{"max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True},
            **{"num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48},
            **{"num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06, "rope_scaling": None},
            **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None},
            **{"tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936},
            "attention_bias": False,
        },
        {"mlp": 768, "experts": 128, "router": "topk_softmax"},
    ),
    "bert-base-uncased": (
        109_514_298,
        {
            **{
                "architectures": ["BertForMaskedLM"],
                "attention_probs_dropout_prob": 0.1,
                "gradient_checkpointing": False,
            },
            **{"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02},
            **{"intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512},
            **{"model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0},
            **{"position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0", "type_vocab_size": 2},
            **{"use_cache": True, "vocab_size": 30522},
        },
        {"architecture": "encoder", "norm_placement": "sum", "token_types": 2, "max_positions": 512, "tied": True},
    ),
    "roberta-base": (
        124_697_433,
        {
            **{"architectures": ["RobertaForMaskedLM"], "attention_probs_dropout_prob": 0.1, "bos_token_id": 0},
            **{"eos_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768},
            **{"initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "vocab_size": 50265},
            **{"max_position_embeddings": 514, "model_type": "roberta", "num_attention_heads": 12},
            **{"num_hidden_layers": 12, "pad_token_id": 1, "type_vocab_size": 1},
        },
        {"architecture": "encoder", "norm_epsilon": 1e-5, "token_types": 1, "max_positions": 514},
    ),
    "t5-small": (
        60_506_624,
        {
            **{"architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 512},
            **{"decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0},
            **{"is_encoder_decoder": True, "layer_norm_epsilon": 1e-06, "model_type": "t5", "n_positions": 512},
            **{"num_heads": 8, "num_layers": 6, "output_past": True, "pad_token_id": 0, "vocab_size": 32128},
            **{"relative_attention_num_buckets": 32, "task_specific_params": {"summarization": {"num_beams": 4}}},
        },
        {"architecture": "encoder_decoder", "activation": "relu", "gated": False, "tied": True, "query_scale": 1.0},
    ),
    "t5-v1_1-base": (
        247_577_856,
        {
            **{"architectures": ["T5ForConditionalGeneration"], "d_ff": 2048, "d_kv": 64, "d_model": 768},
            **{"decoder_start_token_id": 0, "dropout_rate": 0.1, "eos_token_id": 1, "initializer_factor": 1.0},
            **{"feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "layer_norm_epsilon": 1e-06},
            **{"model_type": "t5", "num_decoder_layers": 12, "num_heads": 12, "num_layers": 12, "output_past": True},
            **{"pad_token_id": 0, "relative_attention_num_buckets": 32, "tie_word_embeddings": False},
            **{"vocab_size": 32128},
        },
        {"architecture": "encoder_decoder", "activation": "gelu_tanh", "gated": True, "tied": False},
    ),
}
"""Model -> parameters, config.json as it is on Hugging Face, and some of what it says in our keys."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_read(name):
    count, given, expected = PUBLISHED[name]
    family = families.of_config(given)
    model = family.read(given)
    assert {key: getattr(model, key) for key in expected} == expected
    assert sum(math.prod(match.shape) for match in matches(family, build(model, None))) == count


def test_gemma_3_has_a_window_in_five_layers_of_six():
    model = families.FAMILIES["gemma3_text"].read(PUBLISHED["gemma-3-1b"][1])
    windows = [model.windows[i % len(model.windows)] for i in range(26)]
    assert windows == [0 if i % 6 == 5 else 512 for i in range(26)]


@pytest.mark.parametrize("name", families.FAMILIES)
def test_names_of_tensors_are_unique(name):
    (shape,) = [shape for family, shape in FIRST if family == name]
    family = families.FAMILIES[name]
    found = [match.name for match in matches(family, build(family.read(config_json(name, shape)), None))]
    assert len(set(found)) == len(found) and all(name.startswith((family.prefix, "lm_head.", "cls.")) for name in found)


NUMBERS = st.integers(-(2**40), 2**40) | st.floats() | st.booleans()
VALUES = st.recursive(
    st.none() | NUMBERS | st.text(max_size=4) | st.sampled_from(["linear", "llama3", "yarn", "sliding_attention"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "factor", "a"]), inner),
    max_leaves=5,
)
FIELDS = ["rope_scaling", "rope_parameters", "layer_types", "architectures", "sliding_window_pattern", "auto_map"]


@settings(max_examples=300)
@given(which=st.sampled_from(FIRST), name=st.integers(0, 40), value=VALUES)
def test_nonsense_is_a_line(which, name, value):
    given = copy.deepcopy(config_json(*which))
    names = [*given, *FIELDS]
    given[names[name % len(names)]] = value
    try:
        families.of_config(given).read(given)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
