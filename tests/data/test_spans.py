"""Hidden spans: nothing of the text is lost, as much is hidden as asked for, and the same whoever asks for it."""

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.config.schema import DataConfig, ModelConfig, RunConfig
from jaxlm.data import tokenizer
from jaxlm.data.corpus import Corpora, open_corpora
from jaxlm.data.loader import Loader, batch_at
from jaxlm.data.spans import MEAN_SPAN, Spans, sentinels, target_length
from tests.data.test_tokenizer import hugging_face_file, tiktoken_file

TEXT = "def foo_bar(x): return été+x.foo"
EOS = 256
SOURCE = ("source_tokens", "source_segment_ids", "source_positions")
TARGET = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


def t5_file(folder, count=100):
    """A tokenizer.json of T5's kind: its special tokens are pieces of a Unigram too, the last sentinel first."""
    letters = [(letter, -4.0) for letter in "abdefinrtux0123456789_"]
    names = [f"<extra_id_{i}>" for i in range(count)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("\u2581def", -3.0), *letters]
    model = tokenizers.models.Unigram(pieces + [(name, 0.0) for name in reversed(names)], 2)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>", *names])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def rows_of(loader):
    """The rows of an epoch as a loader gives them that hides nothing: tokens and segments of each."""
    corpora = loader.corpora
    plain = Loader(Corpora(corpora.corpora, corpora.tokenizer), loader.config, loader.split)
    batch = plain.rows(0, 0, loader.samples_per_epoch)
    return batch["tokens"], batch["segment_ids"]


def pairs(tokens, segments):
    """A token and its segment for each that is no padding."""
    return [(token, segment) for token, segment in zip(tokens.tolist(), segments.tolist(), strict=True) if segment]


def restored(batch, row, made):
    """The tokens and segments of a row, put together again from what is left and what was hidden."""
    number = {int(token): i for i, token in enumerate(made.sentinel_ids)}
    spans, last = {}, None
    assert np.array_equal(batch["loss_mask"][row], batch["segment_ids"][row] > 0)
    for token, segment in pairs(batch["targets"][row], batch["segment_ids"][row]):
        if token in number:
            last = spans[segment, token] = []
        elif token == made.eos_id:
            last = None
        else:
            last.append(token)  # which follows a sentinel
    of = {}
    for segment, token in spans:
        of.setdefault(segment, []).append(number[token])
    assert all(numbers == list(range(len(numbers))) for numbers in of.values()), "from 0 in each document, in order"
    found = []
    for token, segment in pairs(batch["source_tokens"][row], batch["source_segment_ids"][row]):
        found += [(t, segment) for t in spans.pop((segment, token), [token])]
    assert not spans
    return found


def check_frame(batch, made):
    """All that holds of any batch besides the text: shifts, positions, padding, dtypes."""
    assert set(batch) == {*SOURCE, *TARGET}
    assert all(array.dtype == (np.float32 if name == "loss_mask" else np.int32) for name, array in batch.items())
    for tokens, segments, positions in (SOURCE, ("targets", "segment_ids", "positions")):
        padding = batch[segments] == 0
        assert (batch[tokens][padding] == made.eos_id).all()
        assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is behind all else"
        first = np.diff(batch[segments], axis=1, prepend=-1) != 0
        assert ((batch[positions] == 0) == first).all()
        assert (np.diff(batch[positions], axis=1)[~first[:, 1:]] == 1).all()
    first = (np.diff(batch["segment_ids"], axis=1, prepend=-1) != 0) & (batch["segment_ids"] > 0)
    on = ~first[:, 1:] & (batch["segment_ids"][:, 1:] > 0)
    assert (batch["tokens"][first] == made.start_id).all()
    assert (batch["tokens"][:, 1:][on] == batch["targets"][:, :-1][on]).all()
    assert (batch["tokens"][batch["segment_ids"] == 0] == made.eos_id).all()
    ends = np.diff(batch["segment_ids"], axis=1, append=-1) != 0
    assert (batch["targets"][ends] == made.eos_id).all()


@pytest.fixture
def loader(config):
    def make(split="train", **changes):
        chosen = config(**{"noise": 0.15} | changes)
        return Loader(open_corpora(chosen, "spans"), chosen, split)

    return make


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize(("packing", "length"), [("concat", 64), ("fit", 300)])
def test_nothing_of_the_text_is_lost(loader, packing, length, document_mask):
    hiding = loader(packing=packing, sequence_length=length, document_mask=document_mask)
    made = hiding.corpora.tokenizer
    tokens, segments = rows_of(hiding)
    batch = hiding.rows(0, 0, hiding.samples_per_epoch)
    check_frame(batch, made)
    short = 0
    for row in range(len(tokens)):
        expected = pairs(tokens[row], segments[row])
        assert restored(batch, row, made) == expected
        short += len(expected) < length
    assert short and batch["segment_ids"].max() > 1 if document_mask else batch["segment_ids"].max() == 1
    hidden = (batch["loss_mask"] > 0) & (made.byte_lengths()[batch["targets"]] > 0)
    assert abs(hidden.sum() / (segments > 0).sum() - 0.15) < 0.02


@given(
    rows=st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=4),
    share=st.sampled_from([0.01, 0.15, 0.5, 0.9, 0.99]),
    whole=st.booleans(),
    sample=st.integers(0, 2**62),
)
def test_any_row_is_restored(rows, share, whole, sample):
    """Of documents of any lengths, with and without an end, in one segment or in their own, and any share of them."""
    length = 80
    made = tokenizer.Bytes().with_sentinels(sentinels(length, share))
    tokens, segments = np.full((len(rows), length), EOS, np.int32), np.zeros((len(rows), length), np.int32)
    for i, documents in enumerate(rows):
        text = [
            (EOS if j == size - 1 and size % 2 else j, n) for n, size in enumerate(documents, 1) for j in range(size)
        ]
        for j, (token, n) in enumerate(text):
            tokens[i, j], segments[i, j] = token, 1 if whole else n
    batch = Spans(made, share, "any").hide(tokens, segments, range(sample, sample + len(rows)))
    check_frame(batch, made)
    assert batch["targets"].shape == (len(rows), target_length(length, share))
    for i in range(len(rows)):
        assert restored(batch, i, made) == pairs(tokens[i], segments[i])


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
@pytest.mark.parametrize("length", [20, 64, 512, 1000])
def test_as_many_as_t5_hides(length, share):
    """Of one document: N tokens in K spans, in the mean of MEAN_SPAN, text first and a span last, as T5's code does."""
    count = round(length * share)
    spans = max(1, round(count / MEAN_SPAN))
    made = tokenizer.Bytes().with_sentinels(spans)
    tokens = np.tile(np.arange(length, dtype=np.int32) % 256, (50, 1))
    batch = Spans(made, share, "x").hide(tokens, np.ones_like(tokens), range(50))
    counted = batch["loss_mask"] > 0
    of_text = made.byte_lengths()[batch["targets"]] > 0
    assert ((counted & of_text).sum(axis=1) == count).all()
    assert ((batch["targets"] >= made.sentinel_ids[0]).sum(axis=1) == spans).all()
    assert (counted.sum(axis=1) == count + spans + 1).all()
    left = batch["source_segment_ids"] > 0
    assert (left.sum(axis=1) == length - count + spans).all() and sentinels(length, share) == spans
    assert (batch["source_tokens"][:, 0] == 0).all()
    assert (batch["source_tokens"][:, length - count + spans - 1] == made.sentinel_ids[spans - 1]).all()


def test_lengths_of_spans_are_any():
    """And each place of a row is hidden about as often."""
    spans = Spans(tokenizer.Bytes().with_sentinels(26), 0.15, "x")
    drawn = np.stack([spans._draw(sample, 512) for sample in range(2000)])
    assert drawn[:, 40:-40].mean() == pytest.approx(0.15, abs=0.01)
    assert abs(drawn[:, 40:-40].mean(axis=0) - 0.15).max() < 0.05
    lengths = np.diff(np.flatnonzero(np.diff(drawn.astype(np.int8).ravel(), prepend=0, append=0)))[::2]
    assert lengths.mean() == pytest.approx(77 / 26) and lengths.min() == 1 and lengths.max() > 10
    assert (lengths == 1).mean() == pytest.approx(25 / 76, abs=0.02)  # the chance that a cut is next to another


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_short_rows_hide_nothing(length):
    made = tokenizer.Bytes().with_sentinels(1)
    tokens, segments = np.full((1, 8), EOS, np.int32), np.zeros((1, 8), np.int32)
    tokens[0, :length], segments[0, :length] = 7, 1
    batch = Spans(made, 0.15, "x").hide(tokens, segments, [0])
    assert np.array_equal(batch["source_tokens"], tokens) and np.array_equal(batch["source_segment_ids"], segments)
    assert not batch["loss_mask"].any() and not batch["segment_ids"].any() and (batch["targets"] == EOS).all()


def test_lengths():
    assert (target_length(512, 0.15), sentinels(512, 0.15)) == (144, 26)  # 77 + 2 * 26, and padding
    assert (target_length(128, 0.15), sentinels(128, 0.15)) == (32, 6)
    assert (target_length(1, 0.01), sentinels(1, 0.01)) == (16, 1)
    for length in range(1, 400):
        assert target_length(length, 0.15) <= target_length(length + 1, 0.15)


def test_spans_are_of_the_sample(loader):
    """Whatever the batch, whoever reads it, at any later time; and others in each epoch, and for another seed."""
    hiding = loader()
    whole = hiding.rows(7, 0, 12)
    for part in (loader().rows(10, 0, 5), loader(batch_size=3).rows(5, 5, 10), loader().rows(0, 10, 15)):
        assert all(np.array_equal(part[name], whole[name][3:8]) for name in whole)
    epoch = hiding.samples_per_epoch
    order = [hiding.sample_ids(0, epoch), hiding.sample_ids(epoch, epoch)]
    first, second = (hiding.rows(n * epoch + order[n].index(order[0][3]), 0, 1) for n in (0, 1))
    made = hiding.corpora.tokenizer
    assert restored(first, 0, made) == restored(second, 0, made)
    assert not np.array_equal(first["targets"], second["targets"])
    one, other = (loader(seed=seed) for seed in (0, 1))
    row = other.rows(other.sample_ids(0, epoch).index(order[0][3]), 0, 1)
    assert restored(row, 0, made) == restored(one.rows(3, 0, 1), 0, made)
    assert not np.array_equal(row["targets"], one.rows(3, 0, 1)["targets"])


def test_spans_of_what_is_held_out_are_fixed(loader):
    one, other = (loader("validation", seed=seed).rows(0, 0, 4) for seed in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in one) and one["loss_mask"].any()


def test_spans_never_change():
    """Nor between versions of NumPy: a run that is continued elsewhere sees what it would have seen."""
    made = tokenizer.Bytes().with_sentinels(3)
    tokens = np.frombuffer(b"the value of the other function, and so on", np.uint8).astype(np.int32)[None]
    batch = Spans(made, 0.15, "train 0").hide(tokens, np.ones_like(tokens), [3])
    shown = [
        "".join(chr(i) if i < 256 else "|012"[i - 256] for i in batch[name][0]) for name in ("source_tokens", "targets")
    ]
    assert [text.rstrip("|") for text in shown] == ["the val0 of the other function, and s1", "0ue1o on"]


def test_batches_on_devices_have_the_widths_of_their_arrays(loader):
    hiding = loader()
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "context"))
    asked = []

    def sharding(name):
        asked.append(name)
        return NamedSharding(mesh, PartitionSpec("data", "context"))

    batch = batch_at(hiding, 5, 4, sharding)
    assert sorted(asked) == sorted([*SOURCE, *TARGET])
    assert all(np.array_equal(batch[name], array) for name, array in hiding.rows(5, 0, 4).items())
    assert {name: array.shape[1] for name, array in batch.items()} == hiding.widths
    assert hiding.widths == dict.fromkeys(SOURCE, 64) | dict.fromkeys(TARGET, target_length(64, 0.15))


def test_a_tokenizer_without_sentinels_gets_some(tmp_path, texts):
    files = (hugging_face_file(tmp_path), tiktoken_file(tmp_path))
    for plain in (tokenizer.Bytes(), tokenizer.train_bpe(texts, 400), *map(tokenizer.load, files)):
        for made in (plain, plain.with_mask()):
            other = made.with_sentinels(5)
            size = made.vocabulary_size
            assert made.sentinel_ids == () and other.sentinel_ids == tuple(range(size, size + 5))
            assert (other.vocabulary_size, other.mask_id, other.eos_id) == (size + 5, made.mask_id, made.eos_id)
            assert other.encode(TEXT) == made.encode(TEXT) and other.start_id == other.eos_id
            assert not other.byte_lengths()[[*other.sentinel_ids]].any() and len(other.byte_lengths()) == size + 5
            assert other.decode([*made.encode(TEXT), *other.sentinel_ids]) == TEXT
            assert not set(other.encode(tokenizer.SENTINEL.format(0))) & {*other.sentinel_ids}  # text is read as text
            other.save(tmp_path / "saved")
            loaded = tokenizer.load(tmp_path / "saved")
            assert (loaded.sentinel_ids, loaded.mask_id) == (other.sentinel_ids, other.mask_id)
            assert loaded.digest() == other.digest() != made.digest()
            assert loaded.with_sentinels(4).digest() == other.digest()  # which are enough
            assert loaded.with_sentinels(9).digest() == made.with_sentinels(9).digest()


def test_a_damaged_count_of_sentinels_is_named(tmp_path):
    tokenizer.Bytes().with_sentinels(5).save(tmp_path)
    path = tmp_path / tokenizer.INFO
    path.write_text(path.read_text().replace("5", '"5"'))
    with pytest.raises(UserError, match="sentinels are no number"):
        tokenizer.load(tmp_path)


def test_the_sentinels_of_t5(tmp_path):
    made = tokenizer.load(t5_file(tmp_path))
    size = made.vocabulary_size
    assert made.sentinel_ids == tuple(range(size - 1, size - 101, -1)) and made.with_sentinels(100) is made
    assert (made.start_id, made.eos_id) == (0, 1)
    assert made.byte_lengths()[[0, 1, 2, *made.sentinel_ids]].sum() == 0
    ids = made.encode("def a0")
    assert made.decode([ids[0], made.sentinel_ids[0], *ids[1:]]) == "def a0"
    made.save(tmp_path / "saved")
    loaded = tokenizer.load(tmp_path / "saved")
    assert (loaded.sentinel_ids, loaded.digest()) == (made.sentinel_ids, made.digest())
    with pytest.raises(UserError, match=r"100 ids .*<extra_id_99>.* hide 200; use a --data.sequence-length of .* 50%"):
        made.with_sentinels(200)


def test_a_unigram_reads_its_special_tokens_as_text(tmp_path):
    """Though they are among its pieces."""
    made = tokenizer.load(t5_file(tmp_path))
    for text in ("def <extra_id_0> x", "a</s>x", "<pad>"):
        special = {made.id_of(name) for name in ("<extra_id_0>", "</s>", "<pad>")}
        assert special & {*made.encode_marked(text)} and not special & {*made.encode(text)}
        assert made.encode_framed([text])[0] == [*made.encode(text), made.eos_id]
    assert made.encode("def a0") == made.encode_marked("def a0")


def test_corpora_have_what_the_objective_needs(config, tmp_path, jsonl):
    chosen = config(noise=0.15)
    found = {name: open_corpora(chosen, name) for name in (None, "next", "mask", "spans")}
    assert {name: corpora.objective for name, corpora in found.items()} == {
        None: "mask",
        "next": "next",
        "mask": "mask",
        "spans": "spans",
    }
    assert open_corpora(config()).objective == "next"
    sizes = {name: corpora.tokenizer.vocabulary_size for name, corpora in found.items()}
    assert sizes == {None: 258, "next": 257, "mask": 258, "spans": 257 + sentinels(64, 0.15)}
    keys = {
        "path": (str(jsonl),),
        "cache": str(tmp_path / "cache"),
        "tokenizer": str(t5_file(tmp_path, 2)),
        "noise": 0.15,
    }
    assert open_corpora(DataConfig(**keys, sequence_length=40), "spans").tokenizer.sentinel_ids == (28, 27)
    with pytest.raises(UserError, match="has 2 ids for hidden spans.*--data.sequence-length"):
        open_corpora(DataConfig(**keys, sequence_length=64), "spans")


@pytest.mark.parametrize(
    ("architecture", "objective"), [("decoder", "next"), ("encoder", "mask"), ("encoder_decoder", "spans")]
)
def test_the_objective_is_the_models(architecture, objective):
    model = ModelConfig()
    object.__setattr__(model, "architecture", architecture)  # whatever is to be had as yet
    assert RunConfig(model=model).objective == objective
