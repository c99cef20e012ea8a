"""An encoder trains as a decoder does: on any mesh what one device computes, and a run that nothing can lose."""

from pathlib import Path

import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.data import tokenizer
from jaxlm.generate.__main__ import main as generate
from jaxlm.metrics.jsonl import read
from tests.train.battery import compare, configuration, measure, on_one_device
from tests.train.running import losses, train

MESHES = {
    "fsdp2,tp2": {"context__sequence_parallel": "on"},
    "pp2,tp2": {"remat": "full"},
}
MORE = {
    "dp2,cp2": {"optimizer__shard": "data"},
    "fsdp2,tp2": {"context__sequence_parallel": "on", "train__microbatches": 2, "train__loss_chunk": 100},
}
"""Meshes of the slow suite."""
KEYS = {
    "model__architecture": "encoder",
    "model__norm_placement": "sum",
    "model__activation": "gelu",
    "model__token_types": 2,
    "data__noise": 0.15,
    "data__packing": "fit",
    "data__sequence_length": 64,
    "eval__sample_tokens": 96,
    "optimizer__learning_rate": 1e-2,
}


@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_equals_one_device(mesh: str) -> None:
    config = configuration("bert", **MESHES[mesh])
    compare(measure(config, mesh), on_one_device(configuration("bert"))).check()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MORE)
def test_more_meshes_equal_one_device(mesh: str) -> None:
    compare(measure(configuration("bert", **MORE[mesh]), mesh), on_one_device(configuration("bert"))).check()


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "encoder"
    train(corpus, folder, mesh="dp2,tp2", train__steps=8, **KEYS)
    return folder


def test_a_run_leaves_its_folder(run: Path) -> None:
    lines = read(run / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    counted = sum(line["loss_tokens"] for line in lines) / lines[-1]["tokens"]
    assert 0.05 < counted < 0.25, "hidden tokens alone count"
    evaluations = read(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [4, 8] and len({line["tokens"] for line in evaluations}) == 1
    assert not (run / "samples.txt").exists()
    assert tokenizer.load(run / "tokenizer").mask_id == 257


def test_a_resumed_run_is_the_same_run_bitwise(corpus: Path, run: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, mesh="dp2,tp2", train__steps=8, **KEYS)
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path, mesh="dp2,tp2", train__steps=8, **KEYS)
    assert losses(tmp_path) == losses(run), "every digit of every loss"
    assert read(tmp_path / "eval.jsonl")[-1] == read(run / "eval.jsonl")[-1]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(corpus: Path, run: Path, tmp_path: Path) -> None:
    """On another mesh, in batches of another size: the same samples, hidden alike."""
    train(corpus, tmp_path, mesh="fsdp2", train__steps=8, **KEYS)
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path, mesh="pp2,cp2", train__steps=8, **KEYS)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(run).values()), rtol=1e-5)


def test_it_continues_no_text(run: Path) -> None:
    with pytest.raises(UserError, match="finds hidden tokens and continues no text"):
        generate([f"--run={run}", "--prompt=a"])


def test_what_was_hidden_is_the_runs_own(corpus: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run with data.noise=0.15, this one has 0.3"):
        train(corpus, run, mesh="dp2,tp2", **{**KEYS, "data__noise": 0.3})
