"""What interrupts a run from outside: signals, and another run in its folder."""

import fcntl
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxlm.config.errors import CommandError, UserError


class StopRequest:
    """Notes SIGTERM and Ctrl-C so that the loop can save and end between two steps; the second Ctrl-C ends at once.

    Several processes save together, so all of them have to agree on a step that none has passed. That is the protocol
    behind `reached_preemption_sync_point`: jax.distributed catches SIGTERM at any process, tells all over the
    coordinator, asks in the background how far each has come, and names the step after the furthest. Asking it costs
    a tenth of a microsecond a step, where a collective of our own would make every step wait for the slowest.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._together = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT,) if self._together else (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Whether to save and end after `step`; every process has to ask at every step."""
        if self._together:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.signal is not None

    @property
    def name(self) -> str:
        """What asked for it, as far as this process knows."""
        return self.signal.name if self.signal else "a signal to one of the processes"

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nstopping: the step under way is finished and saved (Ctrl-C again: end at once)\n")
        self.signal = signal.Signals(number)
        if self._together:
            # The system ends the process the next time, also while it waits for another one that will not come.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


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


@contextmanager
def not_waiting_for_others() -> Iterator[None]:
    """End the process at once where the block fails at one of several: the others wait in a collective for it, and at
    its exit it would wait for them. What all agree on (a CommandError) ends as usual."""
    try:
        yield
    except CommandError:
        raise
    except BaseException:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
