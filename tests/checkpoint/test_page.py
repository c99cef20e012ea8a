"""docs/huggingface.md says what was measured, and what was measured is what is promised."""

import json

from benchmarks.conversion import PROMISED_BYTES
from jaxlm.models.families import FAMILIES
from tests.checkpoint.measure import MODELS, PAGE, RESULTS, render
from tests.checkpoint.shapes import EVERY

MEASURED = json.loads(RESULTS.read_text())
MEMORY = json.loads((RESULTS.parent / "conversion.json").read_text())


def test_the_table_is_that_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    assert render(page, MEASURED) == page
    assert MODELS.keys() == FAMILIES.keys()
    assert [(row["family"], row["shape"]) for row in MEASURED] == EVERY


def test_the_results_are_as_promised():
    for row in MEASURED:
        assert row["bit_for_bit"] and row["same_prompts"] == row["prompts"], row
        assert row["logits"] < 1e-4 and row["gradient"] < 1e-4 and row["loss"] < 1e-5 and row["parameter"] < 1e-5, row


def test_the_memory_is_that_of_the_results():
    page = PAGE.read_text(encoding="utf-8")
    sizes = {name: f"{value / 1e6:,.0f} MB" for name, value in MEMORY.items() if name.endswith("_bytes")}
    seconds = {name: f"{value}" for name, value in MEMORY.items() if name.endswith("_seconds")}
    assert len(sizes) == 6 and len(seconds) == 3
    for name, shown in (sizes | seconds).items():
        assert shown in page, name
    limit = MEMORY["largest_tensor_bytes"] + PROMISED_BYTES
    assert max(value for name, value in MEMORY.items() if name.endswith("_peak_bytes")) < limit
