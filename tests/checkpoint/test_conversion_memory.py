"""Import and export hold the largest tensor and no more than 500 MB beside it, whatever the size of the model."""

import pytest

from benchmarks.conversion import PROMISED_BYTES, measure


@pytest.mark.slow
def test_peak_memory(tmp_path):
    found = measure(tmp_path, layers=12, vocabulary=1000)
    limit = found["largest_tensor_bytes"] + PROMISED_BYTES
    # A parameter, or all the model, in memory would show.
    assert found["model_bytes"] > 2.5 * limit
    assert all(found[f"{what}_peak_bytes"] < limit for what in ("import", "export", "saved_export")), found
