"""Saves of a run under way: what may be saved, and what follows where one fails."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from jaxlm.checkpoint.store import SaveFailed, Store
from jaxlm.metrics import heartbeat
from jaxlm.metrics.events import Events
from jaxlm.train.replicas import Differing, Replicas
from jaxlm.train.state import State

RETRY_SECONDS = 30.0
"""Between tries to save with `--checkpoint.on-failure=wait`."""


class Saver:
    """Saves into `store` what all devices agree on.

    Args:
        waits: `--checkpoint.on-failure=wait`: training is to stand still from a failure on until a save works.
    """

    def __init__(self, store: Store, replicas: Replicas, events: Events, say: Callable[[str], None], waits: bool):
        self._store, self._replicas, self._events, self._say, self.waits = store, replicas, events, say, waits
        self._failed = 0
        """Saves in a row."""
        self._seen: SaveFailed | None = None

    @property
    def must(self) -> bool:
        """Whether training is to stand still now."""
        return self.waits and self._failed > 0

    def begin(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Save in the background. Raises Differing, SaveFailed."""
        self.settle(step)  # the one before, which must not take this one with it
        if found := self._replicas.differing(state):
            self._events.record("fault", step=step, kind="replicas differ", arrays=[str(one) for one in found])
            raise Differing(step, found)
        self._store.save(step, state, meta)
        self._events.record("save", step=step)

    def whole(self, step: int, state: State, meta: Mapping[str, Any]) -> None:
        """Save, and return once it is on disk; if it waits, however many tries that takes. Raises as `begin`."""
        with suppress(SaveFailed):  # saves before it, however many, must not take this one with them
            self.settle(step)
        while not self._saved(step, state, meta):
            time.sleep(RETRY_SECONDS)
            heartbeat.phase("save", step)

    def look(self, step: int) -> None:
        """See what became of the save in the background, without waiting for it. Raises SaveFailed."""
        with self.survived(step):
            if self._store.poll() is not None:
                self._failed = 0

    def settle(self, step: int) -> None:
        """Wait for the save in the background. Raises SaveFailed."""
        with self.survived(step):
            if self._store.wait() is not None:
                self._failed = 0

    def end(self, step: int) -> None:
        """Wait for the last save. Raises SaveFailed."""
        try:
            self._store.wait()
        except SaveFailed as error:
            self._see(step, error)
            raise

    @contextmanager
    def survived(self, step: int) -> Iterator[None]:
        """One save that fails is said and survived: the next may find room again. Two in a row end the run, before the
        work that a third would lose, unless it waits."""
        try:
            yield
        except SaveFailed as error:
            self._see(step, error)
            if self._failed > 1 and not self.waits:
                raise
            then = "stands still until a save works" if self.waits else "goes on to the next save"
            self._say(f"warning: {error}; training {then}")

    def _see(self, step: int, error: SaveFailed) -> None:
        """Count and record a failure, on its way to whom it concerns, once."""
        if error is not self._seen:
            self._seen, self._failed = error, self._failed + 1
            self._events.record("fault", step=step, kind="save failed", message=str(error))

    def _saved(self, step: int, state: State, meta: Mapping[str, Any]) -> bool:
        try:
            self.begin(step, state, meta)
            self._store.wait()
        except SaveFailed as error:
            self._see(step, error)
            if not self.waits:
                raise
            self._say(f"warning: {error}; trying again in {RETRY_SECONDS:g} seconds")
            return False
        self._failed = 0
        return True
