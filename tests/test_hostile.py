"""A sample of `make hostile`."""

import pytest

from tests.hostile import KINDS, attack


@pytest.mark.parametrize("kind", KINDS)
def test_each_input_is_taken_or_refused_in_one_line(kind: str) -> None:
    found = attack(kind, 150, seed=1)
    assert not found["failures"]
    assert found["refused"] and found["inputs"] == 150
