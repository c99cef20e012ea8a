"""Which tokens make which row: decided ahead for a whole split, so that row i is the same to everyone who asks.

A row is a window of T + 1 tokens, of which T are read and T predicted. concat cuts the stream of documents every T
tokens; fit puts whole documents into rows and pads (best-fit decreasing, as in Ding et al. 2024, "Fewer Truncations
Improve Language Modeling", https://arxiv.org/abs/2404.10830). Either way each next token within a document is predicted
once an epoch: nothing is dropped, a short last row is padded.
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxlm.data.corpus import Split


class Packing:
    """The rows of a split: each is a few pieces of its stream, one after the other."""

    def __init__(self, split: Split, sequence_length: int, how: Literal["concat", "fit"]):
        self.split, self._length = split, sequence_length
        self._cuts_documents = how == "concat"
        if how == "concat":
            starts = np.arange(0, split.tokens - 1, sequence_length)
            self._starts, self._lengths = starts, np.minimum(sequence_length + 1, split.tokens - starts)
            self._row_ends = np.arange(1, len(starts) + 1)
        else:
            self._starts, self._lengths, self._row_ends = _fit(split.lengths, sequence_length + 1)
        self.rows = len(self._row_ends)

    def fill(self, row: int, tokens: Int32[np.ndarray, "W"], starts: Bool[np.ndarray, "W"]) -> int:
        """Write the window of `row` into `tokens`, mark in `starts` where documents begin, return the tokens written.

        Raises:
            UserError: naming the shard that holds an id outside the vocabulary.
        """
        written = 0
        for piece in range(self._row_ends[row - 1] if row else 0, self._row_ends[row]):
            start, length = int(self._starts[piece]), int(self._lengths[piece])
            into = tokens[written : written + length]
            self.split.read(start, start + length, into)
            largest = int(into.argmax())
            if into[largest] >= self.split.folder.vocabulary:
                self.split.folder.check_ids(int(into[largest]), self.split.file_of(start + largest))
            starts[written] = True
            if self._cuts_documents:
                first, last = self.split.ends.searchsorted((start, start + length - 1), "right")
                starts[self.split.ends[first:last] - start] = True
            written += length
        return written


def _fit(
    lengths: Int64[np.ndarray, "documents"], width: int
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"], Int64[np.ndarray, "rows"]]:
    """Starts and lengths of pieces in row order, and where the pieces of each row end.

    Only documents longer than `width` are cut; the pieces share one token, so that each prediction is in one of them.
    """
    pieces = np.maximum(-(-(lengths - 1) // (width - 1)), 1)
    document = np.repeat(np.arange(len(lengths)), pieces)
    offset = (np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * (width - 1)
    starts = (np.cumsum(lengths) - lengths)[document] + offset
    sizes = np.minimum(lengths[document] - offset, width)
    order = np.argsort(-sizes, kind="stable")
    rows = _best_fit(sizes[order], width)
    by_row = np.argsort(rows, kind="stable")
    row_ends = np.searchsorted(rows[by_row], np.arange(rows.max() + 1), "right")
    return starts[order][by_row], sizes[order][by_row], row_ends


def _best_fit(sizes: Int64[np.ndarray, "P"], width: int) -> Int64[np.ndarray, "P"]:
    """The row of each piece: the fullest row with room for it, else a new one. About a microsecond a piece."""
    with_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0  # bit r is set where a row has room for exactly r tokens
    rows = np.empty(len(sizes), np.int64)
    made = 0
    for i, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row, made = width, made, made + 1
        rows[i] = row
        if room > size:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return rows
