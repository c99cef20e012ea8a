"""Opening corpora: raw ones are prepared once, documents are held out by their text, tokenizers must agree."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.schema import DataConfig
from jaxlm.data import prepare, sources, tokenizer
from jaxlm.data.corpus import open_corpora
from jaxlm.data.prepare import prepare as prepare_folder


def text_of(split, number):
    """The text of document `number` of a split."""
    out = np.empty(split.lengths[number], np.int32)
    split.read(int(split.ends[number] - split.lengths[number]), int(split.ends[number]), out)
    return split.folder.tokenizer.decode(out.tolist())


def split_texts(corpora):
    (corpus,) = corpora.corpora
    return [[text_of(s, i) for i in range(len(s.documents))] for s in (corpus.train, corpus.validation)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_splits_are_disjoint_and_whole(corpora, texts):
    train, validation = split_texts(corpora)
    assert 3 <= len(validation) <= 16 and len(train) + len(validation) == len(texts)
    assert not set(train) & set(validation) and Counter(train + validation) == Counter(texts)
    assert (corpora.documents("train"), corpora.documents("validation")) == (len(train), len(validation))
    assert corpora.tokens("validation") == sum(len(text.encode()) + 1 for text in validation)
    assert f"validation {len(validation)} documents" in corpora.describe()


def test_a_document_stays_on_its_side(tmp_path, texts):
    """Whatever stands around it; and copies of it are held out together."""

    def validation(name, texts):
        config = DataConfig(
            path=(write(tmp_path / name, texts),), cache=str(tmp_path), tokenizer="bytes", validation=0.3
        )
        return split_texts(open_corpora(config))[1]

    held_out = validation("a.jsonl", texts)
    more = validation("b.jsonl", [*reversed(texts), "new"] + texts)
    assert Counter(more) - Counter(["new"]) == Counter(held_out + held_out)


def test_few_documents_are_still_split(tmp_path):
    def counts(texts, fraction):
        path = write(tmp_path / f"{len(texts)}.jsonl", texts)
        corpora = open_corpora(DataConfig(path=(path,), cache=str(tmp_path), tokenizer="bytes", validation=fraction))
        return corpora.documents("train"), corpora.documents("validation")

    assert counts(["one", "two"], 1e-9) == (1, 1)
    assert counts(["one", "two", "three"], 0.999999) == (2, 1)
    assert counts(["one"], 0.5) == (1, 0)
    assert counts(["one", "two"], 0.0) == (2, 0)


def test_unigram_entropy(corpora):
    (corpus,) = corpora.corpora
    counts = Counter()
    for number in range(len(corpus.train.documents)):
        counts.update([*text_of(corpus.train, number).encode(), 256])
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert corpora.unigram_entropy() == pytest.approx(expected, rel=1e-12)


def test_unigram_entropy_of_a_mixture_follows_the_weights(tmp_path):
    paths = (write(tmp_path / "a.jsonl", ["a" * 50] * 9), write(tmp_path / "b.jsonl", ["b" * 50]))
    config = DataConfig(path=paths, weights=(1.0, 1.0), cache=str(tmp_path), tokenizer="bytes", validation=0.0)
    p = np.array([50, 50, 2]) / 102
    assert open_corpora(config).unigram_entropy() == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)


def test_raw_corpora_are_prepared_once_and_again_when_they_change(tmp_path, texts, monkeypatch):
    path = write(tmp_path / "a.jsonl", texts)
    config = DataConfig(path=(path,), cache=str(tmp_path / "cache"), vocabulary=300)
    first = open_corpora(config).corpora[0].folder
    monkeypatch.setattr(prepare, "_write_shards", None)
    assert open_corpora(config).corpora[0].folder.path == first.path
    with pytest.raises(TypeError):  # the shard writer we took away
        open_corpora(DataConfig(path=(path,), cache=str(tmp_path / "cache"), vocabulary=301))
    write(tmp_path / "a.jsonl", texts[:-1])
    with pytest.raises(TypeError):
        open_corpora(config)


def test_raw_corpora_share_one_tokenizer(tmp_path, texts):
    paths = write(tmp_path / "a.jsonl", texts[:20]), write(tmp_path / "b.jsonl", texts[20:])
    corpora = open_corpora(DataConfig(path=paths, cache=str(tmp_path / "cache"), vocabulary=300))
    assert [corpus.name for corpus in corpora.corpora] == ["a.jsonl", "b.jsonl"]
    assert len({corpus.folder.tokenizer_sha256 for corpus in corpora.corpora}) == 1


def test_prepared_folders_bring_their_tokenizer(prepared, tmp_path, texts):
    path = write(tmp_path / "a.jsonl", texts[:20])
    corpora = open_corpora(DataConfig(path=(path, str(prepared)), cache=str(tmp_path / "cache")))
    assert [type(corpus.folder.tokenizer) for corpus in corpora.corpora] == [tokenizer.Bytes] * 2
    tokenizer.train_bpe(texts, 300).save(tmp_path / "bpe")
    for asked, complaint in ((str(tmp_path / "bpe"), "was not prepared with"), ("no/such.json", "cannot be read")):
        with pytest.raises(UserError, match=complaint):
            open_corpora(DataConfig(path=(str(prepared),), tokenizer=asked))
    other = prepare_folder(sources.find(path), tmp_path / "other", lambda: tokenizer.load(tmp_path / "bpe"), {})
    with pytest.raises(UserError, match="different tokenizers"):
        open_corpora(DataConfig(path=(str(prepared), str(other))))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"path": ("no/such/corpus",)}, "'no/such/corpus' does not exist"),
        ({"weights": (1.0, 2.0)}, "--data.weights has 2 numbers"),
    ],
)
def test_mistakes_are_named(config, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        open_corpora(config(**changes))


def test_keys_that_these_corpora_leave_without_effect_are_said(tmp_path, texts):
    raw = write(tmp_path / "raw.jsonl", texts)
    prepared = str(prepare_folder(sources.find(raw), tmp_path / "prepared", tokenizer.Bytes, {}))
    (tmp_path / "plain.txt").write_text("\n".join(texts))
    plain = {"cache": str(tmp_path), "tokenizer": "bytes"}

    def notes(**keys):
        return open_corpora(DataConfig(**plain | keys)).notes

    assert notes(path=(raw,)) == notes(path=(raw,), text_key="text") == ()
    assert "--data.text-key=body has no effect" in notes(path=(str(tmp_path / "plain.txt"),), text_key="body")[0]
    found = open_corpora(DataConfig(path=(prepared,), vocabulary=300, text_key="body", cache=str(tmp_path)))
    assert [line.split("=")[0] for line in found.notes] == ["--data.vocabulary", "--data.text-key"]
    assert found.describe().startswith(found.notes[0])
