"""What the supervisor does about ranks that die, stall or are asked to stop. The ranks are `fake`, so that a case takes
a second or two: real ones are in test_training."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launch.jobs import launched

TRAINING = ["--mesh=dp4", "--data.batch-size=24", "--train.steps=12", "--checkpoint.every=4"]
SOON = ["--limits.step=1", "--limits.data=1", "--limits.compile=1", "--limits.save=1"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_is_named_and_the_job_goes_on_from_the_last_checkpoint(tmp_path: Path, rank: int) -> None:
    with launched(tmp_path, training=TRAINING) as job:
        job.wait_for_step(6)
        os.kill(job.beat(rank).pid, signal.SIGKILL)
        code, out, error = job.end()
        assert code == 0, error
        assert f"rank {rank} was killed by SIGKILL in" in error and "from checkpoint 4" in error
        assert "from step 4 on mesh dp4" in out and out.count("step 12") == 1
        assert [event["rank"] for event in job.events("death")] == [rank]
        first, second = (event["address"] for event in job.events("start"))
        assert first != second, "a new attempt takes a new port"
        assert job.left() == []


def test_a_job_goes_on_when_nobody_reads_what_it_says(tmp_path: Path) -> None:
    with launched(tmp_path, training=TRAINING) as job:
        job.wait_for_step(2)
        for pipe in (job.process.stdout, job.process.stderr):
            assert pipe
            pipe.close()
        job.wait_for_step(6)
        os.kill(job.beat(1).pid, signal.SIGKILL)
        job.process.wait(60)
        assert len(job.events("start")) == 2 and job.beat(0, 2).step == 12, "it was started again, and came to its end"
        assert job.left() == []


def test_a_run_that_was_to_begin_anew_is_continued_after_a_restart(tmp_path: Path) -> None:
    with launched(tmp_path, "--max-restarts=1", training=[*TRAINING, "--resume=never"], FAKE_EXIT="3:1:-9") as job:
        _, out, _ = job.end()
        assert [line for line in out.splitlines() if "resume" in line] == [
            "from step 0 on mesh dp4, resume never",
            "from step 0 on mesh dp4, resume auto",
        ]


@pytest.mark.parametrize("phase", ["compile:0", "data:6", "step:6", "save:8"])
def test_a_rank_that_stands_still_is_named_with_its_phase(tmp_path: Path, phase: str) -> None:
    with launched(tmp_path, *SOON, training=TRAINING, JAXLM_STALL=f"{phase}:1:3600") as job:
        code, _, error = job.end()
        assert code == 0, error
        where = phase.replace(":", " ").removesuffix(" 0")
        assert f"rank 1 stood still in {where} for" in error
        assert [event["ranks"] for event in job.events("stall")] == [[1]]
        assert "in stall" in (tmp_path / "launch" / "attempt-1" / "rank-1.stacks").read_text()
        assert "Thread" in (tmp_path / "launch" / "attempt-1" / "rank-0.stacks").read_text()


def test_a_stopped_rank_is_named_and_writes_its_stacks(tmp_path: Path) -> None:
    with launched(tmp_path, *SOON, training=TRAINING) as job:
        job.wait_for_step(6)
        os.kill(job.beat(1).pid, signal.SIGSTOP)
        code, _, error = job.end()
        assert code == 0, error
        assert "rank 1 stood still (stopped by a signal) in" in error
        assert "Thread" in (tmp_path / "launch" / "attempt-1" / "rank-1.stacks").read_text()


@pytest.mark.parametrize(("code", "rank"), [(2, -1), (3, -1), (4, 1)])
def test_exit_codes_that_a_restart_cannot_change_are_final(tmp_path: Path, code: int, rank: int) -> None:
    with launched(tmp_path, training=TRAINING, FAKE_EXIT=f"3:{rank}:{code}") as job:
        ended, _, error = job.end()
        assert ended == code
        assert f"rank {max(rank, 0)} ended with exit code {code} in step 3: error: as asked" in error
        assert len(job.events("start")) == 1 and job.left() == []


def test_it_gives_up_after_restarts_without_a_new_checkpoint(tmp_path: Path) -> None:
    with launched(tmp_path, "--max-restarts=2", training=TRAINING, FAKE_EXIT="3:1:1") as job:
        code, _, error = job.end()
        assert code == 1
        assert "given up after 2 restarts without a new checkpoint; the last: rank 1 ended with exit code 1" in error
        assert len(job.events("start")) == 3
        waits = [event["seconds"] for event in job.events("restart")]
        assert waits == [0.1, 0.2]


def test_it_goes_on_without_a_process_that_fails_again_and_again(tmp_path: Path) -> None:
    with launched(tmp_path, "--processes=4", "--min-processes=2", training=TRAINING, FAKE_EXIT="6:3:-9") as job:
        code, out, error = job.end()
        assert code == 0, error
        assert "process 3 failed 2 times in a row and counts as gone" in error
        assert "3 processes x 1 devices, mesh dp3, without 3: same batch, same samples" in error
        assert "from step 4 on mesh dp3" in out


def test_a_host_that_is_marked_gone_is_left_out_until_it_is_back(tmp_path: Path) -> None:
    gone = tmp_path / "launch" / "gone-0"
    gone.parent.mkdir()
    gone.touch()
    with launched(tmp_path, "--min-processes=1", training=TRAINING) as job:
        job.wait_for_step(2)
        gone.unlink()
        os.kill(job.pids()[0], signal.SIGKILL)
        code, out, error = job.end()
        assert code == 0, error
        assert "1 processes x 2 devices, mesh dp2, without 0" in error
        assert "on mesh dp2" in out and "on mesh dp4" in out


def test_too_few_processes_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "gone-1").touch()
    with launched(tmp_path, training=TRAINING) as job:
        code, _, error = job.end()
        assert code == 1
        assert "1 of 2 processes are gone" in error and "--min-processes allows no fewer than 2" in error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_its_end_is_final(tmp_path: Path, number: signal.Signals) -> None:
    with launched(tmp_path, training=TRAINING) as job:
        job.wait_for_step(3)
        job.process.send_signal(number)
        code, _, error = job.end()
        assert code == 75, error
        assert len(job.events("start")) == 1 and job.left() == []


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with launched(tmp_path, training=TRAINING, JAXLM_STALL="step:3:1:3600") as job:
        job.wait_for_step(3)
        os.kill(job.beat(1).pid, signal.SIGSTOP)
        os.kill(job.beat(0).pid, signal.SIGSTOP)
        job.process.send_signal(signal.SIGINT)
        job.wait(lambda: job.events("signal"))
        job.process.send_signal(signal.SIGINT)
        assert job.end(timeout=5)[0] == 130
        assert job.left() == []


def test_processes_that_do_not_save_in_time_are_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "--grace=1", training=TRAINING) as job:
        job.wait_for_step(3)
        os.kill(job.beat(1).pid, signal.SIGSTOP)
        job.process.terminate()
        code, _, error = job.end()
        assert code == 1 and "not saved after 1 s" in error
        assert job.left() == []


def test_no_rank_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    with launched(tmp_path, "--processes=4", training=TRAINING) as job:
        job.wait_for_step(3)
        os.kill(job.beat(2).pid, signal.SIGSTOP)
        pids = job.pids()
        assert len(job.left()) == len(pids) == 4
        job.process.kill()
        deadline = time.monotonic() + 10
        while job.left() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert job.left() == []


@pytest.mark.parametrize(
    ("own", "training", "message"),
    [
        (["--processes=3"], ["--mesh=dp4"], "mesh dp4: 4 devices do not divide by 3 processes"),
        ([], ["--mesh=dp-1"], "does not say how many devices there are; add --devices=N"),
        ([], ["--mesh=dq2"], "no axis 'dq'"),
        ([], ["--dry-run"], "--dry-run does not train"),
        (["--min-processes=3"], [], "--min-processes=3 is more than the 2 processes"),
        (["--nodes=2"], [], "write python -m jaxlm.launch node"),
        (["--limits.step=0"], [], "--limits.step=0 must be more than 0 seconds"),
        (["--limits.stop=1"], [], "unknown key --limits.stop"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, own: list[str], training: list[str], message: str) -> None:
    with launched(tmp_path / "run", *own, training=training) as job:
        code, out, error = job.end()
        assert code == 2 and out == ""
        assert message in error and error.count("\n") == 1
