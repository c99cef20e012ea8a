"""A token folder that is damaged, or that lies, is an error that names the file."""

import json

import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.data import tokenizer
from jaxlm.data.store import TokenFolder, is_token_folder

TOKENS, DOCUMENTS = "shard-00001.tokens", "shard-00001.documents"


def edit_index(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def truncate(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def flip(path, at=10):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def link_out(path):
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: truncate(path, 0), "is empty: 0 bytes"),
        (lambda path: truncate(path, path.stat().st_size - 1), "is truncated"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0"), "is too long"),
        (link_out, "is a link out of its folder"),
    ],
    ids=["missing", "empty", "truncated", "longer", "linked"],
)
def test_damage_seen_when_opening(damaged, name, damage, complaint):
    damage(damaged / name)
    with pytest.raises(UserError, match=complaint) as error:
        TokenFolder(damaged)
    assert str(damaged / name) in str(error.value)


@pytest.mark.parametrize("name", [TOKENS, DOCUMENTS])
def test_flipped_bits_are_found_by_verify(damaged, name):
    TokenFolder(damaged).verify()
    flip(damaged / name, at=8)
    with pytest.raises(UserError, match="SHA-256") as error:
        TokenFolder(damaged).verify()
    assert str(damaged / name) in str(error.value)


def test_documents_that_do_not_cut_the_tokens(damaged):
    table = np.fromfile(damaged / DOCUMENTS, "<u8").reshape(-1, 2)
    table[0, 0] = table[1, 0]
    table.tofile(damaged / DOCUMENTS)
    with pytest.raises(UserError, match=f"{DOCUMENTS} does not cut"):
        TokenFolder(damaged)


def rename_shard(name):
    return lambda index: index["shards"][0].update(name=name)


@pytest.mark.parametrize(
    "change",
    [
        rename_shard("../outside"),
        rename_shard("/etc/passwd"),
        rename_shard("shard-00000/../../x"),
        rename_shard("shard-0"),
        rename_shard(3),
        lambda index: index.update(shards=[]),
        lambda index: index.update(shards=["shard-00000"]),
        lambda index: index["shards"].pop(),
        lambda index: index["shards"][0].update(tokens=-1),
        lambda index: index["shards"][0].update(tokens=True),
        lambda index: index.update(tokens=2**70),
        lambda index: index.update(dtype="object"),
        lambda index: index.update(dtype="<u4"),
        lambda index: index.update(format="jaxlm-tokens-2"),
        lambda index: index.pop("vocabulary"),
    ],
)
def test_an_index_that_cannot_be(damaged, change):
    edit_index(damaged, change)
    with pytest.raises(UserError, match=r"index\.json"):
        TokenFolder(damaged)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"null", b"\xff", b"x" * (2**26 + 2)])
def test_an_index_that_is_no_index(damaged, content):
    (damaged / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json is (not the index|over \d+ bytes)"):
        TokenFolder(damaged)
    (damaged / "index.json").unlink()
    assert is_token_folder(damaged)  # it must not be taken for a folder of source files
    with pytest.raises(UserError, match=r"index\.json cannot be read"):
        TokenFolder(damaged)


def test_another_tokenizer_beside_the_tokens(damaged):
    tokenizer.train_bpe(["text"], 300).save(damaged / "tokenizer")
    with pytest.raises(UserError, match="not the tokenizer of its index"):
        _ = TokenFolder(damaged).tokenizer


def test_another_vocabulary_than_the_tokenizers(damaged):
    edit_index(damaged, lambda index: index.update(vocabulary=300))
    with pytest.raises(UserError, match=r"index\.json says vocabulary 300.*its tokenizer 257"):
        _ = TokenFolder(damaged).tokenizer


def test_read_crosses_shards(prepared):
    folder = TokenFolder(prepared)
    files = sorted(prepared.glob("*.tokens"))
    whole = np.concatenate([np.fromfile(path, "<u2") for path in files])
    first = folder.shards[0].tokens
    for start, stop in ((0, folder.tokens), (first - 3, first + 2), (first, first + 1), (5, 5), (first - 1, first)):
        out = np.empty(stop - start, np.int32)
        folder.read(start, stop, out)
        assert (out == whole[start:stop]).all()
    assert [folder.file_of(at) for at in (first - 1, first)] == files[:2]
