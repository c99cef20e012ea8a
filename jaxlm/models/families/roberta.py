"""RoBERTa (Liu et al. 2019): BERT with other data, whose positions begin behind the two that padding had taken."""

from jaxlm.models.families.bert import ENTRIES, FIXED, HEAD, ONLY, RENAMED, body, linear, norm
from jaxlm.models.families.family import Family, Row

PADDING = 1
"""The id of padding, which is also the last position that no token has."""

FAMILY = Family(
    name="roberta",
    architecture="RobertaForMaskedLM",
    fixed=FIXED,
    entries=ENTRIES,
    rows=(
        *body("roberta.", first_position=PADDING + 1),
        *linear("lm_head.dense", "transform.dense"),
        *norm("lm_head.layer_norm", "transform.norm"),
        Row("lm_head.bias", ("output_bias",)),
    ),
    only={**ONLY, "pad_token_id": PADDING, "hidden_act": "gelu"},  # its output layer has no other nonlinearity
    prefix="roberta.",
    buffers=(".position_ids",),
    renamed=RENAMED,
    repeats={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    head=HEAD,
    aside=("roberta.pooler.",),
)
