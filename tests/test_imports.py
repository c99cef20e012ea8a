"""The house rules that a machine can check: who imports whom, how long a file or a function is."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "jaxlm").rglob("*.py"))
RANKS = {"config": 0, "parallel": 1, "metrics": 1, "data": 2, "models": 2, "checkpoint": 3, "generate": 3, "train": 4}
RANKS |= {"finetune": 5, "plan": 5, "launch": 5, "evaluate": 5}
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
DISPATCHERS = {Path("jaxlm/__main__.py")}  # above the ranks: the console script runs every verb


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Each imported module or name, dotted, with its statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


def broken_rules(path: Path, source: str) -> list[str]:
    """What a file of jaxlm/ does against the rules, one line each."""
    tree, found = ast.parse(source), []
    folder = path.parts[1] if len(path.parts) > 2 else None
    top_level = set(map(id, tree.body)) | {id(n) for b in tree.body if isinstance(b, ast.If) for n in b.body}
    for node, name in imports(tree):
        where = f"{path}:{node.lineno} imports {name}"
        if name.startswith("."):
            found.append(f"{where}: write the whole path")
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "orbax") and folder == "config":
            found.append(f"{where}: config/ never imports jax")
        if name.split(".")[0] != "jaxlm" or path in DISPATCHERS:
            continue
        if id(node) not in top_level and path.name != "__main__.py":
            found.append(f"{where} inside a function")
        other = name.partition(".")[2].partition(".")[0]
        # A command puts parts of its own rank together: jaxlm.generate reads what jaxlm.checkpoint wrote.
        allowed = RANKS[folder] + (path.name == "__main__.py") if folder else 0
        if folder and other in RANKS and other != folder and RANKS[other] >= allowed:
            found.append(f"{where}: rank {RANKS[other]} from rank {RANKS[folder]}")
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        found.append(f"{path} has {lines} lines, over {LONGEST_FILE}")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                found.append(f"{path}:{node.lineno} {node.name} has {length} lines, over {LONGEST_FUNCTION}")
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_keeps_the_rules(path):
    assert not broken_rules(path, (ROOT / path).read_text())


def test_every_folder_has_a_rank():
    folders = {path.parts[1] for path in FILES if len(path.parts) > 2}
    assert folders <= set(RANKS), "give the new folder a rank here and in the design"


@pytest.mark.parametrize(
    "path, source",
    [
        ("jaxlm/config/x.py", "import jax.numpy"),
        ("jaxlm/config/x.py", "from jaxlm.parallel import mesh"),
        ("jaxlm/parallel/x.py", "import jaxlm.metrics.flops"),
        ("jaxlm/data/x.py", "from jaxlm import models"),
        ("jaxlm/data/x.py", "from ..models import build"),
        ("jaxlm/train/x.py", "def f():\n    from jaxlm.config import load"),
        ("jaxlm/train/x.py", "x = 1\n" * (LONGEST_FILE + 1)),
        ("jaxlm/train/x.py", "def f():\n" + "    x = 1\n" * LONGEST_FUNCTION),
    ],
)
def test_the_rules_catch(path, source):
    assert broken_rules(Path(path), source)


@pytest.mark.parametrize("path", ["jaxlm/train/__main__.py", "jaxlm/__main__.py"])
def test_a_command_may_import_late(path):
    assert not broken_rules(Path(path), "def main():\n    from jaxlm.train import loop")


def test_config_loads_without_jax():
    code = (
        "import sys, pkgutil, importlib, jaxlm.config as c\n"
        "[importlib.import_module(f'jaxlm.config.{m.name}') for m in pkgutil.iter_modules(c.__path__)]\n"
        "import jaxlm.__main__\n"
        "print([m for m in ('jax', 'flax', 'numpy', 'rich', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
