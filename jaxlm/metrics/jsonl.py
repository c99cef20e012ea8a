"""Append-only files of one JSON object a line that survive kills: readable at any moment, repaired when reopened."""

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from jaxlm.config.files import FULL


class JsonLines:
    """Appends objects to `path`, each line written at once.

    Lines that a full disk has no room for are kept, and written before the next one: a run that waits for room, or goes
    on without a checkpoint, must not end for a line about it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._left = b""

    def append(self, values: Mapping[str, Any]) -> None:
        """Write one line. A number that is not finite becomes null, and its kind is kept under `nonfinite`."""
        self._left += (encode(values) + "\n").encode()
        try:
            self._write()
        except OSError as error:
            if error.errno not in FULL:
                raise

    def close(self) -> None:
        """Raises OSError if lines are left that there is no room for."""
        try:
            self._write()
        finally:
            self._file.close()

    def _write(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]


def encode(values: Mapping[str, Any]) -> str:
    """One line of valid JSON; floats keep every bit (shortest text that reads back the same)."""
    plain: dict[str, Any] = {}
    nonfinite: dict[str, str] = {}
    for key, value in values.items():
        if value is None or isinstance(value, (bool, str, list, dict)):
            plain[key] = value
        elif isinstance(value, Integral):
            plain[key] = int(value)
        elif isinstance(value, Real):
            number = float(value)
            plain[key] = number if math.isfinite(number) else None
            if plain[key] is None:
                nonfinite[key] = str(number)
        else:
            raise TypeError(f"{key} is a {type(value).__name__}, not a number: read it from the device first")
    return json.dumps(plain | ({"nonfinite": nonfinite} if nonfinite else {}), allow_nan=False)


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, oldest first; a last line that a kill cut short is left out. No file: no objects."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [value for value in map(_parse, lines) if value is not None]


def rewind(path: Path, step: int) -> int:
    """Keep the lines up to `step`, so that a resumed run logs each step once; returns how many lines went.

    They are moved to `<name>.superseded.jsonl` beside it, and so is a line that is not JSON (cut short by a kill).
    """
    if not path.exists():
        return 0
    kept: list[str] = []
    gone: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        value = _parse(line)
        (kept if value is not None and value.get("step", step) <= step else gone).append(line)
    if not gone:
        repair(path)
        return 0
    with path.with_suffix(".superseded.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in gone)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return len(gone)


def repair(path: Path) -> None:
    """End a last line that a kill cut short, so that the next line stands on its own."""
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _parse(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
