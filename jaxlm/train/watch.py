"""Whether the numbers of a run are worth going on with."""

from collections import deque
from statistics import median
from typing import Any

SPIKE = 2.0
"""A loss over this many times the median of the steps before it is as bad as one that is not finite."""

WINDOW = 100
"""Steps before it; with fewer no loss is a spike."""


class BadNumbers(Exception):
    """`max_skipped` steps in a row were bad."""

    def __init__(self, first: int, step: int, position: int, spikes: int):
        self.first, self.step = first, step
        self.position = position
        """Samples consumed up to and with the last of them."""
        what = "not finite" if not spikes else f"{spikes} times over {SPIKE:g} times their median, or not finite"
        super().__init__(f"losses or gradients of the {step - first + 1} steps up to step {step} were {what}")


class Watch:
    """Counts bad steps in a row. Every process sees the same numbers, so all of them decide alike.

    A step that is not finite changed nothing but the counters; one whose loss is a spike was taken.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.recall({})

    def recall(self, memory: dict[str, Any]) -> None:
        """Go on from a `memory`; from nothing where that is empty."""
        self._losses: deque[float] = deque(memory.get("losses", ()), maxlen=WINDOW)
        self._first: int | None = memory.get("first")
        self._spikes: int = memory.get("spikes", 0)

    def memory(self) -> dict[str, Any]:
        """What a checkpoint has to hold, as JSON, for a run that goes on from it to judge as one that was never
        stopped."""
        return {"losses": list(self._losses), "first": self._first, "spikes": self._spikes}

    @property
    def in_row(self) -> bool:
        """Whether the last step was bad."""
        return self._first is not None

    def see(self, step: int, position: int, loss: float, finite: bool) -> None:
        """One step more, with whose batch `position` samples are consumed. Raises BadNumbers once the row is as long
        as the limit."""
        spike = finite and len(self._losses) == WINDOW and loss > SPIKE * median(self._losses)
        if finite and not spike:
            self._losses.append(loss)
            self._first, self._spikes = None, 0
            return
        self._first = step if self._first is None else self._first
        self._spikes += spike
        if step - self._first + 1 >= self.limit:
            raise BadNumbers(self._first, step, position, self._spikes)
