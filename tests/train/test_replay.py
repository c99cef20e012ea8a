"""Doing steps again: bit for bit the same, and different where a bit was flipped."""

import json
import shutil
from pathlib import Path

import jax
import pytest

from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import UserError
from jaxlm.data.loader import Loader
from jaxlm.metrics.jsonl import read
from jaxlm.train.replay import Different, Replay, replay
from tests.train.running import train


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("replay") / "run"
    train(corpus, run, checkpoint__every=3, checkpoint__keep=0, model__dropout=0.1)
    return run


@pytest.mark.parametrize(("step", "said"), [(None, "7 to 8, from sample 48"), (6, "4 to 6, from sample 24")])
def test_replayed_steps_are_the_same(
    whole: Path, capsys: pytest.CaptureFixture[str], step: int | None, said: str
) -> None:
    before = sorted(str(path) for path in whole.rglob("*"))
    replay(Replay(run=str(whole), step=step))
    out = capsys.readouterr().out
    assert f"replaying steps {said}" in out and "bit for bit the same" in out and "arrays of checkpoint" in out
    assert sorted(str(path) for path in whole.rglob("*")) == before, "nothing was written"


def test_from_the_beginning(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replay(Replay(run=str(whole), step=2))
    assert "replaying steps 1 to 2, from sample 0" in capsys.readouterr().out


def test_past_data_that_was_left_out(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that went back twice; what it skipped comes between the checkpoint and the step."""
    rows, bad = Loader.rows, {*range(2 * 8, 4 * 8), *range(6 * 8, 8 * 8)}

    def poisoned(self, position, first, last):
        made = rows(self, position, first, last)
        made["loss_mask"][[position + i in bad for i in range(first, last)]] = float("nan")
        return made

    monkeypatch.setattr(Loader, "rows", poisoned)
    train(corpus, tmp_path, checkpoint__every=2, checkpoint__keep=0, train__max_skipped=2, eval__every=0)
    assert [event["to"] for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"] == [2, 4]
    for step in ("4", "6"):
        shutil.rmtree(tmp_path / "checkpoints" / step)
    replay(Replay(run=str(tmp_path), step=8))


def test_a_flipped_bit_is_found(whole: Path, tmp_path: Path) -> None:
    """The lowest bit of one weight, in a checkpoint whose checksums were made after it: what a faulty chip would do."""
    run = shutil.copytree(whole, tmp_path / "run")
    with Store(run / "checkpoints", keep=0) as store:
        leaves = json.loads(next((run / "checkpoints" / "6").glob("*/meta.json")).read_text())["leaves"]
        wanted = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
        state, meta = store.restore(6, wanted), store.meta(6)
        name = "params.blocks.mlp.up.kernel"
        bits = jax.lax.bitcast_convert_type(state[name], "uint32")
        state[name] = jax.lax.bitcast_convert_type(bits.at[0, 0, 0].set(bits[0, 0, 0] ^ 1), "float32")
        store.save(6, state, meta)
    with pytest.raises(Different, match="params.blocks.mlp.up.kernel"):
        replay(Replay(run=str(run), step=6))


def test_mistakes(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run there"):
        replay(Replay(run=str(tmp_path)))
    with pytest.raises(UserError, match="nothing of it was logged or saved"):
        replay(Replay(run=str(whole), step=9))
