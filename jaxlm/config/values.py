"""Text to typed value and back: the one reader of recipe values and of command-line values."""

import math
import re
import reprlib
from dataclasses import is_dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jaxlm.config.errors import UserError

NONE = ("none", "null", "~", "")
BOOL = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 2


def shown(value: object) -> str:
    """A value for an error message: on one line, and cut where it is long."""
    return _SHORT.repr(value)


def plain(name: str) -> str:
    """A name for an error message: as it stands where that is short and printable, else as `shown`."""
    return name if name.isprintable() and len(name) <= 80 else shown(name)


def option(key: str) -> str:
    """The command-line spelling of a key: data.batch_size is --data.batch-size, from_ (a word of Python's) --from."""
    return "--" + key.rstrip("_").replace("_", "-")


def text(value: object) -> str:
    """The command-line spelling of a value; `read` gives the value back."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(text(item) for item in value)
    return str(value)


def choices(kind: Any) -> tuple[str, ...]:
    """The values a Literal (or a Literal or None) allows; nothing for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(c for k in get_args(kind) for c in choices(k)) if get_origin(kind) in (Union, UnionType) else ()


def noun(kind: Any) -> str:
    """What a person has to write for a field of this type."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("none" if k is NoneType else noun(k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return f"{noun(get_args(kind)[0])}, or several with commas between"
    if get_origin(kind) is Literal:
        return " ".join(get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def read(value: object, kind: Any, name: str) -> Any:
    """The value of type `kind` that `value` (text, or a list of texts in a recipe) stands for; `name` is for errors."""
    if get_origin(kind) in (Union, UnionType):
        (inner,) = (k for k in get_args(kind) if k is not NoneType)
        none = isinstance(value, str) and value.strip().lower() in NONE
        return None if none else read(value, inner, name)
    if get_origin(kind) is tuple:
        return _read_tuple(value, get_args(kind)[0], name)
    if not isinstance(value, str):
        raise UserError(f"{name}={shown(value)} is not {noun(kind)}")
    if get_origin(kind) is Literal:
        return _read_choice(value, get_args(kind), name)
    return {str: _read_str, int: _read_int, float: _read_float, bool: _read_bool}[kind](value, name)


def is_section(kind: Any) -> bool:
    """Whether a field of this type holds further keys."""
    return isinstance(kind, type) and is_dataclass(kind)


def _read_tuple(value: object, kind: Any, name: str) -> tuple:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")] if value.strip() else []
        if "" in parts:
            raise UserError(f"{name}={shown(value)} has an empty item; write items with one comma between")
        return tuple(read(part, kind, name) for part in parts)
    if not isinstance(value, list):
        raise UserError(f"{name}={shown(value)} is not a list")
    return tuple(read(item, kind, name) for item in value)


def _read_choice(value: str, allowed: tuple[str, ...], name: str) -> str:
    if value in allowed:
        return value
    near = get_close_matches(value[:80].lower(), allowed, n=1, cutoff=0.0)[0]
    raise UserError(f"{name}={shown(value)} is not one of {' '.join(allowed)}; nearest is {near}")


def _read_str(value: str, name: str) -> str:
    if "\0" in value:
        raise UserError(f"{name}={shown(value)} holds a NUL character; leave it out")
    return value


def _read_int(value: str, name: str) -> int:
    if re.fullmatch(r"[+-]?\d+(_\d+)*", value.strip(), re.ASCII) and len(value) < 80:
        return int(value)
    raise UserError(f"{name}={shown(value)} is not a whole number; write it in digits, like 2000")


def _read_float(value: str, name: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{name}={shown(value)} is not a number; write it like 0.1 or 3e-4") from None
    if not math.isfinite(number):
        raise UserError(f"{name}={shown(value)} is not a finite number; write it like 0.1 or 3e-4")
    return number


def _read_bool(value: str, name: str) -> bool:
    if value.strip().lower() in BOOL:
        return BOOL[value.strip().lower()]
    raise UserError(f"{name}={shown(value)} is not true or false")
