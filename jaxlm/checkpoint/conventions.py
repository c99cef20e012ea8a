"""How a model that was imported wants to be spoken to: what stands before a text, what ends one, its chat template.

A run that was not imported, or whose tokenizer is another by now, has none of this: its documents began with nothing
and ended with the end of a document.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import safetensors
from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited
from jaxlm.config.load import IMPORTED
from jaxlm.config.schema import RunConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer

MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Of one run."""

    prefix: tuple[int, ...] = ()
    """Ids before a text."""
    stops: tuple[int, ...]
    """Ids that end a text; the tokenizer's end of a document is the first."""
    max_length: int
    """Tokens of the longest text that the model is meant for."""
    template: str | None = None
    """Jinja source that makes a text of the messages of a conversation."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by what templates call them: bos_token, eos_token, ..."""

    def begun(self, tokenizer: Tokenizer) -> int:
        """The id that stands for the beginning of a text where there must be one: bos, or else the end of the last."""
        bos = tokenizer.id_of(self.names.get("bos_token", ""))
        return self.stops[0] if bos is None else bos


def read(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> Conventions:
    """Those of the run in `folder`.

    Raises:
        UserError: a file that came with the model is damaged.
    """
    model, kept = config.model, folder / IMPORTED
    length = model.max_positions if model.positions == "learned" else config.data.sequence_length
    if not same_tokenizer(folder, tokenizer):
        return Conventions(stops=(tokenizer.eos_id,), max_length=length)
    given, said = _json(kept / "config.json"), _json(kept / "tokenizer_config.json")
    names = {key: _name(value) for key, value in said.items() if key.endswith("_token") and _name(value)}
    generation = kept / "generation_config.json"
    ends = _ids((_json(generation) if generation.is_file() else given).get("eos_token_id"))
    known = (i for i in ends if i < (model.vocabulary or 0))
    if model.positions != "learned":
        length = next((given[key] for key in ("max_position_embeddings",) if type(given.get(key)) is int), length)
    return Conventions(
        prefix=tokenizer.prefix,  # add_bos_token of tokenizer_config.json transformers does not heed either
        stops=tuple(dict.fromkeys((tokenizer.eos_id, *known))),
        max_length=length,
        template=_template(kept, said),
        names=names,
    )


def same_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Whether the run was imported, with the tokenizer that it still has."""
    came = folder / IMPORTED / "tokenizer.json"
    return tokenizer is not None and came.is_file() and tokenizers.load(came).digest() == tokenizer.digest()


def check_ids(source: Path, vocabulary: int) -> None:
    """Raise where generation_config.json of a model's folder names ids that a model of `vocabulary` ids has not."""
    path = source / "generation_config.json"
    if not path.is_file():
        return
    given = _json(path)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for i in _ids(given.get(key)):
            if i >= vocabulary:
                raise UserError(f"{path}: {key}={i} is none of the model's {vocabulary} ids; they are not of one model")


def _template(kept: Path, said: Mapping[str, Any]) -> str | None:
    path = kept / "chat_template.jinja"
    if path.is_file():
        cure = "import the model again"
        return read_limited(path, MAX_TEMPLATE_BYTES, str(path), unreadable=cure, too_large=cure).decode()
    found = said.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    return safetensors.read_json(path) if path.is_file() else {}


def _name(token: Any) -> str:
    """A special token, which may be described by a dictionary."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else ""


def _ids(value: Any) -> Iterator[int]:
    """One id, several or none."""
    return (i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0)
