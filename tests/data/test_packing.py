"""What the packing promises, for any documents: nothing lost, nothing twice, nothing cut that fits."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.corpus import Split
from jaxlm.data.packing import Packing


class Stream(Split):
    """A split of documents of given lengths whose token number i is i."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.ends = np.cumsum(self.lengths)
        self.tokens = int(self.ends[-1])
        self.folder = SimpleNamespace(vocabulary=2**31 - 1)

    def read(self, start, stop, out):
        assert 0 <= start < stop <= self.tokens
        out[:] = np.arange(start, stop)


def windows(lengths, sequence_length, how):
    """Tokens and document starts of every row, without the padding."""
    packing = Packing(Stream(lengths), sequence_length, how)
    for row in range(packing.rows):
        tokens = np.full(sequence_length + 1, -1, np.int32)
        starts = np.zeros(sequence_length + 1, bool)
        written = packing.fill(row, tokens, starts)
        assert written > 0 and (tokens[written:] == -1).all() and not starts[written:].any() and starts[0]
        yield tokens[:written], starts[:written]


def predictions(lengths, sequence_length, how):
    """How often each token is predicted from the one before it in its own document."""
    return Counter(
        int(token)
        for tokens, starts in windows(lengths, sequence_length, how)
        for token, before, start in zip(tokens[1:], tokens[:-1], starts[1:], strict=True)
        if not start and token == before + 1
    )


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=60).filter(lambda lengths: sum(lengths) > 1)
sequence_lengths = st.integers(1, 16)


@given(lengths_of_documents, sequence_lengths, st.sampled_from(["concat", "fit"]))
def test_each_token_of_a_document_is_predicted_exactly_once(lengths, sequence_length, how):
    firsts = {0, *np.cumsum(lengths).tolist()}
    expected = Counter(token for token in range(sum(lengths)) if token not in firsts)
    assert predictions(lengths, sequence_length, how) == expected


@given(lengths_of_documents, sequence_lengths)
def test_concat_is_the_stream_cut(lengths, sequence_length):
    firsts = {0, *np.cumsum(lengths).tolist()}
    for row, (tokens, starts) in enumerate(windows(lengths, sequence_length, "concat")):
        begin = row * sequence_length
        assert tokens.tolist() == list(range(begin, min(begin + sequence_length + 1, sum(lengths))))
        assert np.flatnonzero(starts[1:]).tolist() == [i for i, t in enumerate(tokens[1:].tolist()) if t in firsts]


def test_fit_takes_the_fullest_row_with_room():
    assert sorted(len(tokens) for tokens, _ in windows([3, 5, 2, 6, 4], 9, "fit")) == [10, 10]


@given(lengths_of_documents, sequence_lengths)
def test_fit_cuts_no_document_that_fits_and_fills_its_rows(lengths, sequence_length):
    ends = np.cumsum(lengths)
    row_of, fill = {}, []
    for row, (tokens, _) in enumerate(windows(lengths, sequence_length, "fit")):
        fill.append(len(tokens))
        for token in tokens.tolist():
            row_of.setdefault(token, set()).add(row)
    for length, end in zip(lengths, ends.tolist(), strict=True):
        if length <= sequence_length + 1:
            assert len({frozenset(row_of[token]) for token in range(end - length, end)}) == 1
            assert len(row_of[end - 1]) == 1
    # Any two rows together would overflow one: at most one is half empty.
    assert sum(2 * filled <= sequence_length + 1 for filled in fill) <= 1
