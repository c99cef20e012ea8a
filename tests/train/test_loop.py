"""The loop as commands see it, and what it promises: nothing waits, nothing recompiles, nothing is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.checkpoint.store import SaveFailed, Store
from jaxlm.config.errors import Diverged, NoValidCheckpoint, UserError
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.metrics.jsonl import read
from jaxlm.train import loop, saving
from jaxlm.train.assemble import Assembly
from jaxlm.train.faults import alone
from tests.train.running import ROOT, arguments, losses, train


def test_a_run_leaves_its_folder(whole: Path) -> None:
    lines = read(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    promised = {"step", "loss", "grad_norm", "learning_rate", "tokens", "step_seconds", "data_wait_seconds"}
    promised |= {"tokens_per_second", "tflops_per_device", "mfu", "skipped_steps"}
    assert promised <= set(lines[-1])
    assert [line["tokens"] for line in lines] == [step * 8 * 32 for step in range(1, 9)]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    evaluations = read(whole / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [4, 8]
    # With a token a byte, bits per byte are the loss in bits, but for the ends of documents, which stand for no byte.
    assert evaluations[-1]["bits_per_byte"] == pytest.approx(evaluations[-1]["loss"] / np.log(2), rel=0.02)
    assert evaluations[-1]["perplexity"] == pytest.approx(np.exp(evaluations[-1]["loss"]))
    events = [event["event"] for event in read(whole / "events.jsonl")]
    assert [event for event in events if event != "goodput"] == ["start", "save", "save", "end"]
    assert Store(whole / "checkpoints").steps() == [4, 8]
    assert "step 8" in (whole / "samples.txt").read_text()
    assert load(RunConfig, [f"--config={whole / 'config.yaml'}"])[0].train.steps == 8


def test_a_resumed_run_is_the_same_run_bitwise(corpus: Path, whole: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path)
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path)
    assert [event["event"] for event in read(tmp_path / "events.jsonl")].count("resume") == 1
    assert losses(tmp_path) == losses(whole), "every digit of every loss"
    saved = [json.loads((run / "eval.jsonl").read_text().splitlines()[-1]) for run in (tmp_path, whole)]
    assert saved[0] == saved[1]


def test_a_run_resumes_on_another_mesh(corpus: Path, whole: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, mesh="dp2,tp2")
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path, mesh="fsdp4")
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(whole).values()), rtol=1e-5)


def test_a_finished_run_stays_finished_and_goes_on_with_more_steps(
    corpus: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(corpus, tmp_path, train__steps=4)
    train(corpus, tmp_path, train__steps=4)
    assert "4 steps are done" in capsys.readouterr().out
    train(corpus, tmp_path, train__steps=6)
    assert list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_resume_never_and_must(corpus: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume=never"):
        train(corpus, whole, resume="never")
    with pytest.raises(NoValidCheckpoint, match="resume=must"):
        train(corpus, tmp_path, resume="must")


def test_other_data_is_not_gone_on_with(corpus: Path, tmp_path: Path) -> None:
    """A position counts samples of these documents in this order: of others, some would come twice and some never."""
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    quick = {"train__steps": 4, "eval__every": 0, "eval__sample_tokens": 0}
    train(own, tmp_path / "run", **quick)
    (own / "0.txt").rename(own / "99.txt")
    with pytest.raises(UserError, match=r"checkpoint 4 of .*run was trained on other data than is there now") as raised:
        train(own, tmp_path / "run", **(quick | {"train__steps": 6}))
    assert "\n" not in str(raised.value)
    (own / "99.txt").rename(own / "0.txt")
    train(own, tmp_path / "run", **(quick | {"train__steps": 6}))
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_is_not_used(corpus: Path, tmp_path: Path, capsys) -> None:
    train(corpus, tmp_path)
    victim = next(path for path in (tmp_path / "checkpoints" / "8").rglob("d/*") if path.stat().st_size > 1000)
    content = bytearray(victim.read_bytes())
    content[500] ^= 1
    victim.write_bytes(content)
    train(corpus, tmp_path)
    text = capsys.readouterr().out
    assert "checkpoint 8 is damaged" in text and "continuing from step 4" in text
    victim.unlink(missing_ok=True)
    for manifest in (tmp_path / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(NoValidCheckpoint):
        train(corpus, tmp_path)


def test_another_model_in_the_folder_is_refused(corpus: Path, whole: Path) -> None:
    with pytest.raises(UserError, match=r"model\.embed") as raised:
        train(corpus, whole, model__embed=64)
    assert "\n" not in str(raised.value)


def test_numbers_that_stay_bad_stop_the_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="3 steps up to step 4 were not finite, and there is no checkpoint before"):
        train(
            corpus, tmp_path, train__max_skipped=3, optimizer__learning_rate=1e30, optimizer__schedule="constant",
            optimizer__clip_norm=0, optimizer__warmup_steps=0, eval__every=0,
        )  # fmt: skip
    assert [event["kind"] for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"] == ["diverged"]


def test_a_step_is_dispatched_before_the_last_one_is_read(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """A metric is read in `Run._read` alone: nothing else of the loop touches what a step returned."""
    log: list[tuple[str, int]] = []
    compile_, read_ = Assembly.compile, loop.Run._read

    def recorded(self: Assembly, *arguments):
        compiled = compile_(self, *arguments)

        def dispatch(state, batch):
            log.append(("dispatch", 1 + sum(kind == "dispatch" for kind, _ in log)))
            return compiled(state, batch)

        return dispatch

    def read_recorded(self, pending, state) -> None:
        log.append(("read", pending.step))
        read_(self, pending, state)

    monkeypatch.setattr(Assembly, "compile", recorded)
    monkeypatch.setattr(loop.Run, "_read", read_recorded)
    train(corpus, tmp_path, checkpoint__every=0, eval__every=0, eval__sample_tokens=0)
    expected = [("dispatch", 1)]
    for step in range(1, 8):
        expected += [("dispatch", step + 1), ("read", step)]
    assert log == [*expected, ("read", 8)]


def test_nothing_compiles_after_the_first_step(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    """Counts compilations between the second step and the last, through the evaluation and saves between them."""
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    counts = {}
    real = loop.Meter.count

    def count(self, waited: float) -> None:
        counts[len(counts) + 1] = len(compiled)
        real(self, waited)

    monkeypatch.setattr(loop.Meter, "count", count)
    train(corpus, tmp_path, train__steps=12, checkpoint__every=3, eval__every=3, eval__sample_tokens=0)
    assert counts[1] > 0, "the listener hears nothing"
    # The first evaluation and save, after step 3, may compile; from then on nothing does.
    assert counts[2] == counts[1] and counts[12] == counts[4], counts


def test_a_profile_of_the_asked_steps(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, profile__steps="3:4", eval__every=0, checkpoint__every=0, eval__sample_tokens=0)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_continued_within_or_after_the_window_of_its_profile_ends_well(
    corpus: Path, tmp_path: Path, capsys
) -> None:
    plain = {"eval__every": 0, "checkpoint__every": 0, "eval__sample_tokens": 0}
    train(corpus, tmp_path, train__steps=3, **plain)
    train(corpus, tmp_path, train__steps=5, profile__steps="2:5", **plain)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    train(corpus, tmp_path, train__steps=6, profile__steps="2:5", **plain)
    assert "is over before step 6" in capsys.readouterr().out
    assert Store(tmp_path / "checkpoints").steps()[-1] == 6


def test_evaluation_counts_each_held_out_token_once(corpus: Path, tmp_path: Path) -> None:
    """Whatever the batch size, and though the last batch reaches into the next epoch."""
    few = {"train__steps": 1, "data__validation": 0.05, "eval__batches": 1000, "eval__sample_tokens": 0}
    found = []
    for size in (8, 56):
        train(corpus, tmp_path / str(size), **few, data__batch_size=size, optimizer__learning_rate=0)
        found += read(tmp_path / str(size) / "eval.jsonl")
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


def test_a_corpus_that_cannot_be_split_is_not_evaluated_and_says_so(corpus: Path, tmp_path: Path, capsys) -> None:
    train(corpus, tmp_path, data__path=corpus / "0.txt", train__steps=1, data__batch_size=8)
    assert "no evaluation: a corpus of one document" in capsys.readouterr().out


def test_one_run_folder_takes_one_process(corpus: Path, tmp_path: Path) -> None:
    with alone(tmp_path, print), pytest.raises(UserError, match="another process"):
        train(corpus, tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def command(corpus: Path, run: Path, **keys: object) -> list[str]:
    return [sys.executable, "-m", "jaxlm.train", *arguments(corpus, run, **keys)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75(corpus: Path, tmp_path: Path, number: signal.Signals) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, run, train__steps=100000, checkpoint__every=0, eval__every=0),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read(run / "metrics.jsonl")) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert errors.strip().splitlines()[-1].startswith(f"error: {number.name}: saved step")
    assert "Traceback" not in errors
    step = Store(run / "checkpoints").steps()[-1]
    assert step == read(run / "metrics.jsonl")[-1]["step"]


def test_mistakes_end_in_one_line(corpus: Path, tmp_path: Path) -> None:
    mistakes = {
        "no axis 'dq'": {"mesh": "dq2"},
        "does not divide by dp 3": {"mesh": "dp3"},
        "--model.heads=2": {"mesh": "tp4"},
        "nearest is --model.embed": {"model.embd": 3},
        "too long": {"data.sequence-length": 1000000, "model.positions": "rotary"},
        "does not exist": {"data.path": tmp_path / "missing"},
    }
    for text, keys in mistakes.items():
        found = subprocess.run(
            [*command(corpus, tmp_path / "run"), *(f"--{key}={value}" for key, value in keys.items())],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert found.returncode == 2, (text, found)
        *before, line = found.stderr.splitlines()
        assert line.startswith("error: ") and text in line, found.stderr
        assert all(said.startswith("preparing ") for said in before), found.stderr


def test_the_preview_of_a_large_recipe_needs_no_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from jaxlm.train.preview import preview

    keys = ["--model.vocabulary=250", "--mesh=dp2,tp2", f"--run={tmp_path}", "--model.layers=2", "--data.path=nowhere"]
    preview(load(RunConfig, keys)[0], full=True)
    text = capsys.readouterr().out
    assert "blocks.mlp.up.kernel" in text and "all-reduce" in text and "temporaries of the step" in text
    assert (tmp_path / "sharding.png").stat().st_size > 10_000


def test_a_run_that_does_not_compile_leaves_the_folder_to_the_next(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    def fails(self, *arguments):
        raise UserError("cannot be sharded")

    quick = {"train__steps": 2, "eval__every": 0, "eval__sample_tokens": 0}
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be sharded"):
        patch.setattr(Assembly, "compile", fails)
        train(corpus, tmp_path, model__embed=64, **quick)
    assert not list(tmp_path.glob("*.yaml")) and not read(tmp_path / "events.jsonl")
    train(corpus, tmp_path, **quick)
    with pytest.raises(UserError, match="model.embed=32"):
        train(corpus, tmp_path, model__embed=64, **quick)
    assert [event["event"] for event in read(tmp_path / "events.jsonl")][0] == "start"


def test_an_end_that_was_cut_short_is_written_the_next_time(corpus: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, train__steps=4)
    (tmp_path / "samples.txt").unlink()
    events = [line for line in (tmp_path / "events.jsonl").read_text().splitlines() if '"end"' not in line]
    (tmp_path / "events.jsonl").write_text("\n".join(events) + "\n")
    for _ in range(2):
        train(corpus, tmp_path, train__steps=4)
    assert (tmp_path / "samples.txt").read_text().count("step 4") == 1
    assert [line["step"] for line in read(tmp_path / "eval.jsonl")].count(4) == 1


def test_an_evaluation_that_was_cut_short_is_made_the_next_time(corpus: Path, whole: Path, tmp_path: Path) -> None:
    """The save of a step is on disk before its evaluation is: what falls in between must not lose it."""
    train(corpus, tmp_path)
    evaluations = tmp_path / "eval.jsonl"
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    evaluations.write_text("")
    train(corpus, tmp_path)
    assert read(evaluations) == read(whole / "eval.jsonl")


@pytest.mark.parametrize("failures", [1, 2])
def test_one_failed_save_is_survived_and_two_in_a_row_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str], failures: int
) -> None:
    real, calls = Store.save, []

    def save(self, step: int, state, meta) -> None:
        calls.append(step)
        if len(calls) <= failures:
            raise SaveFailed(f"saving checkpoint {step} failed: no space")
        real(self, step, state, meta)

    monkeypatch.setattr(Store, "save", save)
    keys = {"checkpoint__every": 2, "eval__every": 0, "eval__sample_tokens": 0}
    if failures == 1:
        train(corpus, tmp_path, **keys)
        assert "warning: saving checkpoint 2 failed" in capsys.readouterr().out
        assert Store(tmp_path / "checkpoints").steps() == [6, 8]
    else:
        with pytest.raises(SaveFailed):
            train(corpus, tmp_path, **keys)
        assert calls == [2, 4]
    assert [e["kind"] for e in read(tmp_path / "events.jsonl") if e["event"] == "fault"] == ["save failed"] * failures


def test_it_can_stand_still_until_a_save_works(
    corpus: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = Store.save, []

    def save(self, step: int, state, meta) -> None:
        calls.append(step)
        if len(calls) in (1, 2, 3, 5, 6, 7):  # the disk is full twice, the second time at the end
            raise SaveFailed(f"saving checkpoint {step} failed: no space")
        real(self, step, state, meta)

    monkeypatch.setattr(Store, "save", save)
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.01)
    keys = {"checkpoint__every": 4, "eval__every": 0, "eval__sample_tokens": 0}
    train(corpus, tmp_path, checkpoint__on_failure="wait", **keys)
    assert calls == [4, 5, 5, 5, 8, 8, 8, 8], "after each failure the step at hand, again and again"
    assert "checkpoint 4 failed: no space; training stands still until a save works" in capsys.readouterr().out
    with Store(tmp_path / "checkpoints") as store:
        assert store.steps() == [5, 8] and store.latest_valid(pytest.fail) == 8
    train(corpus, tmp_path / "whole", **keys)
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_a_run_that_diverged_goes_on_with_a_lower_learning_rate(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(corpus, tmp_path, train__steps=4)
    train(corpus, tmp_path, train__steps=6, optimizer__learning_rate=1e-3)
    assert "changed since this run's last start: optimizer.learning_rate 0.004 -> 0.001" in capsys.readouterr().out
    assert read(tmp_path / "metrics.jsonl")[-1]["learning_rate"] < 1e-3
