"""The files of a run: valid, complete, each step once, whatever killed the run before."""

import errno
import json
import math
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.metrics import jsonl
from jaxlm.metrics.events import Events
from jaxlm.metrics.trackers import Tracker


def lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_one_object_a_line_readable_before_close(tmp_path):
    tracker = Tracker(tmp_path / "new")
    tracker.log(1, {"loss": 0.1, "tokens": 5})
    tracker.log(2, {"loss": np.float32(0.1), "mfu": None})
    tracker.log(2, {"loss": 3.0}, file="eval.jsonl")
    assert lines(tmp_path / "new" / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "tokens": 5},
        {"step": 2, "loss": float(np.float32(0.1)), "mfu": None},
    ]
    assert lines(tmp_path / "new" / "eval.jsonl") == [{"step": 2, "loss": 3.0}]
    tracker.close()
    tracker.close()


def test_lines_that_a_full_disk_refuses_come_before_the_next(tmp_path, monkeypatch):
    path, room = tmp_path / "lines.jsonl", []
    file = jsonl.JsonLines(path)
    real = file._file

    class Full:
        def write(self, data):
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(data[: room.pop()])

        def close(self):
            real.close()

    monkeypatch.setattr(file, "_file", Full())
    file.append({"step": 1})
    room.append(5)  # half a line
    file.append({"step": 2})
    assert path.read_bytes() == b'{"ste'
    room += [1000]
    file.append({"step": 3})
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    file.append({"step": 4})
    with pytest.raises(OSError, match="No space left"):
        file.close()
    assert real.closed


def test_numbers_that_json_does_not_know(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": math.nan, "grad_norm": math.inf, "low": np.float32(-np.inf)})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is line["grad_norm"] is line["low"] is None
    assert line["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "low": "-inf"}


def test_floats_come_back_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(200).astype(np.float32)
    with Tracker(tmp_path) as tracker:
        for step, value in enumerate(values):
            tracker.log(step, {"loss": value})
    assert [np.float32(line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == list(values)


def test_an_array_on_a_device_is_refused(tmp_path):
    with Tracker(tmp_path) as tracker, pytest.raises(TypeError, match="loss is a ArrayImpl"):
        tracker.log(1, {"loss": jnp.float32(1.0)})


def test_resume_sets_later_steps_and_a_cut_line_aside(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in (10, 20, 30, 40):
            tracker.log(step, {"loss": float(step)})
            tracker.log(step, {"loss": float(step)}, file="eval.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    with Tracker(tmp_path, step=20) as tracker:
        for step in (30, 40):
            tracker.log(step, {"loss": -float(step)})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path / "metrics.jsonl")] == [
        (10, 10.0),
        (20, 20.0),
        (30, -30.0),
        (40, -40.0),
    ]
    assert [line["step"] for line in lines(tmp_path / "eval.jsonl")] == [10, 20]
    superseded = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert superseded == ['{"step": 30, "loss": 30.0}', '{"step": 40, "loss": 40.0}', '{"step": 50, "lo']


@pytest.mark.parametrize("cut", range(1, 26))
def test_a_file_cut_anywhere_is_repaired(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n'[:-cut])
    with Tracker(tmp_path, step=2) as tracker:
        tracker.log(3, {"a": 3.0})
    steps = [line["step"] for line in lines(path)]
    assert steps[-1] == 3 and steps[:-1] == [1, 2][: 2 if cut == 1 else 1 if cut <= 21 else 0]


def test_other_processes_write_nothing(tmp_path):
    with Tracker(tmp_path / "run", write=False) as tracker, Events(tmp_path / "run", write=False) as events:
        tracker.log(1, {"loss": 1.0})
        events.record("start")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    with Tracker(tmp_path, tensorboard=True) as tracker:
        tracker.log(1, {"loss": 0.5, "mfu": None})
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in file.read_bytes() and b"mfu" not in file.read_bytes()


@pytest.mark.parametrize(
    ("package", "options", "extra"),
    [("tensorboardX", {"tensorboard": True}, "tensorboard"), ("wandb", {"wandb": "project"}, "wandb")],
)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, package, options, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"pip install 'jaxlm\[{extra}\]'"):
        Tracker(tmp_path, **options)


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(
            id="abc", define_metric=lambda *_, **__: None, log=calls.append, finish=lambda: calls.append("finish")
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with Tracker(tmp_path, wandb="project", config={"a": 1}) as tracker:
        tracker.log(3, {"loss": 2.0})
    assert calls[1:] == [{"step": 3, "train/loss": 2.0}, "finish"]
    assert (calls[0]["project"], calls[0]["config"], calls[0]["id"]) == ("project", {"a": 1}, None)
    Tracker(tmp_path, wandb="project").close()
    assert calls[3]["id"] == "abc" and calls[3]["resume"] == "allow"


def test_events_append_across_restarts(tmp_path):
    with Events(tmp_path) as events:
        events.record("start", step=0, mesh="dp4,tp2")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "20')
    with Events(tmp_path) as events:
        events.record("resume", step=100)
        events.record("end", exit_code=0)
    read = jsonl.read(tmp_path / "events.jsonl")
    assert [line["event"] for line in read] == ["start", "resume", "end"]
    assert read[0]["mesh"] == "dp4,tp2" and read[0]["time"].endswith("+00:00") and read[2]["seconds"] >= 0
