"""Real kills of real processes: what is left goes on as if nothing had happened. `make kills` is this, many times."""

import json
import signal
from pathlib import Path

import pytest

from benchmarks.undisturbed import differences, write_corpus
from jaxlm.checkpoint.store import SaveFailed, Store
from jaxlm.config import faultpoints
from jaxlm.config.errors import UserError
from jaxlm.config.faultpoints import POINTS
from jaxlm.metrics.jsonl import read
from tests.train.kills import DOCUMENTS, STEPS, campaign, finish, start
from tests.train.running import ROOT, losses, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and the run that nobody disturbs."""
    made = tmp_path_factory.mktemp("kills")
    write_corpus(made / "corpus", DOCUMENTS)
    finish(made, made / "whole")
    return made


def test_one_run_killed_at_every_point(folder: Path) -> None:
    run = folder / "tokenization-and-all"  # the name gives it a cache of its own, whose tokens are still to be made
    for point in sorted(POINTS, key=lambda name: name != "tokenization"):
        code, output = start(folder, run, f"{point}:{1 if point == 'tokenization' else 2}:kill")
        assert code == -signal.SIGKILL, (point, output)
    finish(folder, run)
    assert differences(folder / "whole", run, STEPS) == []


def test_the_page_says_what_the_campaign_found() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "kills.json").read_text())["points"]
    assert [row["point"] for row in rows] == list(POINTS)
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for row in rows:
        assert row["kills"] >= 50 and row["differences"] == []
        assert f"| `{row['point']}` | {POINTS[row['point']]} | {row['kills']} | {row['runs']} | 0 |" in page


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_sample_of_the_campaign(folder: Path, point: str) -> None:
    row = campaign(folder, folder / "whole", point, kills=2, seed=1)
    assert row["kills"] == 2 and row["differences"] == []


FAILURES = [*((point, "enospc") for point in ("array-write", "data-state", "before-commit", "after-commit"))]
FAILURES += [("before-commit", "erofs")]


@pytest.mark.parametrize(("point", "error"), FAILURES)
def test_a_save_that_fails_at_any_stage_harms_nothing(
    corpus: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch,
    capsys,
    point: str,
    error: str,
) -> None:
    monkeypatch.setenv(faultpoints.VARIABLE, f"{point}:1:{error}")
    faultpoints._visits.clear()
    train(corpus, tmp_path, checkpoint__every=2, checkpoint__keep=1)
    out = capsys.readouterr().out
    assert "warning: saving checkpoint" in out and "training goes on to the next save" in out
    (fault,) = [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert fault["kind"] == "save failed"
    assert losses(tmp_path) == losses(whole)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["8"], "what failed left nothing, and later saves tidied up"


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv(faultpoints.VARIABLE, "retention:1:eio,retention:2:eio,retention:3:eio")
    faultpoints._visits.clear()
    train(corpus, tmp_path, checkpoint__every=2, checkpoint__keep=1)
    warning = f"warning: old checkpoint {tmp_path / 'checkpoints' / '2'} cannot be deleted: Input/output error"
    assert warning in capsys.readouterr().out
    assert not [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert losses(tmp_path) == losses(whole)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["8"]


def test_a_save_that_fails_unseen_takes_no_other_with_it(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """Several processes learn of it only when the next one is due: that one is made, and the run does not end."""
    monkeypatch.setenv(faultpoints.VARIABLE, "before-commit:1:enospc,before-commit:3:eio,before-commit:4:eio")
    monkeypatch.setattr(Store, "poll", lambda store: None)
    faultpoints._visits.clear()
    with pytest.raises(SaveFailed, match="saving checkpoint 8 in"):
        train(corpus, tmp_path, train__steps=12, checkpoint__every=2, checkpoint__keep=0)
    with Store(tmp_path / "checkpoints") as store:
        assert store.steps() == [4], "made although 2 had failed; 6 and 8 are two in a row"


def test_a_last_save_that_fails_is_an_event_and_an_error(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(faultpoints.VARIABLE, "before-commit:1:enospc")
    faultpoints._visits.clear()
    with pytest.raises(SaveFailed, match="saving checkpoint 2 in"):
        train(corpus, tmp_path, train__steps=2, checkpoint__every=0, eval__every=0, eval__sample_tokens=0)
    (fault,) = [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert (fault["kind"], fault["step"]) == ("save failed", 2)


@pytest.mark.parametrize("text", ["nowhere:1:kill", "step:0:kill", "step:1:explode", "step", "step:1:kill+1e9"])
def test_an_unknown_fault_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match="not POINT:VISIT:ACTION"):
        faultpoints.parse(text)
