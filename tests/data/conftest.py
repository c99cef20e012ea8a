"""Small corpora, made once and copied where a test damages them."""

import json
import random
import shutil

import pytest

from jaxlm.config.schema import DataConfig
from jaxlm.data import sources, tokenizer
from jaxlm.data.corpus import open_corpora
from jaxlm.data.prepare import prepare


@pytest.fixture(scope="session")
def texts():
    """40 documents of very uneven length, with text that is easily mangled."""
    chance = random.Random(0)
    words = ["def", "return", "self", "é", "ü", "漢字", "🙂", "\t", "\n\n", "", "<|endoftext|>", "</s>", "x=1", "\r\n"]
    return [" ".join(chance.choices(words, k=int(2 ** chance.uniform(1, 9)))) for _ in range(40)]


@pytest.fixture(scope="session")
def jsonl(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def prepared(jsonl, tmp_path_factory):
    """A token folder of `texts` as bytes, in several shards."""
    output = tmp_path_factory.mktemp("prepared") / "tokens"
    return prepare(sources.find(str(jsonl)), output, tokenizer.Bytes, {}, shard_characters=4000)


@pytest.fixture
def damaged(prepared, tmp_path):
    """A copy of `prepared` to damage."""
    return shutil.copytree(prepared, tmp_path / "damaged")


@pytest.fixture
def config(prepared):
    def make(**changes):
        return DataConfig(**{"path": (str(prepared),), "validation": 0.2, "sequence_length": 64} | changes)

    return make


@pytest.fixture
def corpora(config):
    return open_corpora(config())
