"""The battery in full: its command survives what its rows do, and its page says what was measured."""

import sys
from pathlib import Path
from typing import Any

import pytest

from jaxlm.config.checks import check
from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import AXES, parse
from tests.train.matrix import Worker, main, ordered, read, sound
from tests.train.parity_page import page
from tests.train.rows import MESHES, ROWS

NAMED = "tp2 gpt"
"""What the names of the rows have in them that are tried here."""

DOCS = Path(__file__).parents[2] / "docs"

FAKE = """
import json, os, sys, time
for row in map(str.strip, sys.stdin):
    print("noise of XLA")
    if row == "fsdp2,tp2 gpt":
        print("a check failed", file=sys.stderr, flush=True)
        os.abort()
    if row == "fsdp4,tp2 gpt" and not os.path.exists(sys.argv[1]):
        time.sleep(100)
    if row == "dp4,tp2 gpt":
        print("result " + json.dumps({"failed": "ValueError: no"}), flush=True)
        continue
    error = 1e-3 if row == "dp2,tp2 gpt" else 1e-7
    print("result " + json.dumps({"loss": 1e-8, "gradient": [error, "a.b"], "parameter": [0.0, "c"]}), flush=True)
"""


@pytest.fixture
def workers(monkeypatch, tmp_path: Path) -> Path:
    """Workers that abort on a row, hang on one until the returned file exists, refuse one and are far off on one."""
    monkeypatch.setattr(Worker, "command", (sys.executable, "-c", FAKE, str(tmp_path / "awake")))
    return tmp_path / "awake"


def command(folder: Path, *more: str) -> int:
    return main([f"--out={folder / 'out.json'}", f"--page={folder / 'page.md'}", f"--only={NAMED}", "--limit=3", *more])


def results(folder: Path) -> dict[str, Any]:
    return {str(row): result for row, result in read(folder / "out.json").items()}


@pytest.mark.parametrize("jobs", ["--jobs=1", "--jobs=4"])
def test_rows_that_abort_hang_or_fail_are_rows_that_failed(workers: Path, tmp_path: Path, jobs: str) -> None:
    assert command(tmp_path, jobs) == 1
    found = results(tmp_path)
    assert found.keys() == {str(row) for row in ROWS if NAMED in str(row)}
    wrong = {name: result.get("failed") for name, result in found.items() if not sound(result)}
    assert wrong.pop("fsdp2,tp2 gpt") == "the process ended with -6: a check failed"
    assert wrong.pop("fsdp4,tp2 gpt") == "not done after 3 s"
    assert wrong.pop("dp4,tp2 gpt") == "ValueError: no"
    assert wrong == {"dp2,tp2 gpt": None}


def test_a_second_run_measures_what_is_missing_or_failed(workers: Path, tmp_path: Path, capsys) -> None:
    assert command(tmp_path) == 1
    before = capsys.readouterr().out.splitlines()
    workers.touch()
    assert command(tmp_path) == 1
    again = capsys.readouterr().out.splitlines()[:-1]
    failed = {line.split(":")[0] for line in before if "FAILED" in line or "TOO FAR" in line}
    assert {line.split(":")[0] for line in again} == failed and len(failed) < len(before) / 2
    assert sound(results(tmp_path)["fsdp4,tp2 gpt"])


def test_a_row_that_is_told_other_keys_is_another_row(workers: Path, tmp_path: Path, monkeypatch) -> None:
    workers.touch()
    command(tmp_path)
    assert "tp2 gpt" in results(tmp_path)
    monkeypatch.setitem(MESHES, "tp2", {"remat": "full"})
    assert "tp2 gpt" not in results(tmp_path)


def test_the_page_of_results(workers: Path, tmp_path: Path) -> None:
    workers.touch()
    command(tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert "| fsdp4,tp2 | gpt |  | train.microbatches=4 | 1.0e-08 | 1.0e-07 a.b | 0.0e+00 c |" in text
    assert "| gradient | 1.0e-03 | 1000% | dp2,tp2 gpt |" in text
    assert "Failed: dp4,tp2 gpt" in text and "## 2 devices" in text


def test_a_name_that_no_row_has_is_a_mistake() -> None:
    with pytest.raises(UserError, match="--only=xyz"):
        main(["--only=xyz"])


def test_rows_are_runs_that_the_command_line_would_take() -> None:
    """And no key of theirs is without effect."""
    for row in ROWS:
        check(row.config, parse(row.mesh), lambda line, row=row: pytest.fail(f"{row}: {line}"))


def test_every_axis_alone_and_every_pair_of_axes_is_compared() -> None:
    sizes = [{axis for axis, size in parse(mesh).sizes.items() if size > 1} for mesh in MESHES]
    for axis in AXES:
        assert {axis} in sizes
        for other in AXES:
            assert any({axis, other} <= held for held in sizes), (axis, other)


def test_the_page_in_docs_is_that_of_the_results_in_benchmarks() -> None:
    held = read(DOCS.parent / "benchmarks/results/parity.json")
    assert (DOCS / "parity.md").read_text() == page(ordered(held))
    assert len({row.mesh for row in held}) >= 40
