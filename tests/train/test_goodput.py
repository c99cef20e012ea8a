"""Where the seconds of a run go, over kills and stalls."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from jaxlm.config.faultpoints import VARIABLE
from jaxlm.metrics.goodput import CATEGORIES, Goodput, describe, of_run
from jaxlm.metrics.jsonl import read
from tests.train.running import ROOT, arguments


def test_every_second_is_in_one_category(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    clock = Goodput(began=90.0)

    def spend(seconds):
        now[0] += seconds

    clock.switch("step")
    spend(5)
    with clock.within("save"):
        spend(2)
        with clock.within("eval"):
            spend(1)
    spend(3)
    clock.switch("data_wait")
    spend(0.5)
    expected = {"init": 10, "step": 8, "save": 2, "eval": 1, "data_wait": 0.5}
    assert clock.read() == dict.fromkeys(CATEGORIES, 0.0) | expected
    assert sum(clock.read().values()) == now[0] - 90


STALLS = """
import sys, time
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.data.loader import Loader
from jaxlm.train import evaluate, loop

rows, call = Loader.rows, evaluate.Evaluator.__call__

def slow_rows(self, position, start, stop):
    if self.split == "train" and position == 8 * 5:
        time.sleep(5)
    return rows(self, position, start, stop)

def slow_evaluation(self, params):
    time.sleep(1)
    return call(self, params)

Loader.rows, evaluate.Evaluator.__call__ = slow_rows, slow_evaluation
loop.run(load(RunConfig, sys.argv[1:])[0])
"""


def test_over_a_kill_and_a_restart_the_seconds_are_the_wall_clock(corpus: Path, tmp_path: Path) -> None:
    keys = arguments(corpus, tmp_path / "run", mesh="dp1", checkpoint__every=4, eval__every=0, train__steps=12)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    began = time.time()

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jaxlm.train", *keys]
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=300)

    assert start(**{VARIABLE: "step:11:kill"}).returncode == -signal.SIGKILL
    time.sleep(1.5)
    done = start()
    assert done.returncode == 0, done.stderr
    events = read(tmp_path / "run" / "events.jsonl")
    totals = of_run(events)
    assert describe(totals) in done.stdout
    assert totals["restart"] >= 1.5
    assert totals["rework"] > 0, "steps 9 and 10 were done twice"
    wall = datetime.fromisoformat(events[-1]["time"]).timestamp() - began  # up to the last line, which says it
    assert sum(totals.values()) == pytest.approx(wall, rel=0.01)


def test_stalls_are_found_where_they_are(corpus: Path, tmp_path: Path) -> None:
    keys = arguments(corpus, tmp_path / "run", mesh="dp1", checkpoint__every=0, eval__every=8, train__steps=12)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", STALLS, *keys], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    totals = of_run(read(tmp_path / "run" / "events.jsonl"))
    assert totals["data_wait"] == pytest.approx(5.0, rel=0.1)
    assert totals["eval"] >= 2.0  # two evaluations; what they take besides, compiling, is evaluation too
