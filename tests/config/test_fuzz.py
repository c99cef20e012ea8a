"""Whatever a person types or puts in a recipe: it works, or it is one line."""

import contextlib

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxlm.config import mesh_spec
from jaxlm.config.checks import check, profile_window
from jaxlm.config.errors import UserError
from jaxlm.config.load import dump, items, kinds, load, parse_recipe
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import option

KEYS = kinds(RunConfig)
LONGEST_MESSAGE = 800
MANY = settings(max_examples=200)

axes = st.sampled_from([*mesh_spec.AXES, *mesh_spec.AXES.values(), "x", ""])
meshes = st.lists(st.tuples(axes, st.integers(-2, 70)).map(lambda p: f"{p[0]}{p[1]}"), max_size=5).map(",".join)
words = st.sampled_from(
    ["1", "-1", "0", "2.5", "1e9", "nan", "true", "none", "", "a,b", "1,2", "x" * 3000, "\n", "é\0"]
)
values = st.one_of(words, st.integers(-(10**20), 10**20).map(str), st.floats().map(str), st.text(max_size=20), meshes)
options = st.one_of(st.sampled_from([option(k) for k in KEYS]), st.text(max_size=12).map("--".__add__))
arguments = st.one_of(st.builds("{}={}".format, options, values), options, values)


@contextlib.contextmanager
def works_or_says_why():
    try:
        yield
    except UserError as error:
        message = str(error)
        assert message
        assert len(message.splitlines()) == 1, message
        assert message.isprintable(), message
        assert len(message) < LONGEST_MESSAGE, message


@MANY
@given(st.one_of(meshes, st.text(max_size=40)), st.integers(1, 64))
@example("dp٣", 3)
@example("dp-1,tp0", 8)
def test_meshes(text, devices):
    with works_or_says_why():
        spec = mesh_spec.parse(text)
        resolved = spec.resolve(devices)
        assert resolved.device_count == devices
        assert mesh_spec.parse(str(resolved)) == resolved


@MANY
@given(st.lists(arguments, max_size=4))
def test_command_lines(argv):
    argv = [argument for argument in argv if not argument.startswith(("--help", "-h"))]
    with works_or_says_why():
        config, _ = load(RunConfig, argv)
        assert load(RunConfig, argv)[0] == config
        assert parse_recipe(dump(config).encode(), KEYS, "x") == dict(items(config))
        check(config, mesh_spec.parse(config.mesh).resolve(8))


scalars = st.one_of(values, st.none(), st.booleans(), st.integers(), st.floats())
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from([*KEYS, "model", "data"]), st.text(max_size=6)), inner, max_size=4),
    ),
    max_leaves=8,
)


@MANY
@given(trees)
def test_recipes(tree):
    with works_or_says_why():
        parse_recipe(yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), KEYS, "recipe.yaml")


@MANY
@given(st.one_of(st.binary(max_size=200), st.text("ab:-[]{}#&*!|>'\"%@`,?\n\t 1\\U", max_size=60).map(str.encode)))
@example(b"model: {layers: *a}")
@example(b"a: &a [*a]")
@example(b'"\\UFFFFFFFF": 1')
@example(b"%YAML 9.9\n---\n")
@example(b"! [")
def test_recipes_that_are_not_yaml(raw):
    with works_or_says_why():
        parse_recipe(raw, KEYS, "recipe.yaml")


@MANY
@given(st.text("0123456789:-²٣ ", max_size=12))
def test_profile_windows(text):
    with works_or_says_why():
        first, last = profile_window(text)
        assert 1 <= first <= last
