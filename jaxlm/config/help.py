"""`--help` from the schema: each key with its type, default and choices, and the docstring that stands under it."""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from functools import cache
from typing import Any, get_type_hints

from jaxlm.config.effects import condition
from jaxlm.config.errors import UserError
from jaxlm.config.values import choices, is_section, noun, option, text


def render(cls: type, flags: Mapping[str, str], topic: str = "") -> str:
    """The help text of a verb whose configuration is the dataclass `cls`.

    Args:
        cls: the dataclass; the string under a field says what it means, with its unit.
        flags: flag -> what it does.
        topic: show only keys that contain this.
    """
    width = min(shutil.get_terminal_size((110, 24)).columns, 120)
    wanted = topic.strip("-").replace("-", "_")
    blocks = []
    for title, key, kind, default, meaning in _entries(cls):
        if wanted in key:
            parts = (meaning, condition(key), "" if "(default: " in meaning else default)
            blocks.append((title, _usage(key, kind), " ".join(part for part in parts if part)))
    if not blocks:
        raise UserError(f"--help={topic[:80]!r}: no key has that in its name; write --help for all")
    if not topic:
        extra = {"config=RECIPE": "A YAML file of these keys, or the name of one in configs/; options override it."}
        extra |= {**flags, "help[=WORD]": "This text, or the keys with WORD in their name."}
        blocks += [("The command", f"--{flag}", meaning) for flag, meaning in extra.items()]
    lines = [_summary(cls)] if not topic else []
    section = None
    for title, head, body in blocks:
        if title != section:
            lines += ["", title] if lines else [title]
            section = title
        lines.append(f"  {head}")
        lines += textwrap.wrap(body, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


@cache
def meanings(cls: type) -> dict[str, str]:
    """Field -> the string that stands under it in the source of the dataclass."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for line, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(below, ast.Expr):
            found[line.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def _entries(cls: type, prefix: str = "", title: str = "Options") -> Iterator[tuple[str, str, Any, str, str]]:
    hints = get_type_hints(cls)
    own = [f for f in fields(cls) if not is_section(hints[f.name])]
    for f in own:
        yield title, prefix + f.name, hints[f.name], _default(f), meanings(cls).get(f.name, "")
    for f in fields(cls):
        if f not in own:
            section = f"{prefix}{f.name}: {_summary(hints[f.name])}"
            yield from _entries(hints[f.name], f"{prefix}{f.name}.", section)


def _usage(key: str, kind: Any) -> str:
    if kind is bool:
        section, _, last = option(key)[2:].rpartition(".")
        return f"{option(key)}, --{section + '.' if section else ''}no-{last}"
    return f"{option(key)}={_placeholder(kind)}"


def _placeholder(kind: Any) -> str:
    if choices(kind):
        return "{" + ",".join(choices(kind)) + "}"
    words = {"a whole number": "INT", "a number": "FLOAT", "text": "TEXT"}
    name = noun(kind).replace(", or several with commas between", ",...")
    for long, short in words.items():
        name = name.replace(long, short)
    return name.replace(" or none", "|none")


def _default(field: Field) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "(required)"
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    if default is None:
        return ""  # the field's own text says what none means
    if isinstance(default, str) and (default != default.strip() or not default):
        return f"(default: {default!r})"
    return f"(default: {text(default) or 'empty'})"


def _summary(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or cls.__name__).partition("\n")[0]
