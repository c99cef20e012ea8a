"""No ignored key: every field of the configuration is read by the code, and there are few enough to know them all."""

import ast
from pathlib import Path

from jaxlm.config.help import meanings
from jaxlm.config.load import kinds
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import is_section

CODE = Path(__file__).parents[1] / "jaxlm"
ELSEWHERE = {"config"}  # reading a key to check it or to print it is not using it
MOST_KEYS = 100


def attributes_read() -> set[str]:
    """Names read as an attribute anywhere in jaxlm/ outside config/."""
    found = set()
    for path in CODE.rglob("*.py"):
        if path.relative_to(CODE).parts[0] not in ELSEWHERE:
            nodes = ast.walk(ast.parse(path.read_text()))
            found |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return found


def test_every_key_is_read():
    read = attributes_read()
    unread = [key for key in kinds(RunConfig) if key.rpartition(".")[2] not in read]
    assert not unread, f"no code reads {unread}"


def test_few_enough_keys():
    assert len(kinds(RunConfig)) < MOST_KEYS


def sections(cls):
    yield cls
    for kind in cls.__annotations__.values():
        if is_section(kind):
            yield from sections(kind)


def test_every_key_is_explained():
    for cls in sections(RunConfig):
        own = {name for name, kind in cls.__annotations__.items() if not is_section(kind)}
        assert own <= set(meanings(cls))
        assert cls.__doc__
