"""Which of a family's tensors hold which of a model's parameters, piece by piece.

A piece is a few rows of one tensor of theirs, and the same numbers as they lie in each parameter of ours. Pieces are
what a conversion holds in memory.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.checkpoint.slices import Leaf, cuts
from jaxlm.config.errors import UserError
from jaxlm.models.build import Model
from jaxlm.models.families.family import Family, Row

PIECE_BYTES = 2**25


class Piece(NamedTuple):
    """Rows of a tensor of theirs."""

    first: int
    last: int
    """One past its last row."""
    where: tuple[slice, ...]
    """The same in the parameter, within its layer and expert."""
    padding: int
    """Rows of the parameter beyond theirs: padding of the vocabulary."""


class Match(NamedTuple):
    """One tensor of theirs."""

    name: str
    row: Row
    at: tuple[int, ...]
    """The layer and the expert whose it is, where it is of such."""
    own: tuple[int, ...]
    """Shape of the parameter without layers and experts."""
    shape: tuple[int, ...]
    """Shape of theirs."""
    cut: int
    """The dim of `own` along which pieces are cut; -1: not at all."""
    unit: int
    """Rows of theirs to one index along `cut`."""

    def pieces(self, itemsize: int) -> Iterator[Piece]:
        """Of up to PIECE_BYTES, in order."""
        whole = tuple(slice(0, n) for n in self.own)
        if self.cut < 0:
            padding = math.prod(self.own) * len(self.row.ours) - math.prod(self.shape)
            yield Piece(0, self.shape[0], whole, padding)
            return
        for first, last in cuts(self.own[self.cut], self.each(itemsize)):
            where = (*whole[: self.cut], slice(first, last), *whole[self.cut + 1 :])
            begin, end = (min(n * self.unit, self.shape[0]) for n in (first, last))
            yield Piece(begin, end, where, (last - first) * self.unit - (end - begin))

    def each(self, itemsize: int) -> int:
        """Indices along `cut` of a piece."""
        return max(1, PIECE_BYTES // (self.unit * math.prod(self.shape[1:]) * itemsize))

    def chunk(self, itemsize: int) -> tuple[int, ...]:
        """Shape of what is stored together: a piece of one layer and expert."""
        sizes = list(self.own)
        if self.cut >= 0:
            sizes[self.cut] = min(sizes[self.cut], self.each(itemsize))
        return (*(1 for _ in self.at), *sizes)

    def to_ours(self, rows: np.ndarray, piece: Piece) -> list[np.ndarray]:
        """What a piece is in each parameter of the row."""
        shape = tuple(s.stop - s.start for s in piece.where)
        if piece.padding:
            rows = np.concatenate([rows, np.zeros((piece.padding, *rows.shape[1:]), rows.dtype)])
        if self.row.turned:
            return [rows.T.reshape(shape)]
        rows = np.roll(rows, -self.row.first, axis=0) if self.row.first else rows
        return [part.reshape(shape) for part in np.split(rows, len(self.row.ours), axis=-1)]

    def to_theirs(self, parts: list[np.ndarray], piece: Piece) -> np.ndarray:
        """The rows of theirs that are `parts` of our parameters."""
        if self.row.turned:
            rows = parts[0].reshape(math.prod(self.own[: self.row.inputs]), -1).T
        else:
            flat = (-1,) if len(self.shape) == 1 else (piece.last - piece.first + piece.padding, -1)
            rows = np.concatenate([part.reshape(flat) for part in parts], axis=-1)
            rows = np.roll(rows, self.row.first, axis=0) if self.row.first else rows
        return rows[: piece.last - piece.first]


def matches(family: Family, model: Model) -> list[Match]:
    """Every tensor that the family has for `model`.

    Raises:
        UserError: the family has no tensor for one of the parameters.
    """
    shapes, dims = flat(model.abstract), flat(model.dims, is_leaf=lambda leaf: isinstance(leaf, tuple))
    found: list[Match] = []
    for row in family.rows:
        if any(name in shapes for name in row.ours) and row.gated in (None, model.config.gated):
            shape = shapes[row.ours[0]].shape
            found += _of_row(row, shape, dims[row.ours[0]], model.vocabulary)
    missing = shapes.keys() - {name for match in found for name in match.row.ours}
    if missing:
        raise UserError(f"{family.name} of Hugging Face has no tensor for {min(missing)}, which this model has")
    return found


def _of_row(row: Row, shape: tuple[int, ...], dims: tuple[str | None, ...], vocabulary: int) -> Iterator[Match]:
    lead = sum(place in row.theirs for place in ("{layer}", "{expert}"))
    own, names = shape[lead:], dims[lead:]
    vector = not row.ours[0].endswith(("kernel", "embedding"))
    first, second = own[: row.inputs], own[row.inputs :]
    theirs: tuple[int, ...]
    if vector:
        cut, unit, theirs = -1, 1, (vocabulary if names == ("vocab",) else math.prod(own) * len(row.ours),)
    elif row.turned:
        cut, unit, theirs = row.inputs, math.prod(second[1:]), (math.prod(second), math.prod(first))
    else:
        cut, unit, theirs = 0, math.prod(first[1:]), (math.prod(first), math.prod(second) * len(row.ours))
    if row.first:
        cut = -1  # its rows are not in one piece there that are in one here
    if cut >= 0 and names[cut] == "vocab":
        theirs = (vocabulary, *theirs[1:])
    for index in np.ndindex(*shape[:lead]):
        name = row.theirs.format(**dict(zip(("layer", "expert"), index, strict=False)))
        yield Match(name, row, tuple(map(int, index)), own, theirs, cut, unit)


def leaves(found: list[Match], model: Model, dtype: str) -> dict[str, Leaf]:
    """How each parameter is stored, as `params` of a checkpoint."""
    shapes, itemsize = flat(model.abstract), np.dtype(dtype).itemsize
    chunks = {name: match.chunk(itemsize) for match in found for name in match.row.ours}
    return {f"params.{name}": Leaf(shapes[name].shape, dtype, chunk) for name, chunk in chunks.items()}


def flat(tree: Any, is_leaf: Any = None) -> dict[str, Any]:
    """Leaves by dotted path."""
    pairs = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
