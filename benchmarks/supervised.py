"""A job under `jaxlm.launch` as `chaos.py` sees it: started again and again, and what its processes use."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config.errors import CommandError
from jaxlm.metrics.jsonl import read

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 20
"""For a rank that stands still."""


class Sample(NamedTuple):
    """One look at a process."""

    pid: int
    role: str
    seconds: float
    rss_bytes: int
    open_files: int


@dataclass
class Job:
    """The supervisor of a run, started again and again by the same command, and what was seen of it."""

    folder: Path
    """Of the corpus and of what all runs share."""
    run: Path
    own: dict[str, Any]
    """Options of the supervisor."""
    keys: dict[str, Any]
    """Options of the training, besides those of every job here."""
    process: subprocess.Popen[bytes] | None = None
    samples: list[Sample] = field(default_factory=list)

    def start(self, **variables: str) -> None:
        """Run the command, with these variables in its environment."""
        environment = {k: v for k, v in os.environ.items() if k not in ("JAXLM_FAULTS", "JAXLM_STALL")}
        environment |= {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(self.folder / "xla")} | variables
        (self.run / "launch" / "stalled").unlink(missing_ok=True)
        own = self.own | {"backoff": 0.1} | {f"limits.{phase}": LIMIT_SECONDS for phase in ("data", "step", "save")}
        keys = {
            "run": self.run,
            "data.path": self.folder / "corpus",
            "data.cache": self.folder / "cache",
            "data.tokenizer": "bytes",
            "data.sequence-length": 64,
            "model.layers": 2,
            "model.embed": 64,
            "model.heads": 4,
            "model.mlp": 256,
            "model.dropout": 0.1,
            "optimizer.schedule": "constant",
            "train.log-every": 1,
            "checkpoint.keep": 3,
            "eval.batches": 1,
            "eval.sample-tokens": 8,
        }
        words = [f"--{key}={value}" for key, value in own.items()]
        words += ["--", *(f"--{key}={value}" for key, value in (keys | self.keys).items())]
        command = [sys.executable, "-m", "jaxlm.launch", "local", *words]
        with (self.folder / f"{self.run.name}.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.folder)

    def end(self, number: signal.Signals | None = None, seconds: float = 3600) -> int:
        """Send `number`, if any, and wait: the exit code, once no rank is left."""
        assert self.process
        if number:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        wait(lambda: not any(running(pid) for pid in self.pids()), 60, "ranks outlive their supervisor")
        return code

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read(self.run / "events.jsonl") if event["event"] in kinds]

    def attempts(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read(self.run / "launch" / "events.jsonl") if event["event"] in kinds]

    def pids(self) -> list[int]:
        """Of the ranks of the last attempt."""
        started = self.attempts("start")
        return list(started[-1]["pids"].values()) if started else []

    def begins(self) -> int:
        """How often training has begun, or begun again."""
        return len(self.events("start", "resume"))

    def logged(self) -> int:
        return max((line["step"] for line in read(self.run / "metrics.jsonl")), default=0)

    def stepping(self, begins: int) -> None:
        """Wait until training has begun more than `begins` times, and does steps."""
        wait(lambda: self.begins() > begins or self.over(), 300, "training did not begin again")
        at = self.logged()
        wait(lambda: self.logged() > at or self.over(), 300, "no step was done")

    def over(self) -> bool:
        return self.process is None or self.process.poll() is not None

    def look(self) -> None:
        """Note the memory and the open files of each process."""
        found = {"supervisor": [self.process.pid] if self.process and not self.over() else [], "rank": self.pids()}
        for role, pids in found.items():
            for pid in pids:
                with contextlib.suppress(OSError, IndexError, ValueError):
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                    rss = pages * os.sysconf("SC_PAGE_SIZE")
                    self.samples.append(Sample(pid, role, time.monotonic(), rss, files))


def growth(samples: list[Sample], role: str, skip_seconds: float = 60.0) -> dict[str, Any] | None:
    """Memory and open files of a role: the most, and what they grow by an hour.

    That is the common slope of its processes, each without its first `skip_seconds` and its last ten.
    """
    began = {sample.pid: sample.seconds for sample in reversed(samples)}
    ended = {sample.pid: sample.seconds for sample in samples}
    own = [s for s in samples if s.role == role]
    kept = [s for s in own if s.seconds - began[s.pid] > skip_seconds and ended[s.pid] - s.seconds > 10]
    x, y = [], []
    for pid in {sample.pid for sample in kept}:
        of_one = np.array([(s.seconds / 3600, s.rss_bytes, s.open_files) for s in kept if s.pid == pid])
        of_one -= of_one.mean(0)
        x.append(of_one[:, :1])
        y.append(of_one[:, 1:])
    if not x or not (spread := float((np.concatenate(x) ** 2).sum())):
        return None
    slope = (np.concatenate(x) * np.concatenate(y)).sum(0) / spread
    return {
        "processes": len(x),
        "looks": len(kept),
        "rss_megabytes": round(max(s.rss_bytes for s in kept) / 1e6, 1),
        "rss_megabytes_an_hour": round(float(slope[0]) / 1e6, 2),
        "open_files": max(s.open_files for s in kept),
        "open_files_an_hour": round(float(slope[1]), 2),
    }


@contextlib.contextmanager
def watched(job: Job) -> Iterator[None]:
    """Look at the processes of `job` every second; none of them is left."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(1.0):
            job.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if job.process and not job.over():
            job.process.kill()
            job.process.wait()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise CommandError(f"{what} within {seconds:g} s")
        time.sleep(0.2)
