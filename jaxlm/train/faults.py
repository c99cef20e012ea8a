"""What interrupts a run: signals that ask it to stop, and numbers that say it should."""

import signal
from types import FrameType

import jax

from jaxlm.config.errors import Diverged


class StopRequest:
    """Notes SIGTERM and Ctrl-C so that the loop can save and end between two steps; the second Ctrl-C ends at once.

    With several processes the signals keep their usual meaning: no process may stop alone.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


def check_streak(streak: int, limit: int, step: int) -> None:
    """Raise Diverged when `limit` steps in a row were not finite and so changed nothing."""
    if streak >= limit:
        raise Diverged(
            f"loss or gradients were not finite in the last {streak} steps up to step {step}; they changed nothing; "
            "the checkpoints are sound: lower --optimizer.learning-rate, or look at the data around that step"
        )
