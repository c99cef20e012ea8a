"""What differs between two checkpoints: what is said of them, and their arrays, one after the other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import Store


class Checkpoint(NamedTuple):
    """One of the two."""

    folder: Path
    """The `checkpoints` of a run."""
    step: int


class Leaf(NamedTuple):
    """How far apart two arrays of one name are."""

    name: str
    elements: int
    differing: int
    """Elements that are not the same, bit for bit."""
    largest: float
    """Difference, in absolute value; not a number where one of them is not."""
    relative: float
    """Norm of the difference over the norm of the first."""


def facts(first: Checkpoint, second: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """(key, value of the first, of the second) where they say different things; None where one says nothing."""
    a, b = (_flat(manifest.read_meta(*checkpoint)) for checkpoint in (first, second))
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def leaves(first: Checkpoint, second: Checkpoint) -> Iterator[Leaf]:
    """The arrays that both have with one shape and dtype; two are held at a time."""
    records = [manifest.read_meta(*checkpoint)["leaves"] for checkpoint in (first, second)]
    with Store(first.folder) as one, Store(second.folder) as other:
        for name, leaf in records[0].items():
            if records[1].get(name) == leaf:
                abstract = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])}
                a, b = (
                    np.asarray(store.restore(checkpoint.step, abstract, partial=True)[name])
                    for store, checkpoint in ((one, first), (other, second))
                )
                yield _compared(name, a, b)


def _compared(name: str, a: np.ndarray, b: np.ndarray) -> Leaf:
    bits = f"u{a.dtype.itemsize}"
    differing = int(np.count_nonzero(a.reshape(-1).view(bits) != b.reshape(-1).view(bits)))
    x, y = (array.astype(np.float64).reshape(-1) for array in (a, b))
    apart, norm = np.abs(x - y), float(np.linalg.norm(x))
    largest = float(apart.max(initial=0.0))
    return Leaf(name, a.size, differing, largest, float(np.linalg.norm(apart)) / norm if norm else largest)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself, by dotted key, with the shape and dtype of each leaf."""
    meta = {key: value for key, value in record["meta"].items() if key != "saved_at"}
    if isinstance(meta.get("config"), str):
        meta["config"] = yaml.safe_load(meta["config"])
    found = {f"leaf {name}": f"{leaf['dtype']}{leaf['shape']}" for name, leaf in record["leaves"].items()}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            found[prefix] = value

    walk("", meta)
    return found
