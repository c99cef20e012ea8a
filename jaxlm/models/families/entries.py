"""The decisions that families share, each of them in both languages (`family.Entry`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from jaxlm.config.load import kinds
from jaxlm.config.schema import ModelConfig
from jaxlm.config.values import noun, read, shown, text
from jaxlm.models.families.family import REQUIRED, Entry, Json, shortest, whole_number, windows_of

KINDS = kinds(ModelConfig)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
"""Their names of nonlinearities, and ours; of several that are one, the first is written."""


@dataclass(frozen=True)
class Key:
    """A key of ours that is a field of theirs."""

    ours: str
    theirs: str
    default: Any = REQUIRED
    """Of the field, where config.json lacks it."""
    written: Callable[[ModelConfig], Any] | None = None
    """What to write (default: the key's value)."""
    also: str = ""
    """Another name of the field, in files of other versions."""

    def read(self, json: Json) -> dict[str, Any]:
        name = self.also if self.also in json.given else self.theirs
        return {self.ours: checked(json, name, KINDS[self.ours], json.take(name, self.default))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.written(model) if self.written else getattr(model, self.ours)}


def checked(json: Json, theirs: str, kind: Any, value: Any) -> Any:
    """A value of config.json, which must be of the type `kind` of the configuration."""
    allowed = int | float | bool | None if NoneType in get_args(kind) else int | float | bool
    if not isinstance(value, allowed):
        raise json.refuse(theirs, f"is not {noun(kind)}")
    return read(text(value), kind, f"config.json: {theirs}")


@dataclass(frozen=True)
class Activation:
    """The feed-forward nonlinearity."""

    theirs: str = "hidden_act"
    preferred: str = ""
    """Which of several names of one nonlinearity is written."""
    default: Any = REQUIRED

    def read(self, json: Json) -> dict[str, Any]:
        name = json.take(self.theirs, self.default)
        if not isinstance(name, str) or name not in ACTIVATIONS:
            raise json.refuse(self.theirs, f"is not one of {' '.join(ACTIVATIONS)}")
        return {"activation": ACTIVATIONS[name]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        if self.preferred and ACTIVATIONS[self.preferred] == model.activation:
            return {self.theirs: self.preferred}
        return {self.theirs: next(name for name, ours in ACTIVATIONS.items() if ours == model.activation)}


@dataclass(frozen=True)
class Biases:
    """One field for the biases of all four attention projections, and in some families one for the feed-forward's."""

    mlp: str | None = None
    """The name of the second."""

    def read(self, json: Json) -> dict[str, Any]:
        given = {theirs: checked(json, theirs, bool, json.take(theirs, False)) for theirs in self._fields}
        return {"biases": tuple(bias for theirs, ours in self._fields.items() for bias in ours if given[theirs])}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {theirs: ours[0] in model.biases for theirs, ours in self._fields.items()}

    @property
    def _fields(self) -> dict[str, tuple[str, ...]]:
        return {"attention_bias": ("qkv", "output")} | ({} if self.mlp is None else {self.mlp: ("mlp",)})


@dataclass(frozen=True)
class QueryScale:
    """Gemma's queries are multiplied by a power of a field of their own."""

    def read(self, json: Json) -> dict[str, Any]:
        value = checked(json, "query_pre_attn_scalar", float, json.take("query_pre_attn_scalar", 256))
        if value <= 0:
            raise json.refuse("query_pre_attn_scalar", "must be more than 0")
        return {"query_scale": float(value) ** -0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"query_pre_attn_scalar": whole_number((model.query_scale or model.head_width**-0.5) ** -2)}


@dataclass(frozen=True)
class Rope:
    """Rotary positions: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before.

    Written as before, which both read.
    """

    theta: float = 10000.0
    """Where config.json lacks it."""

    def read(self, json: Json) -> dict[str, Any]:
        newer, older = (_object(json, name) for name in ("rope_parameters", "rope_scaling"))
        return stretch(json, {"rope_theta": json.take("rope_theta", self.theta), **(older or newer)})

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"rope_theta": model.rope_theta, "rope_scaling": stretched(model)}


@dataclass(frozen=True)
class RopeOfTwo:
    """Gemma 3: layers with a window have a base of their own, which is never stretched."""

    theta: float = 1_000_000.0
    local: float = 10_000.0

    def read(self, json: Json) -> dict[str, Any]:
        both, scaling = (_object(json, name) for name in ("rope_parameters", "rope_scaling"))
        theta, local = json.take("rope_theta", self.theta), json.take("rope_local_base_freq", self.local)
        parts = [both.get(name) or {} for name in ("full_attention", "sliding_attention")]
        if both.keys() - {"full_attention", "sliding_attention"} or not all(isinstance(part, dict) for part in parts):
            raise json.refuse("rope_parameters", "does not say one thing of full_attention, one of sliding_attention")
        ours = stretch(json, {"rope_theta": theta, **parts[0], **scaling})
        windowed = stretch(json, {"rope_theta": local, **parts[1]})
        if windowed.keys() != {"rope_theta"}:
            raise json.refuse("rope_parameters", "stretches the layers with a window, which we do not")
        return ours | {"rope_local_theta": windowed["rope_theta"]}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "rope_theta": model.rope_theta,
            "rope_local_base_freq": model.rope_local_theta or model.rope_theta,
            "rope_scaling": stretched(model),
        }


ORIGINAL = "original_max_position_embeddings"
STRETCHES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": REQUIRED},
    "llama3": {
        "factor": REQUIRED,
        ORIGINAL: REQUIRED,
        "low_freq_factor": REQUIRED,
        "high_freq_factor": REQUIRED,
    },
    "yarn": {
        "factor": REQUIRED,
        ORIGINAL: "max_position_embeddings",
        "beta_slow": 1.0,
        "beta_fast": 32.0,
    },
}
"""Kinds of rotary stretching that we have -> their fields, each with its value where it is missing (or the field of
config.json that has it): the last two are our rope_frequencies."""


def stretch(json: Json, given: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of a set of rotary fields."""
    rest = {name: value for name, value in given.items() if value is not None}
    kind = rest.pop("rope_type", rest.get("type", "default"))
    rest.pop("type", None)
    theta = rest.pop("rope_theta")
    if rest.pop("partial_rotary_factor", 1.0) != 1.0:
        raise json.refuse("rope_parameters", "turns a part of each head, and we turn the whole")
    if not isinstance(kind, str) or kind not in STRETCHES:
        raise json.refuse("rope_scaling", f"is of kind {shown(kind)}; we have {' '.join(STRETCHES)}")
    values = []
    for name, default in STRETCHES[kind].items():
        value = rest.pop(name, json.take(default, None) if isinstance(default, str) else default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise json.refuse("rope_scaling", f"lacks a number {name}")
        values.append(checked(json, name, int if name == ORIGINAL else float, value))
    for name, value in rest.items():
        if (name, value) != ("truncate", True):
            raise json.refuse("rope_scaling", f"holds {shown(name)}={shown(value)}, which we do not know of {kind}")
    ours = {"rope_theta": checked(json, "rope_theta", float, theta)}
    if not values or values[0] == 1:
        return ours
    ours |= {"rope_scaling": kind, "rope_factor": values[0]}
    if len(values) > 1:
        ours |= {"rope_original_length": values[1], "rope_frequencies": (values[2], values[3])}
    return ours


def stretched(model: ModelConfig) -> dict[str, Any] | None:
    """`rope_scaling` of a model."""
    if model.rope_scaling == "none":
        return None
    values = (model.rope_factor, model.rope_original_length, *model.rope_frequencies)
    fields = zip(STRETCHES[model.rope_scaling], values, strict=False)
    return {"rope_type": model.rope_scaling, **dict(fields)}


def _object(json: Json, name: str) -> dict[str, Any]:
    value = json.take(name, None) or {}
    if not isinstance(value, dict):
        raise json.refuse(name, "is not an object")
    return value


@dataclass(frozen=True)
class Window:
    """One window for all layers, or none."""

    default: Any = None
    switch: str | None = None
    """The field that must be true for the window to count."""

    def read(self, json: Json) -> dict[str, Any]:
        window = _length(json, self.default, self.switch)
        return {"windows": (window,) if window else ()}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        window = _one_length(model)
        switch = {} if self.switch is None else {self.switch: window is not None}
        return {**switch, "sliding_window": window}


@dataclass(frozen=True)
class LayerTypes:
    """A window in some layers: `layer_types` names them, or else a rule of the family does."""

    rule: Callable[[int, int], bool]
    """Whether a layer has the window, by its number and the field `by`."""
    by: str
    by_default: int
    default: Any = 4096
    switch: str | None = None
    """The field that must be true for any window to count."""

    def read(self, json: Json) -> dict[str, Any]:
        layers = checked(json, "num_hidden_layers", int, json.take("num_hidden_layers"))
        if not 0 < layers <= MOST_LAYERS:
            raise json.refuse("num_hidden_layers", f"is not from 1 to {MOST_LAYERS}")
        window = _length(json, self.default, self.switch)
        by = checked(json, self.by, int, json.take(self.by, self.by_default))
        types = json.take("layer_types", None)
        if types is None:
            types = [SLIDING if window and self.rule(i, by) else FULL for i in range(layers)]
        if not isinstance(types, list) or len(types) != layers or any(name not in (SLIDING, FULL) for name in types):
            raise json.refuse("layer_types", f"is not a list of {layers} names, {FULL} or {SLIDING}")
        if SLIDING in types and not window:
            raise json.refuse("sliding_window", "is no length that counts, and layer_types asks for one")
        return {"windows": shortest([window or 0 if name == SLIDING else 0 for name in types])}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        window = _one_length(model)
        types = [SLIDING if w else FULL for w in windows_of(model)]
        switch = {} if self.switch is None else {self.switch: window is not None}
        return {**switch, "sliding_window": window or self.default, "layer_types": types}


SLIDING, FULL = "sliding_attention", "full_attention"
MOST_LAYERS = 10_000


def _length(json: Json, default: Any, switch: str | None) -> int | None:
    """`sliding_window`, where it counts."""
    given = json.take("sliding_window", default)
    window = checked(json, "sliding_window", int | None, given)
    return window if switch is None or json.take(switch, False) is True else None


def _one_length(model: ModelConfig) -> int | None:
    """The longest of the windows: that there are others, reading it back will say."""
    return max(model.windows, default=0) or None


SIZES: tuple[Entry, ...] = (
    Key("layers", "num_hidden_layers"),
    Key("embed", "hidden_size"),
    Key("heads", "num_attention_heads"),
    Key("vocabulary", "vocab_size"),
    Key("norm_epsilon", "rms_norm_eps", 1e-6),
)
"""What all but GPT-2 call by these names."""


def kv_heads(default: Any = None) -> Key:
    """Key-value heads; the family's default (None: as many as heads)."""
    return Key("kv_heads", "num_key_value_heads", default, lambda model: model.key_value_heads)


def head_size(default: int | None = None) -> Key:
    """Width of a head; the family's default (None: embed / heads)."""
    return Key("head_size", "head_dim", default, lambda model: model.head_width)
