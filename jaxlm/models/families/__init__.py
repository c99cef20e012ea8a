"""Families of models on Hugging Face. To add one, write a file and a line here."""

from collections.abc import Mapping
from typing import Any

from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig
from jaxlm.config.values import shown
from jaxlm.models.families import (
    bert,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen3,
    qwen3_moe,
    roberta,
    t5,
)
from jaxlm.models.families.family import Family

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "olmo2": olmo2.FAMILY,
    "mixtral": mixtral.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "t5": t5.FAMILY,
}
"""By the `model_type` of config.json."""


def of_config(given: Mapping[str, Any]) -> Family:
    """The family of a config.json.

    Raises:
        UserError: we have none of that name, or the model brings code of its own, which is never run.
    """
    if given.get("auto_map"):
        raise UserError("config.json has an auto_map: the model runs code of its own, which is never loaded")
    name = given.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"config.json: model_type={shown(name)} is not one of {' '.join(FAMILIES)}")
    return FAMILIES[name]


def of_model(model: ModelConfig) -> Family:
    """The first family that can say all of `model`, whose vocabulary must be set.

    Raises:
        UserError: none can; with what one of them cannot say.
    """
    refused = {}
    for family in FAMILIES.values():
        try:
            family.write(model)
        except UserError as error:
            refused[family.name] = str(error)
        else:
            return family
    nearest = {"encoder": "bert", "encoder_decoder": "t5"}.get(model.architecture)
    nearest = nearest or ("gpt2" if model.positions == "learned" else "llama")
    raise UserError(f"no family of Hugging Face has all of this model ({refused[nearest]})")
