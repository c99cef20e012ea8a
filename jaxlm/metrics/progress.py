"""What a person sees while a run trains: a live bar on a terminal, aligned lines in a log."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from jaxlm.config.files import FULL


class Progress:
    """Shows how a run of `steps` steps advances from step `start`; `show` is false on all processes but one.

    A context manager: the terminal is left in order however the block ends.
    """

    def __init__(self, steps: int, *, start: int = 0, show: bool = True) -> None:
        self._steps, self._start, self._show = steps, start, show
        self._console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._first: tuple[float, int] | None = None
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Progress":
        if self._show and self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
            self._bar = Bar(*columns, console=self._console, refresh_per_second=4)
            self._task = self._bar.add_task("", total=self._steps, completed=self._start, numbers="compiling")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def advance(self, step: int) -> None:
        """Step `step` is on its way; cheap enough for every step."""
        if self._first is None:  # the first step includes compilation, which says nothing about the others
            self._first = (time.monotonic(), step)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers of a logged step: `loss`, `tokens_per_second`, and others of metrics.jsonl it knows."""
        if not self._show:
            return
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=self._numbers(step, values))
        else:
            width = len(str(self._steps))
            self._print(f"step {step:{width}d}/{self._steps}  {self._numbers(step, values)}")

    def say(self, text: str) -> None:
        """A line of its own (a save, an evaluation, a warning), above the bar where there is one."""
        if self._show:
            self._print(text)

    def eta_seconds(self, step: int) -> float | None:
        """Seconds until the last step at the pace since the first one; None while there is no pace yet."""
        if self._first is None or step <= self._first[1]:
            return None
        began, first = self._first
        return (time.monotonic() - began) / (step - first) * (self._steps - step)

    def _print(self, text: str) -> None:
        """A line for which the disk that takes the output has no room is no reason to end a run."""
        try:
            self._console.print(text)
        except OSError as error:
            if error.errno not in FULL:
                raise

    def _numbers(self, step: int, values: Mapping[str, Any]) -> str:
        known = {key: value for key, value in values.items() if value is not None}
        parts = [show(known[key]) for key, show in _SHOWN.items() if key in known]
        eta = self.eta_seconds(step)
        return "  ".join(part for part in (*parts, f"eta {duration(eta)}" if eta is not None else "") if part)


def duration(seconds: float | int) -> str:
    """1:02:03, or 2:03 below an hour."""
    whole = round(seconds)
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def quantity(value: float | int) -> str:
    """Three significant digits and a suffix: 12.3k, 1.07M."""
    suffixes = ["", "k", "M", "G", "T"]
    while math.isfinite(value) and abs(value) >= 999.5 and len(suffixes) > 1:
        value /= 1000
        suffixes.pop(0)
    return f"{value:.3g}{suffixes[0]}"


_SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda value: f"loss {value:7.4f}",
    "grad_norm": lambda value: f"grad {value:6.3f}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "tokens_per_second": lambda value: f"{quantity(value):>5} tokens/s",
    "mfu": lambda value: f"mfu {value:5.1%}",
    "skipped_steps": lambda value: f"skipped {value:.0f}" if value else "",
}
"""Numbers worth a glance, in this order."""
