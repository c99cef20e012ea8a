"""Spans hidden from the encoder of a model, which its decoder is to write: span corruption (Raffel et al. 2020,
https://arxiv.org/abs/1910.10683).

Each span of a document leaves a sentinel in its place, and the targets are the sentinels, each followed by what it
stands for. What is hidden is a function of the seed, the number of the sample and the length of its row, as that of
`noise` is.

Legend: B batch, S source length, T target length, N hidden tokens of all rows.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxlm.data.noise import raw_bits
from jaxlm.data.tokenizer import Tokenizer

MEAN_SPAN = 3
"""Tokens of a hidden span, in the mean."""
MULTIPLE = 16
"""Targets are padded to a multiple of this, so that they divide over a mesh and fill its units."""


def target_length(sequence_length: int, share: float) -> int:
    """Columns of a decoder's arrays: room for all that a row of the encoder may hide."""
    # A span has a sentinel, and a document that has spans has an end: there are no more of these than spans.
    longest = max(1, round(sequence_length * share)) + 2 * sentinels(sequence_length, share)
    return -(-longest // MULTIPLE) * MULTIPLE


def sentinels(sequence_length: int, share: float) -> int:
    """Most spans that a row may hide."""
    return max(1, round(max(1, round(sequence_length * share)) / MEAN_SPAN))


class Spans:
    """Hides spans of rows."""

    def __init__(self, tokenizer: Tokenizer, share: float, stream: str):
        """`share` is that of the hidden tokens; each `stream` of rows has spans of its own."""
        assert tokenizer.sentinel_ids, "`Tokenizer.with_sentinels` comes first"
        self._share, self._stream = share, stream
        self._eos_id, self._start_id = tokenizer.eos_id, tokenizer.start_id
        self._sentinels = np.array(tokenizer.sentinel_ids, np.int32)
        self._is_text = tokenizer.byte_lengths() > 0

    def hide(
        self, tokens_BS: Int32[np.ndarray, "B S"], segments_BS: Int32[np.ndarray, "B S"], samples: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """What the encoder reads in place of `tokens_BS`, what the decoder reads, and its targets: a `loader.Batch`.

        Special ids and padding (segment 0) are never hidden. A span ends with its document.
        """
        hidden_BS = self._hidden(tokens_BS, segments_BS, samples)
        begins_BS = hidden_BS & ~np.pad(hidden_BS[:, :-1], ((0, 0), (1, 0)))
        spans_BS = np.cumsum(begins_BS, axis=1)
        firsts_BS = _firsts(segments_BS)
        before_BS = np.maximum.accumulate(np.where(firsts_BS, spans_BS - begins_BS, 0), axis=1)  # of other documents
        marks_BS = self._sentinels[np.where(hidden_BS, spans_BS - before_BS - 1, 0)]
        source, source_segments = self._source(
            np.where(hidden_BS, marks_BS, tokens_BS), segments_BS, (segments_BS > 0) & (begins_BS | ~hidden_BS)
        )
        width = target_length(tokens_BS.shape[1], self._share)
        targets, segments = self._targets(tokens_BS, segments_BS, hidden_BS, begins_BS, marks_BS, width)
        shifted_BT = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
        inputs_BT = np.where(_firsts(segments), self._start_id, shifted_BT)
        return {
            "source_tokens": source,
            "source_segment_ids": source_segments,
            "source_positions": _positions(source_segments),
            "tokens": np.where(segments > 0, inputs_BT, self._eos_id).astype(np.int32),
            "targets": targets,
            "segment_ids": segments,
            "positions": _positions(segments),
            "loss_mask": (segments > 0).astype(np.float32),
        }

    def _hidden(
        self, tokens_BS: Int32[np.ndarray, "B S"], segments_BS: Int32[np.ndarray, "B S"], samples: Sequence[int]
    ) -> Bool[np.ndarray, "B S"]:
        """Which tokens are hidden: those of each drawn span up to the first that may not be."""
        written_B = (segments_BS > 0).sum(axis=1)
        drawn_BS = np.zeros(tokens_BS.shape, bool)
        for i, (sample, written) in enumerate(zip(samples, written_B.tolist(), strict=True)):
            drawn_BS[i, :written] = self._draw(sample, written)
        places_S = np.arange(tokens_BS.shape[1])
        begins_BS = np.where(drawn_BS & ~np.pad(drawn_BS[:, :-1], ((0, 0), (1, 0))), places_S, 0)
        begins_BS = np.maximum.accumulate(begins_BS, axis=1)  # the first place of the span that a place may be in
        other_BS = segments_BS != np.take_along_axis(segments_BS, begins_BS, axis=1)
        kept_BS = drawn_BS & (other_BS | ~self._is_text[tokens_BS])
        return drawn_BS & (np.maximum.accumulate(np.where(kept_BS, places_S, -1), axis=1) < begins_BS)

    def _draw(self, sample: int, length: int) -> Bool[np.ndarray, "length"]:
        """Spans of random lengths, and the text between them, that take turns: text first, a span last."""
        count = min(round(length * self._share), length - 1)
        drawn = np.zeros(length, bool)
        if count <= 0:
            return drawn
        # A span has a token at least, and so has the text before it.
        spans = min(max(1, round(count / MEAN_SPAN)), count, length - count)
        bits = raw_bits(f"spans {self._stream}", sample, length - 2)
        hidden, shown = _cut(count, spans, bits[: count - 1]), _cut(length - count, spans, bits[count - 1 :])
        ends = np.cumsum(hidden + shown)
        for start, end in zip((ends - hidden).tolist(), ends.tolist(), strict=True):
            drawn[start:end] = True
        return drawn

    def _source(
        self, tokens_BS: Int32[np.ndarray, "B S"], segments_BS: Int32[np.ndarray, "B S"], stays_BS: np.ndarray
    ) -> tuple[Int32[np.ndarray, "B S"], Int32[np.ndarray, "B S"]]:
        """Tokens and segments of what stays, closed up."""
        tokens, segments = np.full_like(tokens_BS, self._eos_id), np.zeros_like(segments_BS)
        into = np.nonzero(stays_BS)[0], (np.cumsum(stays_BS, axis=1) - 1)[stays_BS]
        tokens[into], segments[into] = tokens_BS[stays_BS], segments_BS[stays_BS]
        return tokens, segments

    def _targets(
        self,
        tokens_BS: Int32[np.ndarray, "B S"],
        segments_BS: Int32[np.ndarray, "B S"],
        hidden_BS: Bool[np.ndarray, "B S"],
        begins_BS: Bool[np.ndarray, "B S"],
        marks_BS: Int32[np.ndarray, "B S"],
        width: int,
    ) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
        """Targets and segments: a span's sentinel before it, and an end after the last span of a document."""
        shape = len(tokens_BS), width
        targets_BT, made_BT = np.full(shape, self._eos_id, np.int32), np.zeros(shape, np.int32)
        row_N, column_N = np.nonzero(hidden_BS)
        begins_N, segments_N = begins_BS[hidden_BS], segments_BS[hidden_BS]
        documents_N = row_N * (tokens_BS.shape[1] + 1) + segments_N  # a number for each, whatever its row
        lasts_N = np.diff(documents_N, append=-1) != 0
        room_N = begins_N + 1 + lasts_N
        ends_N = np.cumsum(room_N)
        ends_N -= np.maximum.accumulate(np.where(np.diff(row_N, prepend=-1) != 0, ends_N - room_N, 0))
        assert ends_N.max(initial=0) <= width, "target_length has room for every row"
        at_N = ends_N - 1 - lasts_N
        targets_BT[row_N, at_N] = tokens_BS[hidden_BS]
        targets_BT[row_N[begins_N], at_N[begins_N] - 1] = marks_BS[hidden_BS][begins_N]
        for back in range(3):  # a token, its sentinel and its end are of one document
            some_N = room_N > back
            made_BT[row_N[some_N], ends_N[some_N] - 1 - back] = segments_N[some_N]
        return targets_BT, made_BT


def _cut(total: int, parts: int, bits: np.ndarray) -> Int64[np.ndarray, "parts"]:
    """`total` as a sum of `parts` of 1 or more, any such with equal chance; there are `total` - 1 places to cut at."""
    cuts = np.zeros(parts + 1, np.int64)
    cuts[1:-1], cuts[-1] = np.sort(np.argsort(bits, kind="stable")[: parts - 1]) + 1, total
    return np.diff(cuts)


def _firsts(segments_BT: Int32[np.ndarray, "B T"]) -> Bool[np.ndarray, "B T"]:
    """Where documents begin, and padding."""
    return np.diff(segments_BT, axis=1, prepend=-1) != 0


def _positions(segments_BT: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
    """From 0 within each document."""
    places_T = np.arange(segments_BT.shape[1], dtype=np.int32)
    return places_T - np.maximum.accumulate(np.where(_firsts(segments_BT), places_T, 0), axis=1)
