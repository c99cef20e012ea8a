"""Where the seconds of a run go: each to one category, over all processes that worked on it, one after the other."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

CATEGORIES = {
    "step": "steps, which is what a run is for",
    "init": "imports, devices, data, the state made or read",
    "compile": "waiting for the compiler",
    "data_wait": "waiting for the next batch",
    "save": "steps held up by a save",
    "eval": "evaluation and the sample",
    "rework": "steps done a second time, and work that a kill threw away",
    "restart": "no process was there, between one and the next",
    "idle": "the rest: after the last step and before the end",
}
"""Name -> what belongs to it."""


class Goodput:
    """The clock of one process: at any moment exactly one category runs, so that they sum to its life."""

    def __init__(self, began: float | None = None) -> None:
        self.seconds = dict.fromkeys(CATEGORIES, 0.0)
        self._running, self._since = "init", began if began is not None else time.time() - process_age_seconds()
        self.began = self._since

    def switch(self, category: str) -> None:
        """From now on it is `category`."""
        now = time.time()
        self.seconds[self._running] += now - self._since
        self._running, self._since = category, now

    @contextmanager
    def within(self, category: str) -> Iterator[None]:
        """`category` while the block runs, then what was before."""
        before = self._running
        self.switch(category)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, category: str, seconds: float) -> None:
        """Of the time that is running, `seconds` belong to `category`."""
        self.switch(self._running)
        self.seconds[category] += seconds
        self.seconds[self._running] -= seconds

    def read(self) -> dict[str, float]:
        """Seconds by category until now."""
        self.switch(self._running)
        return {name: round(seconds, 3) for name, seconds in self.seconds.items()}


def process_age_seconds() -> float:
    """How long this process has lived; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            started = int(file.read().rpartition(")")[2].split()[19])
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"), 0.0)
    except (OSError, ValueError, AttributeError):
        return 0.0


def of_run(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by category of all processes of a run, from its events.jsonl.

    Each process writes what its clock shows with every save and when it ends; one that was killed lived on after its
    last line for a while that nobody knows, up to the beginning of the next: that counts as `restart`.
    """
    totals = dict.fromkeys(CATEGORIES, 0.0)
    last: dict[float, Mapping[str, Any]] = {}
    for event in events:
        if event["event"] == "goodput":
            last[event["began"]] = event
    ended = None
    for began, event in sorted(last.items()):
        for name, seconds in event["spent"].items():
            totals[name] += seconds
        if ended is not None:
            totals["restart"] += max(began - ended, 0.0)
        ended = datetime.fromisoformat(event["time"]).timestamp()
    return totals


def describe(totals: Mapping[str, float]) -> str:
    """One line: the share of steps, and the seconds of every category that has some."""
    whole = sum(totals.values())
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in totals.items() if seconds >= 0.05)
    return f"goodput {totals['step'] / whole:.1%} of {whole:.1f} s: {parts}"
