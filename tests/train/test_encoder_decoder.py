"""An encoder-decoder trains as a decoder does: on a mesh what one device computes, and nothing is lost."""

from pathlib import Path

import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.data import tokenizer
from jaxlm.evaluate.__main__ import main as evaluate
from jaxlm.generate.__main__ import main as generate
from jaxlm.metrics.jsonl import read
from tests.train.battery import build as build_run
from tests.train.battery import compare, configuration, measure, on_one_device
from tests.train.running import losses, train

MESHES = {"dp2,fsdp2,tp2": {"train__microbatches": 2, "optimizer__shard": "data"}}
MORE = {
    "fsdp4,tp2": {"train__microbatches": 4},
    "rep2,dp2,tp2": {"optimizer__shard": "data", "remat": "selective"},
}
"""Meshes of the slow suite."""
KEYS = {
    "model__architecture": "encoder_decoder",
    "model__positions": "relative",
    "model__norm": "rms",
    "model__biases": "",
    "model__query_scale": 1.0,
    "model__dropout": 0.1,
    "data__noise": 0.15,
    "data__packing": "fit",
    "data__sequence_length": 64,
    "eval__sample_tokens": 0,
    "optimizer__learning_rate": 1e-2,
}


@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_equals_one_device(mesh: str) -> None:
    compare(measure(configuration("t5", **MESHES[mesh]), mesh), on_one_device(configuration("t5"))).check()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MORE)
def test_more_meshes_equal_one_device(mesh: str) -> None:
    compare(measure(configuration("t5", **MORE[mesh]), mesh), on_one_device(configuration("t5"))).check()


def test_both_stacks_are_cut() -> None:
    whole, cut = (build_run(configuration("t5"), mesh).plan.abstract["params"] for mesh in ("dp1", "fsdp2,tp2"))
    for name in ("encoder", "blocks"):
        sizes = [
            sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in _leaves(tree[name])) for tree in (whole, cut)
        ]
        assert sizes[1] < 0.27 * sizes[0], name


def _leaves(tree: dict) -> list:
    return [leaf for part in tree.values() for leaf in (_leaves(part) if isinstance(part, dict) else [part])]


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "encoder-decoder"
    train(corpus, folder, mesh="dp2,tp2", train__steps=8, **KEYS)
    return folder


def test_a_run_leaves_its_folder(run: Path) -> None:
    lines = read(run / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    evaluations = read(run / "eval.jsonl")
    assert [line["step"] for line in evaluations] == [4, 8] and len({line["tokens"] for line in evaluations}) == 1
    held = tokenizer.load(run / "tokenizer")
    assert held.sentinel_ids and held.mask_id is None


def test_it_answers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = [f"--run={run}", "--prompt=the value", "--max-tokens=5", "--temperature=0"]
    for more in ([], ["--beams=3"], ["--mesh=dp2"]):
        generate([*options, *more])
        out, err = capsys.readouterr()
        assert "the value" not in out and out.endswith("\n"), "the answer alone"
        assert "prefill 10 tokens" in err, "the prompt, and the end of a document"


def test_tasks_of_continuations_are_refused(run: Path) -> None:
    with pytest.raises(UserError, match="use --references"):
        evaluate([f"--run={run}", "--tasks=anything"])


def test_a_resumed_run_is_the_same_run_bitwise(corpus: Path, run: Path, tmp_path: Path) -> None:
    train(corpus, tmp_path, mesh="dp2,tp2", train__steps=8, **KEYS)
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path, mesh="dp2,tp2", train__steps=8, **KEYS)
    assert losses(tmp_path) == losses(run), "every digit of every loss"
    assert read(tmp_path / "eval.jsonl")[-1] == read(run / "eval.jsonl")[-1]


@pytest.mark.slow
def test_a_run_goes_on_elsewhere(corpus: Path, run: Path, tmp_path: Path) -> None:
    """On another mesh: the same spans of the same samples, and the same elements dropped out."""
    train(corpus, tmp_path, mesh="fsdp2", train__steps=8, **KEYS)
    (tmp_path / "checkpoints" / "8" / "manifest.json").unlink()
    train(corpus, tmp_path, mesh="dp4", train__steps=8, train__microbatches=2, **KEYS)
    np.testing.assert_allclose(list(losses(tmp_path).values()), list(losses(run).values()), rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"mesh": "pp2"}, "pp 2 of mesh pp2 cuts layers into stages.* use fsdp2 in its place"),
        ({"mesh": "cp2"}, "cp 2 of mesh cp2 cuts sequences.* use fsdp2 in its place"),
        ({"mesh": "tp2", "context__sequence_parallel": "on"}, "use --context.sequence-parallel=auto"),
        ({"model__positions": "rotary"}, "use --model.positions=relative"),
        ({"model__architecture": "encoder"}, "relative is of an encoder_decoder alone"),
        ({"model__experts": 4}, "--model.experts=4: an encoder_decoder has none"),
        ({"model__token_types": 2}, "--model.token-types=2: an encoder_decoder has none"),
        ({"model__norm_placement": "sum"}, "use --model.norm-placement=pre"),
        ({"data__noise": 0.0}, "use --data.noise=0.15"),
        ({"model__windows": "8"}, "--model.windows=8 has no effect with --model.architecture=encoder_decoder"),
    ],
)
def test_what_it_has_not_is_refused_in_a_line(corpus: Path, tmp_path: Path, keys: dict, line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        train(corpus, tmp_path, **{"mesh": "dp1", **KEYS, **keys})
    assert "\n" not in str(error.value)
