"""Jobs under the supervisor, as commands see them: real ones, and ones whose ranks are `fake`."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxlm.metrics import heartbeat
from jaxlm.metrics.heartbeat import Beat
from jaxlm.metrics.jsonl import read

ROOT = Path(__file__).parents[2]
FAKE = """
import sys
from jaxlm.config import cli
from jaxlm.launch import __main__, job
job.command = lambda words, plan: [sys.executable, "-m", "tests.launch.fake", *words, f"--mesh={plan.mesh}"]
cli.run(__main__.main)
"""


class Launched:
    """A supervisor under way: `training` are options of the run in the folder `run`, `own` those of the supervisor."""

    def __init__(self, run: Path, *own: str, training: list[str], fake: bool, verb: str = "local", **variables: str):
        self.run = run
        start = ["-c", FAKE] if fake else ["-m", "jaxlm.launch"]
        self.process = subprocess.Popen(
            [sys.executable, *start, verb, "--backoff=0.1", *own, "--", f"--run={run}", *training],
            env=os.environ | {"PYTHONPATH": str(ROOT), "COVERAGE_PROCESS_START": ""} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once it has ended."""
        try:
            out, error = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            files = (self.run / "launch").rglob("*.*")
            pytest.fail(f"{late}\n" + "\n".join(f"{file}: {file.read_text()}" for file in files if file.is_file()))
        return self.process.returncode, out, error

    def events(self, kind: str) -> list[dict]:
        path = self.run / "launch" / "events.jsonl"
        return [event for event in read(path) if event["event"] == kind]

    def beat(self, rank: int, attempt: int = 1) -> Beat:
        return heartbeat.read(self.run / "launch" / f"attempt-{attempt}" / f"rank-{rank}.beat")

    def pids(self, attempt: int = 1) -> list[int]:
        """Of the ranks of an attempt, once they are started."""
        self.wait(lambda: len(self.events("start")) >= attempt)
        return list(self.events("start")[attempt - 1]["pids"].values())

    def wait(self, condition: Callable[[], object], seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.02)

    def wait_for_step(self, step: int, attempt: int = 1) -> None:
        self.wait(lambda: self.beat(0, attempt).step >= step)

    def left(self) -> list[int]:
        """Ranks of any attempt that still run (not those that nobody has reaped)."""
        started = [pid for event in self.events("start") for pid in event["pids"].values()]
        return [pid for pid in started if running(pid)]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def launched(run: Path, *own: str, training: list[str], fake: bool = True, **more: str) -> Iterator[Launched]:
    """A supervisor that is killed, with all its ranks, however the block ends."""
    job = Launched(run, *own, training=training, fake=fake, **more)
    try:
        yield job
    finally:
        job.process.kill()
        job.process.communicate()
        for pid in job.left():
            os.kill(pid, signal.SIGKILL)


def listening(pids: list[int]) -> set[str]:
    """Addresses (hexadecimal, as in /proc/net/tcp) at which these processes listen for TCP."""
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found
