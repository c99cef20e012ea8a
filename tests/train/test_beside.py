"""What starts beside the main thread does not get into its way."""

import importlib
import sys
import threading
from types import ModuleType

from jaxlm.train import beside

LAZY = """
from etils import epy
import {name}_events as events

with epy.lazy_imports():
    events.inside.set()
    assert events.leave.wait(30)
    import json.tool as something
kind = type(something).__name__
"""


def test_an_import_made_lazy_in_one_thread_is_not_in_another(tmp_path, monkeypatch):
    """A relative import is what the stand-in of etils refuses."""
    name = "imported_lazily"
    (tmp_path / f"{name}.py").write_text(LAZY.format(name=name))
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "__init__.py").write_text("from .part import number")
    (tmp_path / "parts" / "part.py").write_text("number = 7")
    events = ModuleType(f"{name}_events")
    events.inside, events.leave = threading.Event(), threading.Event()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, events.__name__, events)
    monkeypatch.setattr(beside, "LATER_NEEDS", (name,))
    done = beside.beside(beside.import_later_needs)
    assert events.inside.wait(30)
    try:
        import parts

        assert parts.number == 7
    finally:
        events.leave.set()
    done.result()
    assert importlib.import_module(name).kind == "LazyModule", "else this would show nothing"
