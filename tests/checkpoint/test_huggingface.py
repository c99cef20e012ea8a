"""transformers and jaxlm compute the same, of every family: the first shape of each always, all of them and greedy text
in the slow suite."""

import pytest

torch = pytest.importorskip("torch", reason="torch is in the extra hf-test")
pytest.importorskip("transformers", reason="transformers is in the extra hf-test")

from tests.checkpoint.battery import GRADIENT, LOGIT, LOSS, PARAMETER, Pair  # noqa: E402
from tests.checkpoint.shapes import EVERY, FIRST  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family, shape", FIRST)
def test_logits_and_gradients(family, shape, tmp_path):
    errors = Pair(family, shape, tmp_path).outputs()
    assert errors["logits"] < LOGIT and errors["loss"] < LOSS and errors["gradient"] < GRADIENT, errors
    assert errors["largest_logit"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("family, shape", EVERY)
def test_training_and_text(family, shape, tmp_path):
    pair = Pair(family, shape, tmp_path, seed=1)
    errors = {**pair.outputs(), **pair.stepped(), **pair.greedy()}
    assert errors["logits"] < LOGIT and errors["loss"] < LOSS and errors["gradient"] < GRADIENT, errors
    assert errors["parameter"] < PARAMETER, errors
    assert errors["same_prompts"] == errors["prompts"] and errors["different_words"] > 10, errors
