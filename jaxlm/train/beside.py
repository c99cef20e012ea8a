"""Work beside the main thread, while a run starts."""

import importlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

LATER_NEEDS = ("grain", "orbax.checkpoint.v1")
"""Libraries that are slow to import and that nothing needs before the first step is compiled."""


def beside(work: Callable[..., T], *arguments: Any) -> Future[tuple[T, float]]:
    """Run `work` in a thread of its own: its result and the seconds it took, or the error it raised.

    A process that ends earlier waits for it, because XLA cannot be stopped while it compiles.
    """
    future: Future[tuple[T, float]] = Future()

    def run() -> None:
        began = time.perf_counter()
        try:
            future.set_result((work(*arguments), time.perf_counter() - began))
        except BaseException as error:  # the main thread raises it
            future.set_exception(error)

    threading.Thread(target=run, name="beside").start()
    return future


def import_later_needs() -> None:
    """Import LATER_NEEDS: whoever needs one sooner waits for it."""
    # For a moment while grain is imported, etils replaces the `import` of the whole process. A thread that imports just
    # then would get a stand-in; so none may take over while this one has no reason to wait.
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1.0)
    try:
        for name in LATER_NEEDS:
            importlib.import_module(name)
    finally:
        sys.setswitchinterval(usual)
