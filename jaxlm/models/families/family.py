"""What a family of Hugging Face is to us: its config.json in our keys and back, and the names of its tensors.

A family is a table of entries, each of which knows one decision in both directions (`entries`), and a table of rows,
one for each tensor. A field of config.json that no entry asked for is refused by name, unless it is known to leave the
mathematics alone; what a `ModelConfig` says that a family has no field for is found by reading back what was written.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig
from jaxlm.config.values import option, plain, shown

HARMLESS = frozenset(
    {
        # what the file is, and by what it was written
        *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
        # how text is written with the model
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"),
        *("use_cache", "cache_implementation", "task_specific_params", "max_position_embeddings"),
        # how it is computed, and what is returned besides
        *("_attn_implementation_autoset", "attn_implementation", "pretraining_tp", "gradient_checkpointing"),
        *("return_dict", "output_hidden_states", "output_attentions", "output_router_logits", "torchscript"),
        *("chunk_size_feed_forward", "use_bfloat16"),
        # heads of classifiers
        *("id2label", "label2id", "problem_type", "finetuning_task"),
        # values at initialisation
        "initializer_range",
    }
)
"""Fields that may hold anything."""

ABSENT = {
    "is_encoder_decoder": False,
    "is_decoder": (False, True),
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
}
"""Fields of any family that may stand there with one value alone, which says that a thing is not there."""

TRAINING = frozenset(
    {
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "hidden_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
        "dropout_rate",
        *("router_aux_loss_coef", "router_jitter_noise"),
    }
)
"""Fields of the training that made the weights: they are not taken over, which is said where they are not 0."""

OURS_ALONE = ("dropout", "capacity_factor", "balance_loss", "router_z_loss")
"""Our keys of training, which a config.json has no place for: what they say is in the weights."""

REQUIRED: Any = object()


class Json:
    """The fields of a config.json, and which of them were asked for."""

    def __init__(self, given: Mapping[str, Any]):
        self.given, self.asked = given, set[str]()

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field, which may be None; `default` where the field is missing.

        Raises:
            UserError: it is missing and there is no default.
        """
        self.asked.add(name)
        if name not in self.given and default is REQUIRED:
            raise UserError(f"config.json has no {name}; take it from where the model came from")
        return self.given.get(name, default)

    def refuse(self, name: str, why: str) -> UserError:
        """The error about a field."""
        return UserError(f"config.json: {plain(name)}={shown(self.given.get(name))} {why}")


@runtime_checkable
class Entry(Protocol):
    """One decision of a model, in both languages."""

    def read(self, json: Json) -> dict[str, Any]:
        """Our keys and values of what `json` says."""

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Their fields and values of what `model` says."""


class Row(NamedTuple):
    """A tensor of theirs, for each layer and expert that its name has a place for, and the parameters it holds."""

    theirs: str
    """Name in the safetensors files: "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight"."""
    ours: tuple[str, ...]
    """Path of the parameter; of several, those that stand side by side along the last dim of theirs."""
    turned: bool = False
    """Theirs is [outputs, inputs] (torch's Linear), ours inputs first."""
    inputs: int = 1
    """Dims of ours, after layers and experts, that are inputs; those together are one dim of theirs."""
    gated: bool | None = None
    """Of models with a gate in the feed-forward layer alone, or of those without (None: of all)."""
    first: int = 0
    """The row of theirs that is our first; those before it are our last."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The models of one `model_type`."""

    name: str
    """`model_type` in config.json."""
    architecture: str
    """Class of transformers that has the output layer."""
    fixed: Mapping[str, Any]
    """Our keys that are the same in all its models."""
    entries: tuple[Entry, ...]
    rows: tuple[Row, ...]
    only: Mapping[str, Any]
    """Fields that we know with one value alone (of a tuple: any of these)."""
    harmless: frozenset[str] = frozenset()
    """Fields besides HARMLESS that leave the mathematics alone."""
    prefix: str = "model."
    """Before the names of tensors; files of a model without its output layer lack it."""
    buffers: tuple[str, ...] = (".rotary_emb.inv_freq",)
    """Endings of tensors that are no parameters: they follow from config.json."""
    also: tuple[str, ...] = ()
    """Other classes of transformers whose files are read."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Endings of tensors in files of old, and what they are called now."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Tensors that files may hold besides, and the one that each of them repeats."""
    head: tuple[str, ...] = ()
    """Beginnings of parameters of ours that files of a model without its output layer lack."""
    aside: tuple[str, ...] = ()
    """Beginnings of tensors of theirs that we do not compute with: they are kept beside the run and written again."""

    def read(self, given: Mapping[str, Any]) -> ModelConfig:
        """The model that a config.json describes.

        Raises:
            UserError: naming the field that we do not know, or that says what we cannot compute.
        """
        json, ours = Json(given), dict(self.fixed)
        classes = json.take("architectures", None) or [self.architecture]
        if not isinstance(classes, list) or not {self.architecture, self.base, *self.also} & set(map(str, classes)):
            raise json.refuse("architectures", f"is not {self.architecture}; only language models are read")
        for entry in self.entries:
            ours |= entry.read(json)
        for name, allowed in (ABSENT | dict(self.only)).items():
            value = json.take(name, None)
            several = allowed if isinstance(allowed, tuple) else (allowed,)
            if value is not None and value not in several:
                raise json.refuse(name, f"is not what we compute, which is {name}={shown(several[0])}")
        known = HARMLESS | TRAINING | self.harmless | json.asked
        for name in sorted(given.keys() - known):
            if given[name] is not None:
                raise json.refuse(name, f"is not known of {self.name}: it may change what the model computes")
        if not ours.get("windows"):
            ours.pop("rope_local_theta", None)  # of layers that there are none of
        return ModelConfig(**ours)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """config.json of `model`, whose vocabulary must be set.

        Raises:
            UserError: naming the key that this family has no field for.
        """
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        for entry in self.entries:
            written |= entry.write(model)
        written |= {name: value[0] if isinstance(value, tuple) else value for name, value in self.only.items()}
        for key, here, there in unlike(model, self.read(written)):
            raise UserError(f"{option('model.' + key)}={shown(here)} has no place in {self.name}, where it is {there}")
        return written

    @property
    def base(self) -> str:
        """The class without the output layer."""
        return re.sub("ForCausalLM|LMHeadModel|ForMaskedLM|ForConditionalGeneration", "Model", self.architecture)


def unlike(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(key, in `a`, in `b`) of what the two compute differently."""
    a, b = effective(a), effective(b)
    pairs = [(f.name, getattr(a, f.name), getattr(b, f.name)) for f in fields(ModelConfig)]
    return [(key, x, y) for key, x, y in pairs if x != y]


def effective(model: ModelConfig) -> ModelConfig:
    """`model` with every default that depends on other keys written out, and nothing of training."""
    defaults = {key: getattr(ModelConfig(), key) for key in OURS_ALONE}
    local = model.rope_local_theta
    if any(model.windows) and model.positions == "rotary" and model.rope_scaling == "none":
        local = local or model.rope_theta
    return replace(
        model,
        **defaults,
        kv_heads=model.key_value_heads,
        head_size=model.head_width,
        query_scale=model.query_scale or model.head_width**-0.5,
        rope_local_theta=local,
        windows=shortest(windows_of(model)),
        biases=tuple(sorted(set(model.biases))),
    )


def windows_of(model: ModelConfig) -> list[int]:
    """The window of each layer."""
    return [model.windows[i % len(model.windows)] if model.windows else 0 for i in range(model.layers)]


def shortest(windows: list[int]) -> tuple[int, ...]:
    """The shortest row of windows that repeats to `windows`; none where no layer has one."""
    if not any(windows):
        return ()
    repeats = (n for n in range(1, len(windows) + 1) if all(w == windows[i % n] for i, w in enumerate(windows)))
    return tuple(windows[: next(repeats)])


def whole_number(value: float) -> float | int:
    """2304.0 as 2304, which fields of whole numbers ask for."""
    near = round(value, 6)
    return int(near) if math.isfinite(near) and near == int(near) else value
