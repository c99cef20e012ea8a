"""What the README and the pages of docs/ say is so: their commands run, and their keys, links and names exist.

The blocks of a page run in order, as they are written, in a scratch folder where `runs/default` is a finished run.
Only the size is ours: `python -m jaxlm.train`, and what `jaxlm.launch` trains, get a recipe of a tiny run in front of
the options of the page, which override it. SLOW and ELSEWHERE name the commands that are treated in another way, and
why.
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxlm.checkpoint import __main__ as checkpoint
from jaxlm.config.load import FLAGS, find_recipe, kinds, parse_recipe
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import option
from jaxlm.data.__main__ import Prepare, Show
from jaxlm.evaluate.options import Options as Evaluate
from jaxlm.generate.__main__ import GenerateConfig
from jaxlm.launch.options import Options as Launch
from jaxlm.metrics.__main__ import Options
from jaxlm.parallel.schedules import __main__ as schedules
from jaxlm.train.replay import Replay

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

SLOW = {
    "--mesh=rep2,fsdp2": "explains what sharding.md does for another mesh",
    "--mesh=cp2,dp2": "another of many small trainings",
    "--mesh=pp2,dp2": "another of many small trainings",
    "--mesh=ep2,dp2": "another of many small trainings",
    "--config=llama3_8b_fsdp32tp2_h100 --no-distributed": "compiles 8 billion parameters for 64 devices",
    "--optimizer.name=lion": "another of many small trainings",
    "--model.architecture=encoder": "another of many small trainings",  # and of an encoder_decoder
    "--data.path=docs,README.md": "trains a tokenizer and a model",
    "--mesh=dp2,fsdp2,tp2": "draws and compiles for 8 devices what sharding.md does for 4",
    "--profile.steps": "another of many small trainings",
    "JAXLM_STALL": "trains twice in two processes",
    "--remat=full": "compiles what the block before it compiled",
}
"""Blocks with these words run in the slow suite: why."""

ELSEWHERE = {
    "make": 'exec {make} -n -C "{root}" "$@"',  # it would install from the network: the targets have to exist
    "pip": "exit 0",  # it would install from the network: `test_extras` looks at what it names
}
"""Commands that a page's blocks find in our place of the real ones."""

TINY = """
model: {{layers: 2, embed: 32, heads: 4, mlp: 64}}
data: {{path: [{root}/jaxlm], cache: {cache}, vocabulary: 512, sequence_length: 32, validation: 0.1}}
train: {{steps: 20, log_every: 5}}
eval: {{batches: 2, sample_tokens: 16}}
"""

PYTHON = """#!/bin/bash
if [ "$1 $2" = "-m jaxlm.train" ] && [ "$3" != replay ]; then
  shift 2
  exec "{python}" -m jaxlm.train --config="{tiny}" "$@"  # of several recipes the last counts
fi
if [ "$1 $2" = "-m jaxlm.launch" ]; then
  words=()
  for word; do words+=("$word"); if [ "$word" = -- ]; then words+=("--config={tiny}"); fi; done
  exec "{python}" "${{words[@]}}"
fi
exec "{python}" "$@"
"""

OPTIONS = [RunConfig, GenerateConfig, Prepare, Show, Options, Launch, Evaluate, schedules.Options]
OPTIONS += [checkpoint.List, checkpoint.Show, checkpoint.Verify, checkpoint.Diff]
OPTIONS += [checkpoint.Import, checkpoint.Export, Replay]
"""What the verbs understand."""

MISTAKES = {"--optimizer.learningrate"}
"""Keys that a page shows to be wrong."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str

    @property
    def slow(self) -> bool:
        return any(words in self.text for words in SLOW)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages, in order."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    made = [Block(page, read(page)[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]
    return [block for block in made if block.language in languages]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stand-ins for commands and a finished tiny run, made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "workshop"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "runs").is_dir():
            (folder / "bin").mkdir()
            (folder / "tiny.yaml").write_text(TINY.format(root=ROOT, cache=folder / "cache"))
            scripts = {"python": PYTHON.format(python=sys.executable, tiny=folder / "tiny.yaml")}
            for name, line in ELSEWHERE.items():
                scripts[name] = "#!/bin/sh\n" + line.format(make=shutil.which("make"), root=ROOT) + "\n"
            for name, script in scripts.items():
                (folder / "bin" / name).write_text(script)
                (folder / "bin" / name).chmod(0o755)
            work = folder / "work"
            work.mkdir()
            shell("python -m jaxlm.train --mesh=dp4,tp2", work, folder)
            (work / "runs").rename(folder / "runs")
    return folder


def shell(commands: str, folder: Path, workshop: Path) -> str:
    """Run a block as a person would who pastes it, stopping at the first error; its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment |= {
        "HOME": str(workshop),
        "MPLCONFIGDIR": str(workshop / "matplotlib"),
        "PATH": f"{workshop / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    command = ["bash", "-euo", "pipefail", "-c", commands]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    output = result.stdout + result.stderr
    assert result.returncode == 0, f"{commands}\nends with {result.returncode} and prints\n{output[-4000:]}"
    return output


def run_page(page: str, folder: Path, workshop: Path, *, slow: bool) -> None:
    shutil.copytree(workshop / "runs", folder / "runs")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    for block in blocks(page, "bash", "sh", "python"):
        if block.slow == slow:
            quoted = f"python - <<'END_OF_BLOCK'\n{block.text}\nEND_OF_BLOCK"
            shell(quoted if block.language == "python" else block.text, folder, workshop)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash", "sh", "python")])
def test_commands_run(page: str, tmp_path: Path, workshop: Path) -> None:
    run_page(page, tmp_path, workshop, slow=False)


def test_the_readme_continues_further_than_the_default_run() -> None:
    (steps,) = re.findall(r"^python -m jaxlm.train --mesh=\S+ --train.steps=(\d+)$", read("README.md"), re.MULTILINE)
    assert int(steps) > RunConfig().train.steps


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(block.slow for block in blocks(page, "bash", "sh"))])
def test_slow_commands_run(page: str, tmp_path: Path, workshop: Path) -> None:
    run_page(page, tmp_path, workshop, slow=True)


def test_each_slow_command_is_somewhere() -> None:
    for words in SLOW:
        assert any(words in block.text for page in PAGES for block in blocks(page, "bash", "sh")), words


def mistakes() -> Iterator[tuple[str, str]]:
    """Commands that a page shows with the one line of error they end with."""
    for page in PAGES:
        for block in blocks(page, "text"):
            yield from re.findall(r"^\$ (python .*)\n(error: .*)$", block.text, re.MULTILINE)


@pytest.mark.parametrize(("command", "line"), sorted(set(mistakes())))
def test_mistakes_end_as_shown(command: str, line: str, tmp_path: Path) -> None:
    words = [sys.executable, *command.split()[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, f"{line}\n")


@pytest.mark.parametrize(
    "block", [b for page in PAGES for b in blocks(page, "yaml")], ids=lambda b: f"{b.page}:{b.line}"
)
def test_recipes_on_pages_are_recipes(block: Block) -> None:
    assert parse_recipe(block.text.encode(), kinds(RunConfig), block.page)


def known_options() -> set[str]:
    """Every option of every verb as it may be written."""
    found = {f"--{flag}" for flag in (*FLAGS, "config", "help")}
    for cls in OPTIONS:
        for key, kind in kinds(cls).items():
            section, _, name = option(key)[2:].rpartition(".")
            found.add(option(key))
            found |= {f"--{section + '.' if section else ''}no-{name}"} if kind is bool else set()
    return found


@pytest.mark.parametrize("page", PAGES)
def test_keys_exist(page: str) -> None:
    found = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9._-]*[a-z0-9]", read(page)))
    unknown = {key for key in found if key.replace("_", "-") not in known_options()} - MISTAKES
    assert not unknown


@pytest.mark.parametrize("page", PAGES)
def test_keys_without_dashes_exist(page: str) -> None:
    keys = kinds(RunConfig)
    sections = {key.partition(".")[0] for key in keys if "." in key}
    found = set(re.findall(rf"`((?:{'|'.join(sections)})\.[a-z0-9_.]+)`", read(page)))
    assert not {key for key in found if key not in keys and not key.endswith((".json", ".jsonl", ".py"))}


@pytest.mark.parametrize("page", PAGES)
def test_recipes_exist(page: str) -> None:
    recipe = r"--config=(?!runs/)([\w./]+)|\b((?:tiny|gpt2|llama)\w*_[a-z0-9]+_(?:cpu|[ahv]\d+))\b"
    for name in re.findall(recipe, read(page)):
        assert find_recipe(name[0] or name[1])


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", read(page))) <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_extras(page: str) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    named = re.findall(r"(?:jaxlm|'\.)\[([a-z,-]+)\]", read(page))
    assert {extra for names in named for extra in names.split(",")} <= set(extras)


def test_every_extra_is_in_the_readme() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert [extra for extra in extras if f"`{extra}`" not in read("README.md")] == []


def anchors(path: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", read(page)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_page_is_in_the_index(page: str) -> None:
    name = page.removeprefix("docs/")
    assert name == "README.md" or f"({name})" in read("docs/README.md")
    assert name == "README.md" or f"({page})" in read("README.md")


def test_each_folder_is_in_the_readme() -> None:
    folders = {path.parent.name for path in ROOT.glob("jaxlm/*/__init__.py")}
    assert folders == set(re.findall(r"^\| \d \| `(\w+)/` \|", read("README.md"), re.MULTILINE))
