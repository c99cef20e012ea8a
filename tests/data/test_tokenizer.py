"""Every kind of tokenizer gives the text back, accounts for its bytes, obeys no special token, and survives saving."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jaxlm.config.errors import UserError
from jaxlm.data import tokenizer

ROOT = Path(__file__).parents[2]
HARD = ["", "a", "héllo 漢字 🙂\n\n\tif x:\r\n  pass", "<|endoftext|>", "a</s>b <s>", "  spaces   ", "1234567"]


def tiktoken_file(folder):
    """A rank file with the 256 bytes and a few merges."""
    tokens = [bytes([b]) for b in range(256)] + [b"de", b"def", b"re", b"ret", b"  "]
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    return path


def hugging_face_file(folder):
    """A byte-level tokenizer.json as found in the wild: it truncates, pads, and has special tokens of its own."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["def return self " * 5], trainer)
    made.enable_truncation(4)
    made.enable_padding(length=9)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


@pytest.fixture(params=["bytes", "bpe", "tokenizer.json", "tiktoken"])
def made(request, tmp_path, texts):
    if request.param == "bytes":
        return tokenizer.Bytes()
    if request.param == "bpe":
        return tokenizer.train_bpe(texts, 400)
    return tokenizer.load((hugging_face_file if request.param == "tokenizer.json" else tiktoken_file)(tmp_path))


def test_round_trip_and_bytes(made, texts):
    lengths = made.byte_lengths()
    assert lengths.shape == (made.vocabulary_size,) and lengths.dtype == np.int32 and lengths[made.eos_id] == 0
    for text in [*HARD, *texts]:
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert made.decode([*ids, made.eos_id]) == text
        assert made.eos_id not in ids
        assert all(0 <= i < made.vocabulary_size for i in ids)
        assert lengths[ids].sum() == len(text.encode())
    assert [list(ids) for ids in made.encode_batch(HARD)] == [made.encode(text) for text in HARD]


def test_saved_is_loaded(made, tmp_path):
    made.save(tmp_path / "saved")
    loaded = tokenizer.load(tmp_path / "saved")
    assert type(loaded) is type(made) and loaded.digest() == made.digest()
    assert (loaded.vocabulary_size, loaded.eos_id) == (made.vocabulary_size, made.eos_id)
    assert [loaded.encode(text) for text in HARD] == [made.encode(text) for text in HARD]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").iterdir()}
    loaded.save(tmp_path / "saved")  # nothing is written that a kill could cut short
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "saved").iterdir()} == written


def test_bpe_compresses_and_has_the_size_asked_for(texts):
    bpe = tokenizer.train_bpe(texts, 400)
    assert bpe.vocabulary_size <= 400
    text = "".join(texts)
    assert len(bpe.encode(text)) < 0.7 * len(text.encode())


def test_bpe_is_the_same_with_any_number_of_threads():
    code = (
        "from jaxlm.data import tokenizer; import pathlib; "
        "texts = [p.read_text() for p in sorted(pathlib.Path(tokenizer.__file__).parent.glob('*.py'))]; "
        "print(tokenizer.train_bpe(texts, 600).digest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code], env={"RAYON_NUM_THREADS": n}, cwd=ROOT, capture_output=True, check=True
        ).stdout
        for n in ("1", "3")
    }
    assert len(digests) == 1


def test_byte_lengths_of_a_sentencepiece_style_tokenizer(tmp_path):
    vocabulary = {"<unk>": 0, "</s>": 1, "\u2581def": 2, "é": 3, "<0x0A>": 4}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    made.add_special_tokens(["<unk>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert tokenizer.load(tmp_path).byte_lengths().tolist() == [0, 0, 4, 2, 1]


def test_end_of_document_is_read_from_the_file_beside(tmp_path):
    path = hugging_face_file(tmp_path)
    assert tokenizer.load(path).eos_id == 1  # </s>, by its name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    assert tokenizer.load(path).eos_id == 0


def bad_files(folder):
    yield folder / "missing.json", "cannot be read"
    for name, content, complaint in (
        ("a.json", "{", "not a JSON object"),
        ("b.json", "{}", "no model"),
        ("c.tiktoken", "??? 1", "not a tiktoken file"),
        ("d.tiktoken", "QQ== 0", "bytes have no rank"),
        ("e.txt", "x", "use bytes, bpe"),
    ):
        (folder / name).write_text(content)
        yield folder / name, complaint


def test_bad_files_are_named(tmp_path):
    for path, complaint in bad_files(tmp_path):
        with pytest.raises(UserError, match=complaint) as error:
            tokenizer.load(path)
        assert path.name in str(error.value)


def test_tiny_vocabulary_is_refused():
    with pytest.raises(UserError, match="257"):
        tokenizer.train_bpe(["a"], 256)


def test_a_text_of_its_own_is_framed_as_its_tokenizer_does(tmp_path):
    made = tokenizer.load(hugging_face_file(tmp_path))
    assert [made.encode_framed(["def", ""])[i] for i in (0, 1)] == [[0, *made.encode("def")], [0]]
    assert [*tokenizer.Bytes().encode_framed(["def"])[0]] == tokenizer.Bytes().encode("def")
