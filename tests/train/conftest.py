"""What tests of the loop share."""

from pathlib import Path

import numpy as np
import pytest

from tests.train.running import train


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty small documents with something to learn in them."""
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    for i in range(40):
        text = " ".join(f"{words[k]}({k})" for k in random.integers(0, 5, 200))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that nothing disturbs."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(corpus, run)
    return run
