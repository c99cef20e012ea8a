"""Where results go, and a bar while they are made."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxlm.config.errors import UserError
from jaxlm.config.files import write_atomically

Say = Callable[[str], None]
Advance = Callable[[int, int], None]
"""Told how many of how many are done."""


def note(text: str) -> None:
    """Tell a line about the work, apart from its result."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str) -> Iterator[Advance]:
    """A function that is told how many of how many `what` are done, and shows it on a terminal."""
    console = Console(file=sys.stderr)
    columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


def check_out(out: str | None) -> None:
    """Raise before the work where its result could not be written."""
    if out is not None and (Path(out).is_dir() or not Path(out).expanduser().parent.is_dir()):
        raise UserError(f"--out={out}: name a file in a folder that exists")


def write(out: str | None, found: dict[str, Any]) -> None:
    """`found` as JSON into the file `out`, if there is one."""
    if out is not None:
        write_atomically(Path(out).expanduser(), json.dumps(found, indent=1) + "\n")


def table(rows: list[tuple[str, ...]]) -> None:
    """Rows of words and numbers, the first of them the head: as wide as they need to be."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(rows[0]):
        made.add_column(column, no_wrap=True, justify="right" if number else "left")
    for row in rows[1:]:
        made.add_row(*row)
    console = Console(highlight=False, markup=False)
    (console if console.is_terminal else Console(width=10_000, highlight=False, markup=False)).print(made)
