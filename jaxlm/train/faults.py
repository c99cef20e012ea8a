"""What interrupts a run from outside: signals, and another run in its folder."""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from jaxlm.config.errors import UserError


class StopRequest:
    """Notes SIGTERM and Ctrl-C so that the loop can save and end between two steps; the second Ctrl-C ends at once.

    With several processes the signals keep their usual meaning: no process may stop alone.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping: the step under way is finished and saved (Ctrl-C again: end at once)\n")
        self.signal = signal.Signals(number)


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the run folder while the block runs; the system lets go of it when the process ends, however it ends.

    Raises:
        UserError: another process trains in it: they would overwrite each other's checkpoints and metrics.
    """
    if jax.process_index() != 0:
        yield
        return
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}; stop it, or use another --run") from None
        except OSError:
            say(f"{folder} cannot be locked on this file system: take care that no other process trains in it")
        yield
