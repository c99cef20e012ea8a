"""Two supervisors on one host act as two nodes of a job: they agree over the run folder. Their ranks are `fake`."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from jaxlm.metrics.jsonl import read
from tests.launch.jobs import Launched, launched
from tests.launch.test_supervisor import SOON, TRAINING

NODES = ["--nodes=2", "--processes=1"]


def two_nodes(
    stack: ExitStack, run: Path, *own: str, training: list[str] = TRAINING, **variables: str
) -> tuple[Launched, Launched]:
    first, second = (
        stack.enter_context(
            launched(run, *NODES, f"--node-rank={node}", *own, training=training, verb="node", **variables)
        )
        for node in (0, 1)
    )
    return first, second


def pid_of(run: Path, node: int) -> int:
    events = read(run / "launch" / ("events-1.jsonl" if node else "events.jsonl"))
    return next(event["pids"][str(node)] for event in events if event["event"] == "start")


@pytest.mark.parametrize("node", [0, 1])
def test_both_nodes_start_again_when_a_rank_of_either_dies(tmp_path: Path, node: int) -> None:
    with ExitStack() as stack:
        first, second = two_nodes(stack, tmp_path)
        first.wait_for_step(6)
        os.kill(pid_of(tmp_path, node), signal.SIGKILL)
        code, out, error = first.end()
        assert (code, second.end()[0]) == (0, 0), error
        assert "from step 4 on mesh dp4" in out
        assert len(first.events("start")) == 2


def test_a_stall_on_the_other_node_is_named(tmp_path: Path) -> None:
    with ExitStack() as stack:
        first, second = two_nodes(stack, tmp_path, *SOON, "--limits.start=30", JAXLM_STALL="step:6:1:3600")
        code, _, error = first.end()
        assert (code, second.end()[0]) == (0, 0), error
        assert "rank 1 stood still in step 6" in error, error
        assert "in stall" in (tmp_path / "launch" / "attempt-1" / "rank-1.stacks").read_text()


@pytest.mark.parametrize("node", [0, 1])
def test_a_signal_to_one_node_ends_both(tmp_path: Path, node: int) -> None:
    with ExitStack() as stack:
        nodes = two_nodes(stack, tmp_path)
        nodes[0].wait_for_step(3)
        nodes[node].process.terminate()
        assert [job.end()[0] for job in nodes] == [75, 75]


@pytest.mark.slow
def test_a_final_exit_code_is_that_of_both(tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = two_nodes(stack, tmp_path, FAKE_EXIT="3:1:4")
        assert [job.end()[0] for job in nodes] == [4, 4]


def test_a_node_does_not_take_the_plan_of_an_earlier_job(tmp_path: Path) -> None:
    with ExitStack() as stack:
        assert [job.end()[0] for job in two_nodes(stack, tmp_path)] == [0, 0]
        longer = two_nodes(stack, tmp_path, training=[*TRAINING, "--train.steps=20"])
        assert [job.end()[0] for job in longer] == [0, 0]
        assert len(list((tmp_path / "launch").glob("attempt-*"))) == 2
