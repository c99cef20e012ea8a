"""transformers and jaxlm compute the same, of every family: the first shape of each always, all of them, greedy text
and searched text in the slow suite."""

import pytest

torch = pytest.importorskip("torch", reason="torch is in the extra hf-test")
pytest.importorskip("transformers", reason="transformers is in the extra hf-test")

from jaxlm.checkpoint.__main__ import main  # noqa: E402
from jaxlm.config.load import load  # noqa: E402
from jaxlm.config.schema import RunConfig  # noqa: E402
from jaxlm.data import tokenizer as tokenizers  # noqa: E402
from jaxlm.train import loop  # noqa: E402
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
def test_config_of_our_own(family, shape, tmp_path):
    found = Pair(family, shape, tmp_path, seed=2).as_our_own()
    assert found["own_config"] == 0, found


@pytest.mark.slow
def test_tokenizer_of_our_own(tmp_path):
    """The files beside a run that did not come from Hugging Face: transformers reads text as we do."""
    from transformers import AutoTokenizer

    (tmp_path / "text.txt").write_text("the value of the other function\n\n" * 300)
    options = [f"--data.path={tmp_path / 'text.txt'}", "--data.vocabulary=300", f"--data.cache={tmp_path}"]
    options += [f"--run={tmp_path / 'run'}", "--train.steps=1", "--eval.every=0", "--eval.sample-tokens=0"]
    options += ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.mlp=40"]
    loop.run(load(RunConfig, options)[0])
    assert main(["export", f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'model'}"]) == 0
    ours, theirs = tokenizers.load(tmp_path / "run" / "tokenizer"), AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "the other value, \u00e9t\u00e9 <|endoftext|>"
    assert theirs.encode(text, split_special_tokens=True) == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id and theirs.decode(ours.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("family, shape", EVERY)
def test_training_and_text(family, shape, tmp_path):
    pair = Pair(family, shape, tmp_path, seed=1)
    errors = {**pair.outputs(), **pair.stepped(), **pair.greedy()}
    assert errors["logits"] < LOGIT and errors["loss"] < LOSS and errors["gradient"] < GRADIENT, errors
    assert errors["parameter"] < PARAMETER, errors
    assert errors["same_prompts"] == errors["prompts"] and errors["different_words"] > 10, errors


@pytest.mark.slow
@pytest.mark.parametrize("family, shape", [one for one in FIRST if one[0] in ("gpt2", "llama", "t5")])
def test_beams(family, shape, tmp_path):
    pair = Pair(family, shape, tmp_path, seed=1)
    for beams, length_penalty in ((3, 1.0), (3, 0.6), (4, 1.0), (4, 0.6)):
        found = pair.searched(beams, length_penalty)
        assert found["same_prompts"] == found["prompts"] and found["ended"] > 5, found
