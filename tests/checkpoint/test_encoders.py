"""What is odd about published encoders: names of old, tensors that repeat others, poolers, no output layer."""

import json

import numpy as np
import pytest

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.__main__ import main
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.train import loop
from tests.checkpoint.folders import tensors, write_model
from tests.checkpoint.shapes import config_json

POOLER = ("pooler.dense.weight", "pooler.dense.bias")


def published(folder, family="bert", change=lambda tensors: tensors, **fields):
    """A folder with what `change` makes of the tensors of a model, name -> array."""
    given = config_json(family, "as published") | fields
    write_model(folder, given)
    held = {name: stored.read(0, stored.shape[0]) for name, stored in safetensors.open_folder(folder).items()}
    width = given["hidden_size"]
    pooler = dict(zip((f"{family}.{name}" for name in POOLER), (np.eye(width), np.arange(width)), strict=True))
    wanted = change(held | {name: value.astype(np.float32) for name, value in pooler.items()})
    writer = safetensors.Writer(folder, {name: value.shape for name, value in wanted.items()}, "F32")
    for name, value in wanted.items():
        writer.write(name, 0, value)
    return folder


def there_and_back(folder, *options):
    run, to = folder.parent / "run", folder.parent / "back"
    assert main(["import", f"--from={folder}", f"--run={run}"]) == 0
    assert main(["export", f"--run={run}", f"--to={to}", *options]) == 0
    return tensors(to)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_pooler_is_kept(family, tmp_path, capsys):
    folder = published(tmp_path / "model", family)
    assert there_and_back(folder) == tensors(folder)
    assert f"neither computed with nor trained: {family}.pooler.dense.bias {family}" in capsys.readouterr().out


def test_a_pooler_is_kept_of_a_run_that_was_trained_on(tmp_path):
    folder = published(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the value of the other function, and so on\n\n" * 300)
    assert main(["import", f"--from={folder}", f"--run={tmp_path / 'run'}"]) == 0
    options = [f"--config={tmp_path / 'run' / 'config.yaml'}", f"--data.path={tmp_path / 'text.txt'}", "--eval.every=0"]
    options += ["--data.tokenizer=bytes", f"--data.cache={tmp_path}", "--train.steps=1", "--data.sequence-length=32"]
    options += ["--mesh=dp1"]
    loop.run(load(RunConfig, options)[0])
    assert main(["export", f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'back'}"]) == 0
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    same = {name for name in before if "pooler" in name or "self.key.bias" in name}
    assert before.keys() - changed == same


def test_names_of_old_and_tensors_that_repeat_others(tmp_path):
    new = tensors(published(tmp_path / "new"))

    def old(held):
        held = {k.replace("LayerNorm.weight", "LayerNorm.gamma"): value for k, value in held.items()}
        held = {k.replace("LayerNorm.bias", "LayerNorm.beta"): value for k, value in held.items()}
        table, bias = held["bert.embeddings.word_embeddings.weight"], held["cls.predictions.bias"]
        held |= {"cls.predictions.decoder.weight": table, "cls.predictions.decoder.bias": bias}
        return held | {"bert.embeddings.position_ids": np.arange(64.0, dtype=np.float32)[None]}

    assert there_and_back(published(tmp_path / "old" / "model", change=old)) == new


def test_an_output_layer_of_its_own_is_refused(tmp_path):
    def other(held):
        return held | {"cls.predictions.decoder.weight": held["bert.embeddings.word_embeddings.weight"] + 1}

    with pytest.raises(UserError, match="cls.predictions.decoder.weight is not the embedding"):
        there_and_back(published(tmp_path / "model", change=other))
    with pytest.raises(UserError, match="tie_word_embeddings=False is not what we compute"):
        there_and_back(published(tmp_path / "untied" / "model", tie_word_embeddings=False))


@pytest.mark.parametrize("bare", [False, True])
def test_a_model_without_its_output_layer(bare, tmp_path, capsys):
    """What sentence embeddings come from: nothing is made up that an export would not leave out again."""

    def body(held):
        held = {name: value for name, value in held.items() if not name.startswith("cls.")}
        return {name.removeprefix("bert."): value for name, value in held.items()} if bare else held

    folder = published(tmp_path / "model", change=body, architectures=["BertModel"])
    whole = {name if name.startswith("bert.") else f"bert.{name}": held for name, held in tensors(folder).items()}
    assert there_and_back(folder) == whole
    assert "no output layer (cls.predictions.transform.dense.weight" in capsys.readouterr().out
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == ["BertModel"]


def test_half_an_output_layer_is_refused(tmp_path):
    def half(held):
        return {name: value for name, value in held.items() if name != "cls.predictions.bias"}

    with pytest.raises(UserError, match="no tensor cls.predictions.bias"):
        there_and_back(published(tmp_path / "model", change=half))


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("bert", {"is_decoder": True}, "is_decoder=True is not what we compute"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not"),
        ("bert", {"architectures": ["BertForTokenClassification"]}, "is not BertForMaskedLM"),
        ("roberta", {"pad_token_id": 0}, "pad_token_id=0 is not what we compute"),
        ("roberta", {"hidden_act": "relu"}, "hidden_act='relu' is not what we compute"),
    ],
)
def test_what_we_cannot_compute_is_refused(family, fields, message, tmp_path):
    folder = published(tmp_path / "model", family)
    (folder / "config.json").write_text(json.dumps(config_json(family, "as published") | fields))
    with pytest.raises(UserError, match=message):
        there_and_back(folder)


def test_roberta_begins_its_positions_behind_padding(tmp_path):
    """Row 2 of its table is of the first token, and the two before it come last, where no token is."""
    folder = published(tmp_path / "model", "roberta")
    assert main(["import", f"--from={folder}", f"--run={tmp_path / 'run'}"]) == 0
    from jaxlm.checkpoint.slices import SliceReader

    reader = SliceReader((tmp_path / "run" / "checkpoints").absolute(), 0)
    ours = reader.read("params.positions.embedding", (), (slice(0, 66), slice(0, 48)))
    theirs = safetensors.open_folder(folder)["roberta.embeddings.position_embeddings.weight"].read(0, 66)
    assert (ours[:64] == theirs[2:]).all() and (ours[64:] == theirs[:2]).all()
