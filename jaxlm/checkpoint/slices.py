"""A checkpoint written and read a slice at a time, by one process: what is converted need not fit into memory.

Orbax makes the frame of the checkpoint, TensorStore (below Orbax too) its arrays; `Store` restores it like any other.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from jaxlm.checkpoint import manifest, provenance
from jaxlm.config.errors import UserError
from jaxlm.config.files import write_atomically

STATE = "state"
"""Orbax's folder of the arrays, and the file in it that says how they are stored."""
METADATA = "_METADATA"


class Leaf(NamedTuple):
    """An array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    """Shape of what is written at once."""


class SliceWriter:
    """Writes step `step` of the checkpoints in `folder`; nothing counts before `commit`."""

    def __init__(self, folder: Path, step: int, leaves: Mapping[str, Leaf]):
        self.folder, self.step, self.leaves = folder, step, leaves
        (folder / str(step)).mkdir(parents=True, exist_ok=True)
        manifest.delete_leftovers(folder, step, 0)
        self.data = manifest.save_folder(folder, step, 1)
        _frame(self.data / manifest.ARRAYS, leaves)
        state = self.data / manifest.ARRAYS / STATE
        self.arrays = {name: _create(state / name, leaf) for name, leaf in leaves.items()}

    def write(self, name: str, where: tuple[Any, ...], values: np.ndarray) -> None:
        """A slice of a leaf, cut where its chunks are. Raises OSError."""
        try:
            self.arrays[name][where].write(values).result()
        except ValueError as error:
            # TensorStore puts its own words around the system's number of the error.
            if not (number := re.search(r"os_error_code='(\d+)'", str(error))):
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(self.data)) from error

    def commit(self, meta: Mapping[str, Any]) -> None:
        """Make the step one that counts, once every slice was written."""
        software = {"versions": provenance.versions(), "git_revision": provenance.git_revision()}
        saved_at = datetime.now(UTC).isoformat(timespec="seconds")
        leaves = {name: {"shape": list(leaf.shape), "dtype": leaf.dtype} for name, leaf in self.leaves.items()}
        record = {"meta": {**software, "saved_at": saved_at, **meta}, "leaves": leaves}
        write_atomically(self.data / manifest.META, json.dumps(record, indent=1, allow_nan=False) + "\n")
        manifest.commit(self.folder, self.step, 1)


class SliceReader:
    """Reads the leaves of a committed step."""

    def __init__(self, folder: Path, step: int):
        state = manifest.save_folder(folder, step, manifest.attempt(folder, step)) / manifest.ARRAYS / STATE
        record = manifest.read_meta(folder, step)
        self.state, self.leaves, self.meta = state, record["leaves"], record["meta"]
        try:
            self.together = bool(json.loads((state / METADATA).read_text())["use_ocdbt"])
        except (OSError, ValueError, KeyError):
            raise UserError(f"checkpoint {step} of {folder} is not laid out as this version writes it") from None
        self.arrays: dict[str, Any] = {}
        self.held: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}
        """The last slab of each leaf whose chunks hold several layers, and where it lies."""

    def read(self, name: str, at: tuple[int, ...], where: tuple[slice, ...]) -> np.ndarray:
        """`leaf[at][where]`. Where chunks reach over several `at`, those of the last chunks are kept."""
        array = self._open(name)
        leading = list(zip(at, array.chunk_layout.read_chunk.shape, array.shape, strict=False))
        if all(size == 1 for _, size, _ in leading):
            return array[(*at, *where)].read().result()
        slab = tuple(slice(i // n * n, min(i // n * n + n, size)) for i, n, size in leading)
        if name not in self.held or self.held[name][0] != slab:
            self.held.pop(name, None)
            self.held[name] = slab, array[slab].read().result()
        within = (i - part.start for i, part in zip(at, slab, strict=True))
        return self.held[name][1][(*within, *where)]

    def close(self, name: str) -> None:
        """Forget what was read of a leaf."""
        self.held.pop(name, None)
        self.arrays.pop(name, None)

    def _open(self, name: str) -> Any:
        if name not in self.arrays:
            kvstore: Any = {"driver": "file", "path": f"{self.state / name}/"}
            if self.together:
                base = {"driver": "file", "path": f"{self.state}/"}
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            self.arrays[name] = ts.open({"driver": "zarr3", "kvstore": kvstore}, open=True, read=True).result()
        return self.arrays[name]


def cuts(size: int, each: int) -> list[tuple[int, int]]:
    """(first, last) of parts of `each` that make up `size`."""
    edges = [*range(0, size, each), size]
    return list(itertools.pairwise(edges))


def _frame(path: Path, leaves: Mapping[str, Leaf]) -> None:
    """What Orbax writes around arrays, without the arrays: it is let save one element for each leaf."""
    from orbax.checkpoint import v1 as ocp

    cpu = jax.local_devices(backend="cpu")[0]
    ocp.save(path, {name: jnp.zeros(1, leaf.dtype, device=cpu) for name, leaf in leaves.items()})
    described = json.loads((path / STATE / METADATA).read_text())
    for entry in described["tree_metadata"].values():
        entry["value_metadata"]["write_shape"] = list(leaves[entry["key_metadata"][0]["key"]].shape)
    described["use_ocdbt"] = False  # one file for all chunks, whose list of them is rewritten for each slice
    shutil.rmtree(path / STATE)
    (path / STATE).mkdir()
    (path / STATE / METADATA).write_text(json.dumps(described))


def _create(path: Path, leaf: Leaf) -> Any:
    grid = {"name": "regular", "configuration": {"chunk_shape": list(leaf.chunk)}}
    described = {"shape": list(leaf.shape), "data_type": leaf.dtype, "chunk_grid": grid, "fill_value": 0}
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{path}/"},
        "metadata": described,
        "store_data_equal_to_fill_value": True,  # a chunk that is missing is damage, not zeros
        "context": {"file_io_sync": False},  # `manifest.commit` flushes every file
    }
    return ts.open(spec, create=True).result()
