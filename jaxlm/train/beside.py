"""Work beside the main thread, while a run starts."""

import builtins
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

LATER_NEEDS = ("grain", "orbax.checkpoint")
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
    with _lazy_in_this_thread_alone():
        for name in LATER_NEEDS:
            importlib.import_module(name)


@contextmanager
def _lazy_in_this_thread_alone() -> Iterator[None]:
    """For a moment while grain is imported, etils replaces the `import` of the whole process by one that makes
    stand-ins. Other threads, which import in that moment too, get the ordinary one here."""
    from etils.epy import lazy_imports_utils as lazy

    own, stand_in, ordinary = threading.get_ident(), lazy._lazy_import, builtins.__import__

    def chosen(name: str, *arguments: Any, error_callback: Any, success_callback: Any, **others: Any) -> Any:
        if threading.get_ident() != own:
            return ordinary(name, *arguments, **others)
        callbacks = {"error_callback": error_callback, "success_callback": success_callback}
        return stand_in(name, *arguments, **others, **callbacks)

    lazy._lazy_import = chosen
    try:
        yield
    finally:
        lazy._lazy_import = stand_in
