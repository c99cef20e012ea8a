"""events.jsonl: when a run started, resumed, saved, met a fault and ended."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from jaxlm.metrics.jsonl import JsonLines, repair

Event = Literal["start", "resume", "save", "fault", "goodput", "end"]


class Events:
    """Appends to `folder`/events.jsonl, on one process (`write`) of many; nothing in it is ever removed."""

    def __init__(self, folder: str | Path, *, write: bool = True) -> None:
        self._began = time.monotonic()
        self._file: JsonLines | None = None
        if write:
            path = Path(folder) / "events.jsonl"
            repair(path)
            self._file = JsonLines(path)

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, event: Event, **fields: Any) -> None:
        """Write `event` with the time (UTC), the seconds since this process opened the file, and `fields`."""
        if self._file:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            self._file.append(
                {"time": now, "seconds": round(time.monotonic() - self._began, 3), "event": event, **fields}
            )

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None
