"""A sample of a product of parameters for the slow suite, chosen so that nothing in it is left out; `make test-every`
runs the rest."""

import itertools
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest


def spread(*columns: Sequence[Any], together: int = 2, besides: Sequence[tuple] = ()) -> list[Any]:
    """All combinations of the columns' values but those of `besides`.

    As few as a greedy choice finds are of the slow suite: each `together` values of different columns meet in one of
    them or in one of `besides`, and values take turns. The others wait for `make test-every`.
    """
    rows = [row for row in itertools.product(*columns) if row not in besides]
    missing = set().union(*(_groups(row, together) for row in rows))
    missing -= set().union(*(_groups(row, together) for row in besides))
    chosen, used = set(), Counter()
    while missing:
        best = max(
            range(len(rows)),
            key=lambda i: (len(_groups(rows[i], together) & missing), -sum(used[at] for at in enumerate(rows[i]))),
        )
        chosen.add(best)
        used.update(enumerate(rows[best]))
        missing -= _groups(rows[best], together)
    return _marked(rows, chosen)


def every_third(rows: Iterable[tuple]) -> list[Any]:
    """Rows of which each third is of the slow suite; the others wait too."""
    rows = list(rows)
    return _marked(rows, range(0, len(rows), 3))


def _marked(rows: Sequence[tuple], chosen: Container[int]) -> list[Any]:
    marks = {True: pytest.mark.slow, False: pytest.mark.every}
    return [pytest.param(*row, marks=marks[i in chosen]) for i, row in enumerate(rows)]


def _groups(row: tuple, together: int) -> set[tuple]:
    return set(itertools.combinations(enumerate(row), together))
