"""What the supervisors of a job's nodes tell each other, through files in the run folder that they share.

board.json               node 0: the plan of the attempt, or the exit code of the job; written again every second
attempt-N/node-K.json    node K: how attempt N ended there
gone-S                   process S will not come back; whoever brings it back deletes the file
"""

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jaxlm.config.files import write_atomically
from jaxlm.launch.job import Plan

ALIVE_SECONDS = 1.0
LOST_SECONDS = 60.0


class Ending(NamedTuple):
    """How an attempt ended."""

    code: int | None
    """Exit code of the whole job; None: try again."""
    why: str = ""
    slot: int | None = None
    """The process at fault, where it is known."""
    stalled: bool = False


class Board:
    """The files, as node `node` of `nodes` sees them."""

    def __init__(self, folder: Path, node: int, nodes: int) -> None:
        self.folder, self._node, self._nodes = folder, node, nodes
        self._text = ""
        self._plan: Plan | None = None
        self._final: int | None = None
        self._alive, self._written, self._changed = 0, 0.0, time.monotonic()
        self._stale = self._read() if node else ""  # of an earlier job, unless it changes

    def attempts(self) -> list[int]:
        """Numbers of the attempts there were, of this job and earlier ones."""
        return sorted(int(path.name.removeprefix("attempt-")) for path in self.folder.glob("attempt-*"))

    def attempt(self, number: int) -> Path:
        """The folder of an attempt."""
        return self.folder / f"attempt-{number}"

    def gone(self, slot: int) -> Path:
        return self.folder / f"gone-{slot}"

    def publish(self, plan: Plan | None, final: int | None = None) -> None:
        """Node 0: the plan that counts from now on, or the exit code of the job."""
        self._plan, self._final, self._written = plan, final, 0.0
        self.keep_alive()

    def keep_alive(self) -> None:
        """Node 0: show the other nodes that it is there; cheap enough for every look, and it tries again."""
        if self._node == 0 and self._nodes > 1 and time.monotonic() - self._written > ALIVE_SECONDS:
            self._alive, self._written = self._alive + 1, time.monotonic()
            plan = self._plan.dump() if self._plan else None
            text = json.dumps({"alive": self._alive, "time": time.time(), "plan": plan, "final": self._final})
            with suppress(OSError):
                write_atomically(self.folder / "board.json", text)

    def lost(self) -> bool:
        """Other nodes: whether node 0 has not been heard of for LOST_SECONDS."""
        if self._node == 0:
            return False
        self._look()
        return time.monotonic() - self._changed > LOST_SECONDS

    def published(self) -> tuple[Plan | None, int | None]:
        """Other nodes: plan and exit code on the board; neither while it is that of an earlier job."""
        self._look()
        if self._text in ("", self._stale):
            return None, None
        values = json.loads(self._text)
        return Plan.load(values["plan"]) if values["plan"] else None, values["final"]

    def report(self, attempt: int, ending: Ending) -> None:
        """Say how an attempt ended on this node."""
        if self._nodes > 1:
            path = self.attempt(attempt) / f"node-{self._node}.json"
            write_atomically(path, json.dumps(ending._asdict()))

    def failure_elsewhere(self, attempt: int) -> Ending | None:
        """How an attempt ended on another node, if one has failed there."""
        if self._nodes == 1:
            return None
        for path in sorted(self.attempt(attempt).glob("node-*.json")):
            ending = Ending(**json.loads(path.read_text()))
            if path.name != f"node-{self._node}.json" and ending.code != 0:
                return ending
        return None

    def _look(self) -> None:
        if (text := self._read()) != self._text:
            self._text, self._changed = text, time.monotonic()

    def _read(self) -> str:
        try:
            return (self.folder / "board.json").read_text()
        except FileNotFoundError:
            return ""
        except OSError:
            return self._text  # as it was when it could be read
