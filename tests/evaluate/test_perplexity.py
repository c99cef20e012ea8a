"""Perplexity of text: the number that training says, of any format, on any mesh, by no other tokenizer."""

import json
import math
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.load import load as load_options
from jaxlm.config.schema import DataConfig, ModelConfig, RunConfig
from jaxlm.data.__main__ import main as data
from jaxlm.data.tokenizer import Bytes, load
from jaxlm.evaluate.perplexity import _open
from jaxlm.train import loop


@pytest.fixture
def measured(evaluate, tmp_path):
    """The command's result as it is in the file."""

    def call(*argv):
        code, out, err = evaluate(*argv, f"--out={tmp_path / 'out.json'}")
        assert code == 0, err
        found = json.loads((tmp_path / "out.json").read_text())
        assert f"perplexity {found['perplexity']:.2f}" in out and out.count("\n") == 1
        return found

    return call


def test_it_is_what_training_said(run, measured):
    said = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()][-1]
    found = measured("--batches=2")
    assert {key: found[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")} == {
        key: said[key] for key in ("loss", "perplexity", "bits_per_byte", "tokens")
    }
    assert found["step"] == said["step"] and found["sequences"] == 16
    whole = measured()
    assert whole["tokens"] > 2 * found["tokens"] and whole["loss"] != found["loss"]
    assert whole == measured() | {"seconds": whole["seconds"]}
    assert whole["bits_per_byte"] == pytest.approx(
        whole["loss"] * whole["tokens"] / math.log(2) / whole["text_bytes"], rel=1e-9
    )


@pytest.mark.parametrize("mesh", ["dp2,tp2", pytest.param("fsdp2,cp2", marks=pytest.mark.slow)])
def test_any_mesh(mesh, measured):
    one, many = measured(), measured(f"--mesh={mesh}", "--data.batch-size=4")
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-6) and many["tokens"] == one["tokens"]


def test_any_format(run, measured, tmp_path):
    texts = [path.read_text() for path in sorted((run.parent / "corpus").iterdir())]
    lines, table, folder = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "prepared"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), table)
    data(["prepare", f"--input={lines}", "--text-key=body", f"--output={folder}", f"--tokenizer={run / 'tokenizer'}"])
    of = measured(f"--data.path={run.parent / 'corpus'}")
    assert of["documents"] == len(texts) and of["split"] == "all"
    ids = [load(run / "tokenizer").encode(text) for text in texts]
    assert of["tokens"] <= sum(map(len, ids)) and of["text_bytes"] <= sum(len(text.encode()) for text in texts)
    for path in (lines, table, folder):
        keyed = () if path == folder else ("--data.text-key=body",)
        other = measured(f"--data.path={path}", *keyed)
        assert other | {"path": of["path"], "seconds": of["seconds"]} == of
    parts = [
        measured(f"--data.path={lines}", "--data.text-key=body", f"--data.split={s}") for s in ("train", "validation")
    ]
    assert parts[1]["tokens"] == measured()["tokens"] and sum(part["documents"] for part in parts) == len(texts)


def test_only_the_first_documents(run, measured):
    found = measured(f"--data.path={run.parent / 'corpus'}", "--documents=3")
    lengths = [len(load(run / "tokenizer").encode((run.parent / f"corpus/0{n}.txt").read_text())) + 1 for n in range(3)]
    assert found["documents"] == 3 and found["sequences"] == -(-(sum(lengths) - 1) // 16)
    assert found["tokens"] == sum(lengths) - 3, "each token but the first of a document is predicted once"


def test_no_other_tokenizer(run, evaluate, tmp_path):
    corpus = run.parent / "corpus"
    data(["prepare", f"--input={corpus}", f"--output={tmp_path / 'other'}", "--tokenizer=bytes"])
    code, out, err = evaluate(f"--data.path={tmp_path / 'other'}")
    assert (code, out) == (2, "") and "prepared with another tokenizer" in err and f"{run / 'tokenizer'}" in err
    shutil.copytree(run, tmp_path / "run")
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.txt").write_text("quite another text, quite another tokenizer " * 50)
    (tmp_path / "run/config.yaml").write_text(config.replace(str(corpus), str(tmp_path / "more")))
    code, out, err = evaluate(f"--run={tmp_path / 'run'}")
    assert (code, out) == (2, "") and f"--data.path={tmp_path / 'more'}" in err
    with pytest.raises(UserError, match="is not the tokenizer that the corpora give now"):
        loop.run(load_options(RunConfig, [f"--config={tmp_path / 'run/config.yaml'}", f"--run={tmp_path / 'run'}"])[0])


def test_hidden_spans_have_the_ids_that_the_run_learned(run, tmp_path):
    """A shorter sequence needs fewer of them; a longer one more than there are."""
    own, model, corpus = Bytes().with_sentinels(6), ModelConfig(), run.parent / "corpus"
    object.__setattr__(model, "architecture", "encoder_decoder")  # whatever is to be had as yet
    data(["prepare", f"--input={corpus}", f"--output={tmp_path / 'prepared'}", "--tokenizer=bytes"])

    def opened(length, path, **keys):
        keys |= {"path": (str(path),), "cache": str(tmp_path), "noise": 0.15, "sequence_length": length}
        return _open(RunConfig(model=model, data=DataConfig(**keys)), own, tmp_path / "run")

    for length in (16, 128):
        for corpora in (opened(length, corpus, tokenizer="bytes"), opened(length, tmp_path / "prepared")):
            assert corpora.objective == "spans" and corpora.tokenizer.digest() == own.digest()
    with pytest.raises(UserError, match="--data.sequence-length=256 may hide 13 spans of a row, .* learned 6"):
        opened(256, corpus, tokenizer="bytes")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--documents=0"], ["--documents=0", "1 to"]),
        (["--batches=-1"], ["--batches=-1"]),
        (["--data.path=/nowhere"], ["'/nowhere' does not exist", "--data.path"]),
        (["--data.sequence-length=65"], ["--data.sequence-length=65", "64 learned"]),
        (["--data.batch-size=3", "--mesh=dp2"], ["--data.batch-size=3", "dp 2"]),
        (["--mesh=tp3"], ["tp3"]),
        (["--out=/nowhere/a.json"], ["--out=/nowhere/a.json", "folder that exists"]),
        (["--step=9"], ["--step=9", "there are: 2"]),
        (["--data.pth=a"], ["--data.path"]),
        (["--data.split=validation", "--data.path={0}/run/config.yaml"], ["one document", "use all"]),
    ],
)
def test_mistakes_end_in_one_line(argv, words, run, evaluate):
    code, out, err = evaluate(*(word.format(run.parent) for word in argv))
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (4 if "--step=9" in argv else 2, "")
    assert all(word in line for word in words), line
