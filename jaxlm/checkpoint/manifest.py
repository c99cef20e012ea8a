"""What a checkpoint is on disk, and whether it can be trusted. Reads and hashes files: no jax, no Orbax, no pickle.

    checkpoints/200/manifest.json       written last and atomically: the step exists if and only if this file does
    checkpoints/200/save-1/meta.json    configuration, data position, versions; name, shape and dtype of each leaf
    checkpoints/200/save-1/arrays/      the leaves, written by Orbax

The manifest names the folder it vouches for (`save-1`), so that saving a step anew writes `save-2` beside it and the
old one stays valid until one rename replaces the manifest. Folders without a manifest are incomplete saves: they are
never chosen, and removed by the next save.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxlm.config import faultpoints
from jaxlm.config.files import flush_folder, write_atomically

MANIFEST = "manifest.json"
META = "meta.json"
ARRAYS = "arrays"
FORMAT = 1

_LARGEST_JSON_BYTES = 64 * 2**20  # a manifest is about 150 bytes a file: anything near this is not ours
_HASH_THREADS = 4
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_ATTEMPT = re.compile(r"save-[1-9][0-9]{0,8}")


class Damaged(ValueError):
    """A checkpoint that does not hold what its manifest says; the message is one line without the step."""


def steps(folder: Path) -> list[int]:
    """Steps whose save was committed, ascending; nothing is said about the health of their files."""
    return [step for step in _numbered(folder) if (folder / str(step) / MANIFEST).is_file()]


def incomplete(folder: Path) -> list[int]:
    """Steps whose save never finished, ascending."""
    return [step for step in _numbered(folder) if not (folder / str(step) / MANIFEST).is_file()]


def attempt(folder: Path, step: int) -> int:
    """Number of the save that the manifest of `step` vouches for; 0 if no manifest can be read."""
    try:
        return int(_read(folder, step)["save"].removeprefix("save-"))
    except (Damaged, OSError):
        return 0


def save_folder(folder: Path, step: int, number: int) -> Path:
    """Where save `number` of `step` is written."""
    return folder / str(step) / f"save-{number}"


def commit(folder: Path, step: int, number: int) -> None:
    """Hash and flush every file of save `number`, then make it the one that counts. Raises OSError."""
    data = save_folder(folder, step, number)
    paths = sorted(_files(data))
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = list(pool.map(lambda path: _digest(path, flush=True), paths))
    entries = {
        path.relative_to(data).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    for inner in {data, *(path.parent for path in paths)}:
        flush_folder(inner)
    body = {"format": FORMAT, "step": step, "save": data.name, "files": entries}
    write_atomically(data.parent / MANIFEST, _dump(body))
    flush_folder(folder)


def verify(folder: Path, step: int) -> None:
    """Compare every file of `step` with the manifest; raises Damaged at the first difference."""
    body = _read(folder, step)
    data = folder / str(step) / body["save"]
    try:
        found = {path.relative_to(data).as_posix(): path for path in _files(data)}
        for name in sorted(body["files"].keys() - found.keys()):
            raise Damaged(f"{name} is missing")
        for name in sorted(found.keys() - body["files"].keys()):
            raise Damaged(f"{name} does not belong to it")
        for name, path in found.items():
            want, size = body["files"][name]["bytes"], path.stat().st_size
            if size != want:
                raise Damaged(f"{name} has {size} bytes instead of {want}")
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            for name, digest in zip(found, pool.map(_digest, found.values()), strict=True):
                if digest != body["files"][name]["sha256"]:
                    raise Damaged(f"{name} has another SHA-256 than when it was saved")
    except OSError as error:
        raise Damaged(f"{Path(error.filename or data).name} cannot be read: {error.strerror}") from error


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """meta.json of a committed step: `leaves` (name -> shape, dtype) and `meta`; raises Damaged."""
    record = _load(folder / str(step) / _read(folder, step)["save"] / META)
    if not isinstance(record.get("leaves"), dict) or not isinstance(record.get("meta"), dict):
        raise Damaged(f"{META} lacks leaves or meta")
    return record


def total_bytes(folder: Path, step: int) -> int:
    """Bytes of all files of a committed step, by its manifest; raises Damaged."""
    return sum(entry["bytes"] for entry in _read(folder, step)["files"].values())


def delete(folder: Path, step: int) -> None:
    """Remove a step: first what makes it count, so that a kill half-way leaves it incomplete, not damaged."""
    (folder / str(step) / MANIFEST).unlink(missing_ok=True)
    faultpoints.point("retention")
    shutil.rmtree(folder / str(step))


def delete_leftovers(folder: Path, step: int, keep: int) -> None:
    """Remove whatever earlier saves of `step` left beside save number `keep` and its manifest."""
    for path in (folder / str(step)).iterdir():
        if path.name in (MANIFEST, f"save-{keep}"):
            continue
        if _is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()


def _numbered(folder: Path) -> list[int]:
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if _STEP.fullmatch(name) and _is_folder(folder / name))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _dump(body: dict[str, Any]) -> str:
    return json.dumps(body, indent=1, sort_keys=True) + "\n"


def _load(path: Path) -> dict[str, Any]:
    """An object from a JSON file of bounded size that is not a link; raises Damaged."""
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST_JSON_BYTES:
            raise Damaged(f"{path.name} is a link or too large")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path.name} is not JSON") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} is not a JSON object")
    return value


def _read(folder: Path, step: int) -> dict[str, Any]:
    """The manifest, every field of which is checked; its bytes must be those we would write, so no bit can be off."""
    path = folder / str(step) / MANIFEST
    body = _load(path)
    if body.get("format") != FORMAT:
        raise Damaged(f"{MANIFEST} has format {body.get('format')!r}; this version reads {FORMAT}")
    if body.get("step") != step:
        raise Damaged(f"{MANIFEST} is that of step {body.get('step')!r}")
    if not isinstance(body.get("save"), str) or not _ATTEMPT.fullmatch(body["save"]):
        raise Damaged(f"{MANIFEST} names no save folder")
    entries = body.get("files")
    if not isinstance(entries, dict) or META not in entries or not all(map(_is_entry, entries.values())):
        raise Damaged(f"{MANIFEST} has a malformed list of files")
    if _dump(body) != path.read_text(encoding="utf-8"):
        raise Damaged(f"{MANIFEST} was changed after it was written")
    return body


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and isinstance(entry["bytes"], int)
        and isinstance(entry["sha256"], str)
    )


def _files(data: Path) -> Iterator[Path]:
    """All regular files below `data`. A link could lead out of the checkpoint: Damaged."""
    if data.is_symlink():
        raise Damaged(f"{data.name} is a link")
    for where, folders, names in os.walk(data, onerror=_raise):
        for name in (*folders, *names):
            path = Path(where, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Damaged(f"{path.relative_to(data).as_posix()} is not a plain file")
        yield from (Path(where, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _digest(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
