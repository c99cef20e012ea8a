"""Finds the process that all others wait for."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxlm.launch.options import Limits
from jaxlm.metrics import heartbeat
from jaxlm.metrics.heartbeat import Beat


class Stall(NamedTuple):
    """Processes that stand still: one, or several that reached the same point together."""

    ranks: list[int]
    beat: Beat
    seconds: float
    limit: float


class Watch:
    """Reads the heartbeats of all ranks, in `files`, and measures by the clock of this host alone."""

    def __init__(self, files: Sequence[Path], limits: Limits) -> None:
        self._files, self._limits = files, limits
        self.beats = [Beat() for _ in files]
        self._last: tuple[int, list[int]] = (0, [])
        self._since = time.monotonic()

    def look(self, ended: Sequence[int]) -> Stall | None:
        """The stall there is, if any, among the ranks that have not `ended`.

        Only the rank that has come least far can be at fault: those ahead of it wait in a collective for it, whatever
        phase they are in. So its limit counts and no other, from when it came to be the last: before, it may have
        waited itself.
        """
        self.beats = [heartbeat.read(*pair) for pair in zip(self._files, self.beats, strict=True)]
        running = [rank for rank in range(len(self._files)) if rank not in ended]
        if not running:
            return None
        least = min(self.beats[rank].entered for rank in running)
        behind = [rank for rank in running if self.beats[rank].entered == least]
        if (least, behind) != self._last:
            self._last, self._since = (least, behind), time.monotonic()
        beat, seconds = self.beats[behind[0]], time.monotonic() - self._since
        limit = getattr(self._limits, beat.phase)
        return Stall(behind, beat, seconds, limit) if seconds > limit else None
