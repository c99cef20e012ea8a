"""No ignored key: every field of the configuration is read by the code, and there are few enough to know them all."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import get_type_hints

import pytest

from jaxlm.config.help import meanings
from jaxlm.config.load import kinds
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import is_section

CODE = Path(__file__).parents[1] / "jaxlm"
NOT_A_USE = {"config"}  # reading a key to check it or to print it is not using it
MOST_KEYS = 100


def sections(cls=RunConfig):
    """The configuration's dataclasses: name of the field that holds it -> class."""
    found = {name: kind for name, kind in get_type_hints(cls).items() if is_section(kind)}
    return found | {name: kind for section in found.values() for name, kind in sections(section).items()}


def last_name(node):
    """config of `config`, data of `config.data`, None of other expressions."""
    return {ast.Name: lambda n: n.id, ast.Attribute: lambda n: n.attr}.get(type(node), lambda n: None)(node)


def fields_read(source):
    """(class, field) of the configuration for each attribute that this code reads from one of its dataclasses.

    An expression holds a dataclass if it ends in the name of its section (config.data, data), or in a name that the
    same file annotates with the class (config: DataConfig) or assigns from such an expression (data = config.data).
    """
    tree, classes = ast.parse(source), sections()
    holds = defaultdict(set)
    for name, cls in classes.items():
        holds[name].add(cls.__name__)
    names = {cls.__name__ for cls in (*classes.values(), RunConfig)}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and last_name(node.annotation) in names:
            name = node.arg if isinstance(node, ast.arg) else last_name(node.target)
            holds[name].add(last_name(node.annotation))
    for _ in range(2):  # an assignment from an assignment
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    pair = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
                    for to, value in zip(target.elts, node.value.elts, strict=True) if pair else [(target, node.value)]:
                        holds[last_name(to)] |= holds[last_name(value)] if last_name(value) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and last_name(node.value):
            for cls in holds[last_name(node.value)]:
                yield from ((cls, name) for name in properties().get((cls, node.attr), [node.attr]))


@cache
def properties():
    """(class, property) of the configuration -> the fields that it reads: to read it is to read them."""
    found = {}
    for cls in ast.parse((CODE / "config" / "schema.py").read_text()).body:
        for function in cls.body if isinstance(cls, ast.ClassDef) else ():
            if isinstance(function, ast.FunctionDef):
                reads = (n for n in ast.walk(function) if isinstance(n, ast.Attribute) and last_name(n.value) == "self")
                found[cls.name, function.name] = sorted({node.attr for node in reads})
    return found


def code():
    """Every source file of jaxlm/ outside config/."""
    paths = (path for path in CODE.rglob("*.py") if path.relative_to(CODE).parts[0] not in NOT_A_USE)
    return [path.read_text() for path in paths]


def test_every_key_is_read():
    read = {pair for source in code() for pair in fields_read(source)}
    unread = []
    for key in kinds(RunConfig):
        section, _, name = key.rpartition(".")
        owner = sections()[section.rpartition(".")[2]] if section else RunConfig
        if (owner.__name__, name) not in read:
            unread.append(key)
    assert not unread, f"no code reads {unread}"


@pytest.mark.parametrize(
    "source, pair",
    [
        ("config.data.seed", ("DataConfig", "seed")),
        ("def f(c: TrainConfig): return c.seed", ("TrainConfig", "seed")),
        ("def f(config: RunConfig): return config.remat", ("RunConfig", "remat")),
        ("m = self.config.model\nm.layers", ("ModelConfig", "layers")),
        ("config.model.head_width", ("ModelConfig", "head_size")),
        ("a, b = config.eval, config.train\nb.steps", ("TrainConfig", "steps")),
    ],
)
def test_it_sees_a_read(source, pair):
    assert pair in set(fields_read(source))


@pytest.mark.parametrize("source", ["other.seed", "config.data.seed = 1", "seed", "config.train", "f().seed"])
def test_it_sees_no_read(source):
    assert not [pair for pair in fields_read(source) if pair[1] == "seed"]


def test_few_enough_keys():
    assert len(kinds(RunConfig)) < MOST_KEYS


def test_every_key_is_explained():
    for cls in (RunConfig, *sections().values()):
        own = {name for name, kind in get_type_hints(cls).items() if not is_section(kind)}
        assert own <= set(meanings(cls))
        assert cls.__doc__
