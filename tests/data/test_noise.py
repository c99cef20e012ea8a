"""Hidden words: whole ones, as many as asked for, and the same ones whoever asks for them."""

import numpy as np
import pytest
import tokenizers

from jaxlm.data import tokenizer
from jaxlm.data.corpus import open_corpora
from jaxlm.data.loader import Loader
from jaxlm.data.noise import Noise
from tests.data.test_tokenizer import hugging_face_file, tiktoken_file

TEXT = "def foo_bar(x): return été+x.foo"
WORDS = ["def", " ", "foo_bar", "(", "x", ")", ":", " ", "return", " ", "été", "+", "x", ".", "foo"]


def words_of(made, ids):
    """Texts of the words that neighbours make together."""
    before, behind = made.joints()
    words = [[ids[0]]]
    for a, b in zip(ids[:-1], ids[1:], strict=True):
        if behind[a] and before[b]:
            words[-1].append(b)
        else:
            words.append([b])
    return [made.decode(word) for word in words]


def word_piece(folder):
    """A tokenizer of BERT's kind."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "a", ".", "##b"]
    model = tokenizers.models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.WordPiece()
    made.add_special_tokens(vocabulary[:5])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_words_of_bytes():
    made = tokenizer.Bytes()
    assert words_of(made, made.encode(TEXT)) == WORDS


def test_words_of_a_trained_bpe(texts):
    made = tokenizer.train_bpe([*texts, "foo_bar return x"], 400)
    found = words_of(made, made.encode(TEXT))
    assert "".join(found) == TEXT  # a space may stand with the word behind it: the tokens are as they are
    assert [word.strip() for word in found if word.strip()] == [word for word in WORDS if word.strip()]


def test_words_of_word_pieces(tmp_path):
    made = tokenizer.load(word_piece(tmp_path))
    ids = made.encode("playing a plays. ab")
    assert [made._tokenizer.id_to_token(i) for i in ids] == ["play", "##ing", "a", "play", "##s", ".", "a", "##b"]
    assert words_of(made, ids) == ["playing", "a", "plays", ".", "ab"]
    assert (made.mask_id, made.eos_id, made.with_mask()) == (4, 3, made)
    assert made.byte_lengths()[[5, 6, 9]].tolist() == [4, 3, 1]


def test_a_tokenizer_without_a_mask_gets_one(tmp_path, texts):
    files = (hugging_face_file(tmp_path), tiktoken_file(tmp_path))
    for made in (tokenizer.Bytes(), tokenizer.train_bpe(texts, 400), *map(tokenizer.load, files)):
        other = made.with_mask()
        assert made.mask_id is None and other.mask_id == made.vocabulary_size == other.vocabulary_size - 1
        assert other.encode(TEXT) == made.encode(TEXT) and other.eos_id == made.eos_id
        assert other.byte_lengths()[other.mask_id] == 0 and other.with_mask().mask_id == other.mask_id
        assert other.decode([*made.encode(TEXT), other.mask_id]) == TEXT
        assert other.encode(tokenizer.MASK).count(other.mask_id) == 0  # text is read as text
        other.save(tmp_path / "saved")
        loaded = tokenizer.load(tmp_path / "saved")
        assert (loaded.mask_id, loaded.digest()) == (other.mask_id, other.digest()) and loaded.digest() != made.digest()


@pytest.fixture
def loader(config):
    def make(split="train", **changes):
        chosen = config(**{"noise": 0.15} | changes)
        return Loader(open_corpora(chosen), chosen, split)

    return make


@pytest.mark.parametrize("packing", ["concat", "fit"])
def test_what_is_hidden_and_what_is_not(loader, packing):
    hiding = loader(packing=packing)
    count, mask = 4 * hiding.samples_per_epoch, hiding.corpora.tokenizer.mask_id
    plain, hidden = loader(packing=packing, noise=0.0).rows(0, 0, count), hiding.rows(0, 0, count)
    same = ("segment_ids", "positions")
    assert all(np.array_equal(plain[name], hidden[name]) for name in same)
    assert np.array_equal(hidden["targets"], plain["tokens"])
    chosen = hidden["loss_mask"] == 1
    assert np.array_equal(hidden["tokens"][~chosen], plain["tokens"][~chosen])
    assert not chosen[plain["tokens"] == 256].any() and not chosen[plain["segment_ids"] == 0].any()
    text = (plain["tokens"] != 256) & (plain["segment_ids"] > 0)
    assert abs(chosen[text].mean() - 0.15) < 0.02  # words are long and few, so that chance is coarse
    became, was = hidden["tokens"][chosen], plain["tokens"][chosen]
    shares = (became == mask).mean(), ((became != mask) & (became != was)).mean(), (became == was).mean()
    assert np.allclose(shares, (0.8, 0.1, 0.1), atol=0.02)
    assert not (became == 256).any() and len(np.unique(became[became != was])) > 100


def test_words_are_hidden_whole(loader):
    batch = loader(sequence_length=256).rows(0, 0, 40)
    before, behind = loader().corpora.tokenizer.joints()
    tokens, chosen = batch["targets"], batch["loss_mask"] == 1
    joined = behind[tokens[:, :-1]] & before[tokens[:, 1:]]
    joined &= batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1]
    assert (chosen[:, 1:] == chosen[:, :-1])[joined].all()
    assert (chosen[:, 1:] != chosen[:, :-1])[~joined].mean() > 0.1


def test_noise_is_of_the_sample(loader):
    """Whatever the batch, whoever reads it, at any later time; and another in each epoch, and for another seed."""
    hiding = loader()
    whole = hiding.rows(7, 0, 12)
    again = [loader().rows(10, 0, 5), loader().rows(5, 5, 10), loader().rows(0, 10, 15)]
    for part in again:
        assert all(np.array_equal(part[name], whole[name][3:8]) for name in whole)
    epoch = hiding.samples_per_epoch
    order = [hiding.sample_ids(0, epoch), hiding.sample_ids(epoch, epoch)]
    first, second = (hiding.rows(n * epoch + order[n].index(order[0][3]), 0, 1) for n in (0, 1))
    assert np.array_equal(first["targets"], second["targets"])
    assert not np.array_equal(first["loss_mask"], second["loss_mask"])
    one, other = (loader(seed=seed) for seed in (0, 1))
    row = other.sample_ids(0, epoch).index(order[0][3])
    assert np.array_equal(other.rows(row, 0, 1)["targets"], one.rows(3, 0, 1)["targets"])
    assert not np.array_equal(other.rows(row, 0, 1)["loss_mask"], one.rows(3, 0, 1)["loss_mask"])


def test_noise_of_what_is_held_out_is_fixed(loader):
    one, other = (loader("validation", seed=seed).rows(0, 0, 4) for seed in (0, 1))
    assert all(np.array_equal(one[name], other[name]) for name in one) and one["loss_mask"].any()


def test_noise_never_changes():
    """Nor between versions of NumPy: a run that is continued elsewhere sees what it would have seen."""
    noise = Noise(tokenizer.Bytes(mask=True), 0.15, "train 0")
    tokens = np.frombuffer(b"the value of the other function, and so on", np.uint8).astype(np.int32)[None]
    read, hidden = noise.hide(tokens, np.ones_like(tokens), [3])
    shown = "".join("_" if i == 257 else chr(i) for i in read[0])
    assert (shown, int(hidden.sum())) == ("the value of t__ other function, and so_on", 4)
