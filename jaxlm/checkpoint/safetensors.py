"""Folders of safetensors files, read and written a few rows at a time (https://github.com/huggingface/safetensors).

A file is the length of a header (8 bytes, little-endian), the header (JSON: name -> dtype, shape, first and last byte)
and the tensors' bytes. A folder of several has an index of which file holds which tensor. What is read may have been
made to harm: nothing outside the folder is opened, and a header that does not describe its file is refused.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited, write_atomically
from jaxlm.config.values import shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|msgpack|h5)")

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""What we read and write."""
KNOWN_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Others that may stand in a file, which is not for parameters: buffers that are passed over."""

MOST_HEADER_BYTES = 100_000_000
"""As the library of safetensors has it."""
MOST_INDEX_BYTES = 2**26
LARGEST_FILE = 5 * 10**9
"""A folder is written in files of up to so many bytes, or of one tensor."""

_CURE = "take the file from where the model came from"


class Stored(NamedTuple):
    """A tensor in a file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file at which it begins."""

    def read(self, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` of the first dim (of a scalar: 0 to 1)."""
        dtype, rest = DTYPES[self.dtype], self.shape[1:]
        row = math.prod(rest) * dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(self.start + first * row)
            found = np.fromfile(file, dtype, (last - first) * math.prod(rest))
        if found.size != (last - first) * math.prod(rest):
            raise UserError(f"{self.path} is shorter than when it was opened; copy it again")
        return found.reshape(last - first, *rest)


def open_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor in `folder` by its name.

    Raises:
        UserError: there are no safetensors files, or one of them or the index is not what it says.
    """
    index = folder / INDEX
    if index.exists() or index.is_symlink():
        return _open_indexed(folder)
    if not (folder / SINGLE).exists():
        pickles = sorted(path.name for path in folder.iterdir() if PICKLES.fullmatch(path.name))
        if pickles:
            raise UserError(
                f"{folder / pickles[0]} may run code when it is read, and is not; ask for the model's safetensors "
                "files, or write them with save_pretrained(..., safe_serialization=True)"
            )
        raise UserError(f"{folder} holds no {SINGLE} and no {INDEX}; name the folder of a model (--from)")
    return _open_file(inside(folder, SINGLE))


def inside(folder: Path, name: str) -> Path:
    """The file of `folder` that is called `name`; a link counts where it stays in the folder, or leads to the blobs of
    Hugging Face's cache, whose snapshots are links.

    Raises:
        UserError: it lies elsewhere, or is no file.
    """
    root = folder.resolve()
    if not name or name != Path(name).name or name in (".", "..") or "\0" in name or "\\" in name:
        raise UserError(f"{folder} names a file outside of it, {shown(name)}, which is not opened; {_CURE}")
    path, blobs = (root / name).resolve(), root.parent.parent / "blobs"
    cached = root.parent.name == "snapshots" and path.parent == blobs
    if path.parent != root and not cached:
        raise UserError(f"{folder / name} leads out of its folder and is not opened; copy the file itself there")
    if not path.is_file():
        raise UserError(f"{folder / name} is missing or is no file; {_CURE}")
    return path


def _open_indexed(folder: Path) -> dict[str, Stored]:
    where = read_json(inside(folder, INDEX), MOST_INDEX_BYTES).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{folder / INDEX} has no weight_map from tensors to files; {_CURE}")
    files = {name: _open_file(inside(folder, name)) for name in sorted(set(where.values()))}
    for tensor, name in where.items():
        if tensor not in files[name]:
            raise UserError(f"{folder / name} lacks {shown(tensor)}, which {INDEX} says is there; {_CURE}")
    extra = {tensor for name, held in files.items() for tensor in held if where.get(tensor) != name}
    if extra:
        raise UserError(f"{folder}: {INDEX} does not say where {shown(min(extra))} is, or says elsewhere; {_CURE}")
    return {tensor: files[name][tensor] for tensor, name in where.items()}


def _open_file(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER_BYTES):
            raise UserError(f"{path} is no safetensors file: its header would have {length} bytes; {_CURE}")
        header = parse_json(file.read(length), path)
    header.pop("__metadata__", None)
    start, found = 8 + length, {}
    for name, entry in header.items():
        found[name] = _entry(path, name, entry, start, size)
    end = start
    for name, stored in sorted(found.items(), key=lambda item: (item[1].start, _bytes(item[1]))):
        if stored.start != end:
            raise UserError(f"{path}: {shown(name)} overlaps another tensor, or bytes of none stand before it; {_CURE}")
        end += _bytes(stored)
    if end != size:
        raise UserError(f"{path} has {size} bytes and its tensors end at {end}; {_CURE}")
    return found


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(first), int(last)]} if (
            all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= size for n in shape)
            and 0 <= first <= last <= size - start
            and len(shape) < 16
        ):
            stored = Stored(path, dtype, tuple(shape), start + first)
        case _:
            raise UserError(f"{path}: the header says nothing sound of {shown(name)}; {_CURE}")
    if dtype not in DTYPES and dtype not in KNOWN_BYTES:
        raise UserError(f"{path}: {shown(name)} is of dtype {shown(dtype)}; we read {' '.join(DTYPES)}")
    if _bytes(stored) != last - first:
        raise UserError(f"{path}: {shown(name)} has {last - first} bytes and its shape {_bytes(stored)}; {_CURE}")
    return stored


def _bytes(stored: Stored) -> int:
    each = KNOWN_BYTES.get(stored.dtype) or DTYPES[stored.dtype].itemsize
    return math.prod(stored.shape) * each


def read_json(path: Path, largest: int = 2**24) -> dict[str, Any]:
    """The object in a JSON file of bounded size."""
    return parse_json(read_limited(path, largest, str(path), unreadable=_CURE, too_large=_CURE), path)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object no key of which stands twice; `path` is for errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        found = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not (or does not begin with) a sound JSON object; {_CURE}")
    return found


class Writer:
    """Writes a folder of safetensors files whose tensors are known from the start, in any order, a few rows at once."""

    def __init__(self, folder: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str, largest: int = LARGEST_FILE):
        """Lay out the files, `tensors` being name -> shape, all of `dtype`, a key of DTYPES."""
        self.folder, self.dtype = folder, DTYPES[dtype]
        self.stored: dict[str, Stored] = {}
        files = list(
            _packed({name: math.prod(shape) * self.dtype.itemsize for name, shape in tensors.items()}, largest)
        )
        for number, names in enumerate(files, 1):
            path = folder / (SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors")
            self._begin(path, {name: tensors[name] for name in names}, dtype)
        if len(files) > 1:
            total = sum(map(_bytes, self.stored.values()))
            where = {name: stored.path.name for name, stored in sorted(self.stored.items())}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _begin(self, path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, shape in tensors.items():
            size = math.prod(shape) * self.dtype.itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name, shape in tensors.items():
            self.stored[name] = Stored(path, dtype, shape, 8 + len(text) + header[name]["data_offsets"][0])

    def write(self, name: str, first: int, rows: np.ndarray) -> None:
        """Rows of a tensor from `first` on, rounded to the dtype of the files. Raises OSError."""
        stored = self.stored[name]
        with stored.path.open("r+b") as file:
            file.seek(stored.start + first * math.prod(stored.shape[1:]) * self.dtype.itemsize)
            file.write(np.ascontiguousarray(rows, self.dtype).reshape(-1).view(np.uint8).data)

    def flush(self) -> None:
        """Wait until the disk has all of it. Raises OSError."""
        for path in {stored.path for stored in self.stored.values()}:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _packed(sizes: Mapping[str, int], largest: int) -> Iterator[list[str]]:
    """Names in their order, as many to a file as fit."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > largest:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names
