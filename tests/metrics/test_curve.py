"""The loss curve as text and as a picture."""

import sys

import pytest

from jaxlm.config.errors import UserError
from jaxlm.metrics.__main__ import main
from jaxlm.metrics.curve import sparkline, summary
from jaxlm.metrics.trackers import Tracker


@pytest.fixture
def run_folder(tmp_path):
    with Tracker(tmp_path / "run") as tracker:
        for step in range(1, 101):
            tracker.log(step, {"loss": float("nan") if step == 50 else 8.0 / step})
        tracker.log(100, {"loss": 0.1}, file="eval.jsonl")
    return tmp_path / "run"


def test_sparkline():
    assert sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)], width=40)) == 40
    assert sparkline([]) == ""


def test_summary(run_folder, tmp_path):
    assert summary(run_folder).startswith("loss 8.000 █") and summary(run_folder).endswith("▁ 0.080")
    assert summary(tmp_path) == ""


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_picture(run_folder, tmp_path, capsys, suffix, start):
    pytest.importorskip("matplotlib")
    main([str(run_folder), f"--out={tmp_path}/loss.{suffix}"])
    assert (tmp_path / f"loss.{suffix}").read_bytes().startswith(start)
    assert "loss 8.000" in capsys.readouterr().out


def test_mistakes(run_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no loss in"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="no picture format '.exe'"):
        main([str(run_folder), f"--out={tmp_path}/loss.exe"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"jaxlm\[plot\]"):
        main([str(run_folder), f"--out={tmp_path}/loss.png"])
