"""Where a process stands, in its own words, for whoever watches it (`jaxlm.launch`); the one place that knows the file.

The loop names each phase as it enters it, which costs a microsecond; a thread writes the file. All processes of a run
go through the same phases in the same order, so the one that has entered the fewest is the one the others wait for.
"""

import atexit
import faulthandler
import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from jaxlm.metrics.stall import stall

VARIABLE = "JAXLM_HEARTBEAT"
"""Environment variable: the file to write; without it nothing is written."""

WRITE_EVERY_SECONDS = 0.1

Phase = Literal["start", "init", "compile", "data", "step", "save", "eval", "end"]
"""start: Python and its imports; init: processes find each other, data and checkpoint are looked at; compile: that, and
the state made or restored; data: waiting for a batch; step: dispatching one and reading the one before; end: after the
last save."""


class Beat(NamedTuple):
    """The content of the file."""

    pid: int = 0
    entered: int = 0
    """Number of phases, this one included."""
    phase: Phase = "start"
    step: int = 0
    time: float = 0.0
    """When the phase was entered, in seconds since 1970."""


_beat = Beat()


def begin() -> None:
    """Write the file from here on, and on SIGUSR1 the stacks of all threads, if the environment names one."""
    if VARIABLE in os.environ:
        path = Path(os.environ[VARIABLE])
        faulthandler.register(signal.SIGUSR1, file=stacks(path).open("w"), all_threads=True)
        file = _File(path)
        threading.Thread(target=file.write_for_ever, name="heartbeat", daemon=True).start()
        atexit.register(file.write)


def phase(name: Phase, step: int = 0) -> None:
    """Say that `name` begins, on the way to `step` (counted from 1). Of the main thread only."""
    global _beat
    _beat = Beat(os.getpid(), _beat.entered + 1, name, step, time.time())
    stall(name, step)


def read(path: Path, before: Beat | None = None) -> Beat:
    """The last beat in a file: that of a process which has not begun, where there is none; the one read `before`, while
    the file cannot be read."""
    try:
        return Beat(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Beat()
    except OSError:
        return before or Beat()


def stacks(path: Path) -> Path:
    """The file beside a heartbeat that stacks are written to."""
    return path.with_suffix(".stacks")


class _File:
    """Writes the last beat to `path`, if it has not been written yet. What a full disk refuses, it tries again."""

    def __init__(self, path: Path) -> None:
        self._path, self._written, self._lock = path, Beat(), threading.Lock()

    def write(self) -> None:
        with self._lock, suppress(OSError):
            if (beat := _beat) is not self._written:
                partial = self._path.with_name(self._path.name + ".partial")
                partial.write_text(json.dumps(beat._asdict()))
                partial.replace(self._path)  # a reader sees the old beat or the new; a power loss may take it
                self._written = beat

    def write_for_ever(self) -> None:
        while True:
            self.write()
            time.sleep(WRITE_EVERY_SECONDS)
