"""A profile of the steps that `--profile.steps` names."""

from collections.abc import Callable
from pathlib import Path

import jax

from jaxlm.config.checks import profile_window
from jaxlm.train.state import State


class Profiler:
    """Profiles the steps of `window` (first-last; None: no steps) into `folder`/profile."""

    def __init__(self, folder: Path, window: str | None, say: Callable[[str], None]):
        self._folder, self._window, self._say = folder / "profile", window, say
        self._running = False

    def before(self, step: int | None, state: State) -> None:
        """Start or stop the profiler where `step`, which comes next, enters or leaves the window; None: no more steps.

        A run that is continued within the window records the rest of it.
        """
        if not self._window:
            return
        first, last = profile_window(self._window)
        inside = step is not None and first <= step <= last
        if inside == self._running:
            return
        jax.block_until_ready(state)  # so that the steps of the window are in it whole, and no others
        self._running = inside
        if inside:
            jax.profiler.start_trace(str(self._folder))
        else:
            jax.profiler.stop_trace()
            self._say(f"profile of steps {first} to {last} in {self._folder}")
