"""One process of a run, as its supervisor sees it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxlm.metrics import heartbeat

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class Rank:
    """Starts the process `number` of an attempt, which writes rank-N.log, .beat and .stacks into `folder`.

    It has a process group of its own, so that a Ctrl-C at the terminal reaches the supervisor alone. On Linux the
    system kills it when the supervisor ends, however that ends.
    """

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.beat = folder / f"rank-{number}.beat"
        self.log = folder / f"rank-{number}.log"
        self.stacks = heartbeat.stacks(self.beat)
        self._shown = 0
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        parent = os.getpid()

        def die_with_parent() -> None:
            if sys.platform == "linux":
                LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    @property
    def code(self) -> int | None:
        """Its exit code, the negative number of the signal that killed it, or None while it runs."""
        return self._process.poll() if self._process else None

    def stopped(self) -> bool:
        """Whether a signal (SIGSTOP, a debugger) has stopped it; only Linux says so."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def waits(self) -> bool:
        """Whether its main thread was inside jax, or waiting for a thread, when it last wrote its stacks: for other
        ranks, most likely."""
        innermost = self.main_thread()[:1]  # faulthandler begins with the innermost call
        return any(place in line for line in innermost for place in ("/jax/", "/threading.py", "/concurrent/"))

    def main_thread(self) -> list[str]:
        """The calls of its main thread when it last wrote its stacks, which it writes last; none before."""
        text = self.stacks.read_text() if self.stacks.exists() else ""
        return text.partition("Current thread")[2].splitlines()[1:]

    def signal(self, number: signal.Signals) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it and what it started, and wait until it is gone."""
        if self._process:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()

    def new_output(self) -> str:
        """What it has written since the last call."""
        with self.log.open("rb") as log:
            log.seek(self._shown)
            text = log.read()
        self._shown += len(text)
        return text.decode(errors="replace")

    def last_line(self) -> str:
        """The last line that is an error's, else the last line, for whoever asks why it ended."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ") or "Error: " in line]
        return (errors or lines or [""])[-1][:300]


def ending(code: int) -> str:
    """An exit code in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
