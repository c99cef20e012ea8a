"""The default run computes what it always did: the losses of its first 20 steps, on a text that never changes.

The text is made up, because the standard library's own differs between versions of Python. Where a change of the
defaults, the model or the optimizer is meant to change the numbers, write new ones and say so in the changelog:

    python -m tests.train.test_golden
"""

import dataclasses
import functools
import hashlib
import json
import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.data.corpus import Corpora, open_corpora
from jaxlm.data.loader import Loader
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import Assembly, assemble

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 20
TOLERANCE = 1e-4
"""Relative. CPUs differ in how wide their vectors are, so in the order of sums; twenty steps carry that on."""

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]


def text(documents: int = 300) -> list[str]:
    """Something like source code. Only `Random.random` is used: Python promises that it stays the same."""
    source = random.Random(0)

    def pick(items):
        # The square favours the first ones, as in any text.
        return items[int(source.random() ** 2 * len(items))]

    def many(least, most):
        return range(least + int(source.random() * (most - least + 1)))

    names = ["".join(pick(SYLLABLES) for _ in many(1, 4)) for _ in range(1500)]
    statements = [
        lambda: f"{pick(names)} = {pick(names)}({pick(names)}, {int(source.random() * 100)})",
        lambda: f"if {pick(names)}.{pick(names)} is None:\n        return {pick(names)}",
        lambda: f"for {pick(names)} in {pick(names)}:\n        {pick(names)}.append({pick(names)})",
        lambda: f"return {pick(names)} + {pick(names)}",
        lambda: f'raise ValueError("{" ".join(pick(names) for _ in many(2, 6))}")',
    ]
    made = []
    for _ in range(documents):
        functions = []
        for _ in many(2, 8):
            body = "".join(f"    {pick(statements)()}\n" for _ in many(1, 9))
            functions.append(f"def {pick(names)}({', '.join(pick(names) for _ in many(0, 3))}):\n{body}")
        made.append(f'"""{" ".join(pick(names) for _ in many(3, 12))}."""\n\n' + "\n\n".join(functions))
    return made


def configuration(folder: Path) -> RunConfig:
    """The defaults, but for where the text and the cache are."""
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": document}) + "\n" for document in text()), encoding="utf-8")
    config = RunConfig()
    data = dataclasses.replace(config.data, path=(str(corpus),), cache=str(folder / "cache"))
    return dataclasses.replace(config, data=data)


def digest(corpora: Corpora) -> str:
    """SHA-256 of every token of both splits."""
    found = hashlib.sha256()
    for split in (corpora.corpora[0].train, corpora.corpora[0].validation):
        tokens = np.empty(split.tokens, np.int32)
        split.read(0, split.tokens, tokens)
        found.update(tokens.astype("<i4").tobytes())
    return found.hexdigest()


class Runs:
    """The default run on any mesh, from its beginning."""

    def __init__(self, folder: Path):
        self.config = configuration(folder)
        self.corpora = open_corpora(self.config.data)
        self.loader = Loader(self.corpora, self.config.data)

    @functools.cache  # noqa: B019  # one instance, as long as the tests
    def program(self, mesh: str) -> tuple[Assembly, jax.stages.Compiled]:
        spec = parse(mesh)
        devices = jax.devices()[: spec.device_count]
        assembly = assemble(self.config, meshes.from_devices(spec, devices), self.corpora.tokenizer.vocabulary_size)
        return assembly, assembly.compile()

    def losses(self, mesh: str, steps: int) -> list[float]:
        """Of the first `steps` steps."""
        assembly, compiled = self.program(mesh)
        state, found = assembly.init(), []
        size = self.config.data.batch_size
        for step in range(steps):
            rows = self.loader.rows(step * size, 0, size)
            batch = {name: jax.device_put(array, assembly.batch[name].sharding) for name, array in rows.items()}
            state, metrics = compiled(state, batch)
            found.append(float(metrics["loss"]))
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def test_the_text_and_its_tokens(runs: Runs, golden: dict) -> None:
    assert runs.corpora.tokenizer.vocabulary_size == RunConfig().data.vocabulary
    assert len(runs.corpora.corpora) == 1 and runs.corpora.documents("validation") > 1
    assert digest(runs.corpora) == golden["tokens_sha256"]


def test_losses_of_the_first_steps(runs: Runs, golden: dict) -> None:
    assert len(golden["losses"]) == STEPS
    found = runs.losses("dp1", STEPS)
    np.testing.assert_allclose(found, golden["losses"], rtol=TOLERANCE)
    assert runs.losses("dp1", 3) == found[:3], "the same run twice is the same to the bit"


def test_losses_on_a_mesh(runs: Runs, golden: dict) -> None:
    np.testing.assert_allclose(runs.losses("dp4,tp2", 5), golden["losses"][:5], rtol=TOLERANCE)


def test_the_losses_say_something(golden: dict) -> None:
    """They begin at that of knowing nothing, and fall."""
    losses = golden["losses"]
    assert losses[0] == pytest.approx(np.log(RunConfig().data.vocabulary), rel=0.05)
    assert losses[-1] < losses[0] - 1


def main() -> None:
    """Write `golden.json` from what the code computes now."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        values = {"tokens_sha256": digest(runs.corpora), "losses": runs.losses("dp1", STEPS)}
        print(f"{runs.corpora.describe()}\ndp4,tp2: {runs.losses('dp4,tp2', 5)}")
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")
    print(GOLDEN.read_text(), end="")


if __name__ == "__main__":
    import tests.conftest  # noqa: F401  # as under pytest: 8 devices, strict promotion

    main()
