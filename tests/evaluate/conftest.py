"""A run that was trained for a few steps."""

import pytest

from jaxlm.config import cli
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.evaluate.__main__ import main
from jaxlm.train import loop

TEXT = "the value of every other function is returned to its caller and never kept"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The run folder; beside it `corpus/`, what it was trained on."""
    base = tmp_path_factory.mktemp("evaluate")
    corpus = base / "corpus"
    corpus.mkdir()
    known = TEXT.split()
    for number in range(40):
        words = [known[(number * i + i * i) % len(known)] for i in range(60)]
        (corpus / f"{number:02}.txt").write_text(" ".join(words) + ".\n")
    options = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.mlp=48", "--model.max-positions=64"]
    options += [f"--data.path={corpus}", f"--data.cache={base}", "--data.vocabulary=290", "--data.sequence-length=16"]
    options += ["--data.validation=0.3", "--data.batch-size=8", "--train.steps=2", "--train.log-every=1"]
    options += ["--eval.batches=2", "--eval.sample-tokens=0", "--mesh=dp1", f"--run={base / 'run'}"]
    loop.run(load(RunConfig, options)[0])
    return base / "run"


@pytest.fixture
def evaluate(run, capfd):
    """Run the command on that run: exit code, stdout, stderr."""

    def call(*argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run(main, [f"--run={run}", *argv])
        return (ended.value.code, *capfd.readouterr())

    return call
