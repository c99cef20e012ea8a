"""Real training under the supervisor: a run that was interrupted and started again is the run that was not."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.checkpoint.store import Store
from jaxlm.metrics.jsonl import read
from tests.launch.jobs import Launched, launched, listening

STEPS = 12
LOOPBACK = "127.0.0.2"
"""Not the address that this host's name is likely to lead to."""
LISTENING = {"0200007F", "0000000000000000FFFF00000200007F"}
"""The same as /proc/net/tcp and tcp6 have it."""
SOON = ["--limits.data=5", "--limits.step=5", "--limits.save=5", "--limits.compile=30"]


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a small run on two documents of words."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for i in range(2):
        (folder / f"{i}.txt").write_text(" ".join(f"word{k}" for k in random.integers(0, 50, 2000)))
    return [
        *("--mesh=dp2", f"--data.path={folder}", f"--data.cache={folder.parent / 'cache'}", "--data.tokenizer=bytes"),
        *("--data.sequence-length=32", "--data.batch-size=8", "--model.layers=1", "--model.embed=16"),
        *("--model.heads=2", "--model.mlp=32", "--optimizer.warmup-steps=2", f"--train.steps={STEPS}"),
        *("--train.log-every=1", "--checkpoint.every=4", "--eval.every=0", "--eval.sample-tokens=0"),
    ]


def losses(run: Path) -> dict[int, str]:
    """Step -> every bit of its loss."""
    return {line["step"]: line["loss"].hex() for line in read(run / "metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    with launched(run, training=training, fake=False) as job:
        code, out, error = job.end()
        assert code == 0, out + error
    return run


def goes_on_to_equal(job: Launched, whole: Path) -> str:
    """What the supervisor says until the run ends as the one that nothing disturbed did."""
    code, out, error = job.end()
    assert code == 0, out + error
    assert len(job.events("start")) == 2, error
    assert losses(job.run) == losses(whole) and len(losses(whole)) == STEPS
    assert job.left() == []
    return error


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_killed_rank_changes_no_bit_of_any_loss(training: list[str], whole: Path, tmp_path: Path, rank: int) -> None:
    with launched(tmp_path, f"--coordinator={LOOPBACK}", training=training, fake=False) as job:
        job.wait_for_step(6)
        found = listening(job.left())
        assert found and found <= LISTENING, "the coordinator and Gloo listen where they are told, and nowhere else"
        os.kill(job.beat(rank).pid, signal.SIGKILL)
        assert f"rank {rank} was killed by SIGKILL in" in goes_on_to_equal(job, whole)


@pytest.mark.slow
def test_a_stopped_rank_is_found(training: list[str], whole: Path, tmp_path: Path) -> None:
    with launched(tmp_path, *SOON, training=training, fake=False) as job:
        job.wait_for_step(6)
        os.kill(job.beat(1).pid, signal.SIGSTOP)
        assert "rank 1 stood still (stopped by a signal) in" in goes_on_to_equal(job, whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["compile:0:0", "data:6:1", "step:6:1", "step:6:0", "save:8:1"])
def test_a_stall_is_found(training: list[str], whole: Path, tmp_path: Path, where: str) -> None:
    phase, step, rank = where.split(":")
    with launched(tmp_path, *SOON, training=training, fake=False, JAXLM_STALL=f"{where}:3600") as job:
        place = phase if step == "0" else f"{phase} {step}"
        assert f"rank {rank} stood still in {place} for" in goes_on_to_equal(job, whole)


def rank_signals(job: Launched, case: str) -> None:
    """Send the signals of a case to ranks, past the supervisor."""
    pids = job.pids()
    number = signal.SIGINT if "SIGINT" in case else signal.SIGTERM
    for pid in pids if "all" in case else pids[1:]:
        os.kill(pid, number)
    if "twice" in case:
        time.sleep(0.3)
        os.kill(pids[0], number)


@pytest.mark.parametrize(
    "case", ["SIGTERM at one", *(pytest.param(c, marks=pytest.mark.slow) for c in (
        "SIGTERM at all", "SIGTERM twice", "SIGINT at one", "SIGTERM at all, in saves"))],
)  # fmt: skip
def test_ranks_that_get_a_signal_save_one_step_together(training: list[str], tmp_path: Path, case: str) -> None:
    saves = ["--checkpoint.every=1"] if "in saves" in case else ["--checkpoint.every=0"]
    with launched(
        tmp_path, "--max-restarts=0", training=[*training, "--train.steps=100000", *saves], fake=False
    ) as job:
        job.wait_for_step(4)
        began = time.monotonic()
        rank_signals(job, case)
        code, out, error = job.end()
        assert code == 1 and "ended with exit code 75" in error, error  # the supervisor was not asked: it would go on
        assert time.monotonic() - began < 30
        for rank in (0, 1):
            log = (tmp_path / "launch" / "attempt-1" / f"rank-{rank}.log").read_text()
            assert "saved step" in log and "Traceback" not in log, log
    store = Store(tmp_path / "checkpoints")
    assert store.latest_valid(pytest.fail) == max(losses(tmp_path))
    store.close()


@pytest.mark.slow
def test_a_second_ctrl_c_at_a_rank_ends_it_at_once_and_leaves_valid_checkpoints(
    training: list[str], whole: Path, tmp_path: Path
) -> None:
    with launched(tmp_path, training=training, fake=False, JAXLM_STALL="step:7:0:5") as job:
        job.wait_for_step(7)
        pid = job.pids()[0]
        os.kill(pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(pid, signal.SIGINT)
        assert "rank 0 was killed by SIGINT in step 7" in goes_on_to_equal(job, whole)


@pytest.mark.slow
def test_a_signal_to_the_supervisor_saves_and_the_same_command_goes_on(
    training: list[str], whole: Path, tmp_path: Path
) -> None:
    with launched(tmp_path, training=[*training, "--checkpoint.every=0"], fake=False, JAXLM_STALL="step:6:1:2") as job:
        job.wait_for_step(6)
        job.process.terminate()
        code, _, error = job.end()
        assert code == 75 and "launch: saved; the same command continues" in error
    with launched(tmp_path, training=training, fake=False) as job:
        code, out, _ = job.end()
        assert code == 0 and "continuing from step" in out
    assert losses(tmp_path) == losses(whole)


@pytest.mark.slow
def test_fewer_processes_go_on_with_the_same_samples(training: list[str], whole: Path, tmp_path: Path) -> None:
    with launched(tmp_path, "--min-processes=1", training=training, fake=False) as job:
        job.wait_for_step(6)
        (tmp_path / "launch" / "gone-1").touch()
        os.kill(job.beat(1).pid, signal.SIGKILL)
        code, out, error = job.end()
        assert code == 0, error
        assert "1 processes x 1 devices, mesh dp1, without 1: same batch, same samples" in error
    other, same = read(tmp_path / "metrics.jsonl"), read(whole / "metrics.jsonl")
    assert [line["tokens"] for line in other] == [line["tokens"] for line in same]
    assert [line["loss_tokens"] for line in other] == [line["loss_tokens"] for line in same]
    np.testing.assert_allclose([x["loss"] for x in other], [x["loss"] for x in same], rtol=1e-5)
    positions = [Store(run / "checkpoints").meta(STEPS)["position"] for run in (tmp_path, whole)]
    assert positions[0] == positions[1]


@pytest.mark.slow
def test_no_rank_outlives_a_killed_supervisor(training: list[str], tmp_path: Path) -> None:
    with launched(tmp_path, training=training, fake=False) as job:
        job.wait_for_step(4)
        assert len(job.left()) == 2
        job.process.kill()
        deadline = time.monotonic() + 10
        while job.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job.left() == []


@pytest.mark.slow
def test_two_supervisors_train_as_two_nodes(training: list[str], whole: Path, tmp_path: Path) -> None:
    own = ["--nodes=2", "--processes=1"]
    with (
        launched(tmp_path, *own, "--node-rank=0", training=training, fake=False, verb="node") as first,
        launched(tmp_path, *own, "--node-rank=1", training=training, fake=False, verb="node") as second,
    ):
        first.wait_for_step(6)
        os.kill(first.beat(1).pid, signal.SIGKILL)
        error = goes_on_to_equal(first, whole)
        assert "restart 1 of at most 10" in error
        assert second.end()[0] == 0
