"""A configuration from defaults, a YAML recipe and command-line overrides, in that order of precedence.

Every scalar of a recipe is taken as text and read by the type of its field, exactly as on the command line: 3e-4 is a
number, 10:13 is not a time of day, and `run: 2026` is a folder. No YAML tag builds anything but text, lists and maps.
"""

import shlex
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from keyword import iskeyword
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited
from jaxlm.config.help import render
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import BOOL, is_section, option, plain, read, shown, text

T = TypeVar("T")

FLAGS = {
    "print-config": "Print the resolved configuration as a recipe, and stop.",
    "dry-run": "Compile one step, print the memory it needs, and stop.",
    "explain": "Print every parameter with its sharding and the collectives of the compiled step, and stop.",
}
"""What a command may be asked to do instead of its work; a verb names those it knows."""

MAY_CHANGE = (
    *("mesh", "simulate", "distributed", "run", "resume", "attention", "remat"),
    *("data.batch_size", "data.cache"),
    *("optimizer.shard", "optimizer.learning_rate", "optimizer.clip_norm"),
    *("train.steps", "train.log_every", "train.microbatches", "train.loss_chunk"),
    *("train.max_skipped", "train.max_rewinds"),
    *("pipeline.", "context.", "checkpoint.", "eval.", "metrics.", "profile."),
)
"""Keys (a final dot: whole sections) that may differ when a run continues; all others define what the run computes."""

IMPORTED = "huggingface"
"""In the run folder of a model that was imported: its config.json and the tokenizer's files, as they came."""
BEGUN = "events.jsonl"
"""In the run folder: not empty once the run has begun."""

MAX_RECIPE_BYTES = 1_000_000
RECIPES = Path(__file__).parents[2] / "configs"


def load(cls: type[T], argv: Sequence[str], flags: Sequence[str] = ()) -> tuple[T, frozenset[str]]:
    """Read the command line of a verb whose configuration is the dataclass `cls`.

    Args:
        cls: a frozen keyword-only dataclass of str, int, float, bool, Literal, X | None, tuple[X, ...] and further such
            dataclasses; a field without a default must be given.
        argv: the arguments after the verb. --config=RECIPE is understood for every `cls`.
        flags: those of FLAGS that the verb knows.

    Returns:
        The configuration, and those of `flags` that were given.

    Raises:
        UserError: naming key, value and cure. SystemExit(0) after --help.
    """
    keys = kinds(cls)
    given, asked = _split(argv, keys, flags)
    if "help" in asked:
        print(render(cls, {flag: FLAGS[flag] for flag in flags}, topic=given.get("help", "")))
        raise SystemExit(0)
    recipe = given.pop("config", None)
    values = {} if recipe is None else _read_recipe(find_recipe(recipe), keys)
    values |= {key: read(value, keys[key], option(key)) for key, value in given.items()}
    return _build(cls, values), asked


def read_file(cls: type[T], path: Path) -> T:
    """The configuration in a YAML file, such as the config.yaml of a run folder."""
    return _build(cls, _read_recipe(path, kinds(cls)))


def read_run(folder: Path) -> RunConfig:
    """The configuration of the run in `folder`; raises UserError where there is none, naming the nearest."""
    if not (folder / "config.yaml").is_file():
        others = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        near = get_close_matches(folder.name, others, n=1, cutoff=0.0)
        hint = f"; nearest is --run={folder.parent / near[0]}" if near else "; train one first (python -m jaxlm.train)"
        raise UserError(f"--run={shown(str(folder))}: no run there (no config.yaml){hint}")
    return read_file(RunConfig, folder / "config.yaml")


def dump(config: Any) -> str:
    """`config` as YAML that `load` and `read_file` read back to an equal one."""
    return yaml.dump(_nested(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def items(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of `config` with its value, in the order of the schema."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_section(type(value)):
            yield from items(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


def differences(a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    """Dotted key, value in `a`, value in `b`, for each key in which two configurations of one class differ."""
    return [(key, va, vb) for (key, va), (_, vb) in zip(items(a), items(b), strict=True) if va != vb]


def kinds(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of each field of `cls`, through its sections."""
    found: dict[str, Any] = {}
    for name, kind in get_type_hints(cls).items():
        found |= kinds(kind, f"{prefix}{name}.") if is_section(kind) else {prefix + name: kind}
    return found


def check_run_folder(config: RunConfig, announce: Callable[[str], None] = lambda line: None) -> Path:
    """Make the run folder if it is missing; raise if it cannot be written or holds a run that differs.

    `announce` is told of each key that has changed and may.
    """
    folder = Path(config.run).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"run folder {shown(config.run)} cannot be written: {error.strerror}; use another --run"
        ) from None
    if not (folder / "config.yaml").exists():
        return folder
    try:
        held = read_file(RunConfig, folder / "config.yaml")
    except UserError as error:
        raise UserError(f"the run in {folder} cannot be continued: {error}; use another --run") from None
    begun = (folder / BEGUN).exists() and (folder / BEGUN).stat().st_size > 0
    imported = (folder / IMPORTED).is_dir() and not begun
    for key, old, new in differences(held, config):
        if imported and not key.startswith("model."):
            continue  # an import says what the model is, and nothing yet of its training
        if not key.startswith(tuple(k for k in MAY_CHANGE if k.endswith("."))) and key not in MAY_CHANGE:
            raise UserError(
                f"{folder} holds a run with {key}={shown(old)}, this one has {shown(new)}; "
                f"use another --run, or {option(key)}={shlex.quote(text(old)[:200])} to continue it"
            )
        announce(f"changed since this run's last start: {key} {shown(old)} -> {shown(new)}")
    return folder


def find_recipe(name: str) -> Path:
    """The file a recipe's path or bare name stands for."""
    folders = [Path("configs"), RECIPES]
    for path in [Path(name).expanduser(), *(folder / f"{name}.yaml" for folder in folders)]:
        try:
            if path.is_file():
                return path
        except (OSError, ValueError):
            break  # a name too long or too odd for the file system is no recipe
    known = sorted({path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.yaml")})
    near = get_close_matches(Path(name[-80:]).stem, known, n=1, cutoff=0.0)
    hint = f"; nearest is {near[0]}" if near else ""
    raise UserError(f"--config={shown(name)}: no such recipe{hint} (a path, or the name of a file in configs/)")


def _split(argv: Sequence[str], keys: Mapping[str, Any], flags: Sequence[str]) -> tuple[dict[str, str], frozenset[str]]:
    """Arguments to key -> text, and the flags among them. The last of several values of a key counts."""
    given: dict[str, str] = {}
    asked: set[str] = set()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == "-h":
            argument = "--help"
        if not argument.startswith("--") or len(argument) < 3:
            raise UserError(
                f"unexpected argument {shown(argument)}; options are written --key=value (--help lists them)"
            )
        name, equals, value = argument[2:].partition("=")
        key, turned_off = _key(name.replace("-", "_") + "_" * iskeyword(name), keys)
        if name.replace("_", "-") in (*flags, "help"):
            asked.add(name.replace("_", "-"))
            if equals and name != "help":
                raise UserError(f"--{name} takes no value; write --{name}")
            given |= {"help": value} if equals else {}
        elif key not in keys and key != "config":
            raise UserError(_unknown(plain(option(key)), key, keys, [*flags, "config", "help"]))
        elif turned_off:
            if equals:
                raise UserError(f"--{name} takes no value; write {option(key)}={shown(value)}")
            given[key] = "false"
        elif equals:
            given[key] = value
        elif keys.get(key) is bool:
            given[key] = rest.pop(0) if rest and rest[0].lower() in BOOL else "true"
        elif not rest or rest[0].startswith("--"):
            raise UserError(f"{option(key)} needs a value; write {option(key)}=VALUE (--help says which)")
        else:
            given[key] = rest.pop(0)
    return given, frozenset(asked)


def _key(name: str, keys: Mapping[str, Any]) -> tuple[str, bool]:
    """The key that an option names, and whether it is turned off: no_x and section.no_x are x = false."""
    section, dot, last = name.rpartition(".")
    for key, prefixed in ((name[3:], name), (section + dot + last[3:], last)):
        if prefixed.startswith("no_") and name not in keys and keys.get(key) is bool:
            return key, True
    return name, False


def _unknown(shown_as: str, key: str, keys: Mapping[str, Any], others: Sequence[str] = ()) -> str:
    """The message for a key that does not exist, with those that were probably meant."""
    section = [k for k in keys if k.startswith(f"{key}.")]
    if section:
        return f"{shown_as} is a section; name one of its keys, such as {option(section[0])} (--help lists them)"
    key = key[:80]
    last = key.rpartition(".")[2]
    lasts = {k: k.rpartition(".")[2] for k in keys}
    near = [k for k in keys if lasts[k] == last]
    near = near or get_close_matches(key, [*keys, *others], n=1)
    near = near or [k for k in keys if lasts[k] in get_close_matches(last, lasts.values(), n=1)]
    near = near or get_close_matches(key, [*keys, *others], n=1, cutoff=0.0)
    return f"unknown key {shown_as}; nearest is {' or '.join(option(k) for k in near[:3])} (--help lists all)"


def _build(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    made: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for f in fields(cls):  # type: ignore[arg-type]  # T is a dataclass by contract
        key = prefix + f.name
        if is_section(hints[f.name]):
            made[f.name] = _build(hints[f.name], values, f"{key}.")
        elif key in values:
            made[f.name] = values[key]
        elif f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{option(key)} must be given; write {option(key)}=VALUE (--help says which)")
    return cls(**made)


def _read_recipe(path: Path, keys: Mapping[str, Any]) -> dict[str, Any]:
    unreadable, too_large = "change its permissions", "a recipe is a short YAML file (--config)"
    raw = read_limited(path, MAX_RECIPE_BYTES, str(path), unreadable=unreadable, too_large=too_large)
    return parse_recipe(raw, keys, str(path))


def parse_recipe(raw: bytes, keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """YAML text to dotted key -> typed value; `name` is the file, for errors."""
    try:
        tree = _Loader(raw.decode()).get_single_data()
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; a recipe is a YAML file (--config)") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line} is not a recipe: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        problem = "nested too deep" if isinstance(error, RecursionError) else str(error).partition("\n")[0]
        raise UserError(f"{name} is not a recipe: {problem}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UserError(f"{name} is not a recipe: it holds {shown(tree)}, not `key: value` lines")
    values: dict[str, Any] = {}
    for key, value in _flat(tree or {}, keys):
        if key not in keys:
            raise UserError(f"{name}: {_unknown(shown(key), key, keys)}")
        if key in values:
            raise UserError(f"{name}: {key} stands twice; keep one")
        values[key] = read(value, keys[key], f"{name}: {key}")
    return values


def _flat(tree: Mapping[str, Any], keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = prefix + name.replace("-", "_")
        if isinstance(value, dict) and key not in keys:
            yield from _flat(value, keys, f"{key}.")
        elif value != "" or not any(k.startswith(f"{key}.") for k in keys):  # a section may stand empty
            yield key, value


def _nested(config: Any) -> dict[str, Any]:
    values = ((f.name, getattr(config, f.name)) for f in fields(config))
    return {name: _nested(value) if is_section(type(value)) else value for name, value in values}


class _Dumper(yaml.SafeDumper):
    """Lists on one line."""


_Dumper.add_representer(tuple, lambda d, items: d.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True))


class _Loader(yaml.BaseLoader):
    """Text, lists and maps only; a key that stands twice, or an alias (which can grow without bound), is an error."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not used here", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        made: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is not text", key_node.start_mark)
            if key_node.value in made:
                problem = f"{shown(key_node.value)} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            made[key_node.value] = self.construct_object(value_node, deep=True)
        return made
