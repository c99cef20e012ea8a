"""The page on parallelism shows what benchmarks/traffic.py measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = json.loads((ROOT / "benchmarks/results/traffic.json").read_text())["cases"]


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "traffic", raising=False)
    import traffic

    return traffic


def test_the_table_in_docs_is_that_of_the_results(traffic) -> None:
    assert set(CASES) == set(traffic.CASES)
    assert traffic.table(CASES) in (ROOT / "docs/parallelism.md").read_text()


@pytest.mark.parametrize(
    "case", ["dp8", "tp4", "pp4, 1f1b", "cp4, ring", "cp4, ulysses", "ep4, model.capacity-factor=1"]
)
def test_the_least_by_hand(traffic, case: str) -> None:
    """8 layers, D 128, 8 heads of 16, feed-forward 512 or 8 experts of 128, V 1024, 256 positions, B 32, T 256."""
    layer = 4 * 128 * 128 + 2 * 128 * 512 + (3 * 128 + 128) + (512 + 128) + 2 * 2 * 128
    weights = 4 * (8 * layer + 1024 * 128 + 256 * 128 + 2 * 128)
    activations = 4 * 32 * 256 * 128
    wanted = {
        "dp8": {"gradients": 2 * 7 / 8 * weights},
        "tp4": {"tp": 2 * 3 / 4 * (activations * (4 * 8 + 2) + 3 * 4 * 32 * 256)},
        "pp4, 1f1b": {"gradients": 4 * 1024 * 128, "pp": 2 * activations},
        "cp4, ring": {"gradients": 2 * 3 / 4 * weights, "cp": 6 * 3 / 4 * activations * 8},
        "cp4, ulysses": {"gradients": 2 * 3 / 4 * weights, "cp": 2 * 3 / 4 * activations / 4 * 4 * 8},
    }
    found = CASES[case]["least_by_axis"]
    if case in wanted:
        assert found == {name: round(size) for name, size in wanted[case].items()}
    else:
        assert found["ep"] == 4 * 3 / 4 * activations / 4 * 2 * 8


def test_what_sends_more_than_a_tenth_above_the_least() -> None:
    """It is on the page, with its reason."""
    above = {case for case, row in CASES.items() if row["ratio"] > 1.1}
    assert above == {"pp4, 1f1b", "pp4,dp2", "cp4, ring", "ep4", "dp2,ep4"}
