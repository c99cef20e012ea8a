"""Every input format gives its documents, and what is damaged is an error that names it."""

import gzip
import json
from collections import Counter

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from jaxlm.config.errors import UserError
from jaxlm.data import sources


def read(path, text_key="text"):
    tally = Counter()
    return list(sources.documents(sources.find(str(path)), text_key, tally)), tally


def write(path, texts):
    """`texts` in the format that the name of `path` asks for."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path, row_group_size=7)
        return path
    content = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":  # two frames, as from `cat a.zst b.zst`
        content = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.ndjson", "a.parquet"])
def test_formats(name, tmp_path, texts):
    assert read(write(tmp_path / name, texts))[0] == texts


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_is_named(name, damage, tmp_path, texts):
    path = write(tmp_path / name, texts)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-20:]
    else:
        content[2] ^= 0xFF if name != "a.parquet" else 0
        content[-3] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=name):
        read(path)


def test_a_zstd_file_cut_between_lines_is_not_a_shorter_corpus(tmp_path):
    compressor = zstandard.ZstdCompressor().compressobj()
    first = compressor.compress(b'{"text": "one"}\n') + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(first + compressor.compress(b'{"text": "two"}\n') + compressor.flush())
    assert read(path)[0] == ["one", "two"]
    path.write_bytes(first)
    with pytest.raises(UserError, match="a.jsonl.zst is truncated"):
        read(path)


def test_folder_of_source_files(tmp_path):
    for name, content in {
        "b/x.py": b"x = 1\n",
        "a.py": b"a\r\n<|endoftext|>\n",
        "b.md": b"",
        ".hidden": b"no",
        "b/__pycache__/x.pyc": b"no",
        "c.bin": b"\0\1",
        "d.py": b"caf\xe9",
        "e.jsonl": b'{"text": "line"}\n\n',
        "f.txt.gz": gzip.compress(b"packed"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    found, tally = read(tmp_path)
    assert found == ["a\r\n<|endoftext|>\n", "x = 1\n", "caf\ufffd", "line", "packed"]
    assert sorted(tally.values()) == [1, 1, 1]  # empty, binary, not UTF-8: each told


def test_a_text_file_is_cut_at_separators_and_when_long(tmp_path):
    (tmp_path / "stories.txt").write_text("one\n<|endoftext|>two\n<|endoftext|>")
    assert read(tmp_path / "stories.txt")[0] == ["one\n", "two\n"]
    lines = "".join(f"line {i}\n" for i in range(30_000))
    (tmp_path / "long.txt").write_text(lines)
    found, _ = read(tmp_path / "long.txt")
    assert "".join(found) == lines and len(found) > 3
    assert all(text.endswith("\n") and len(text) <= sources.ALONE_LONGEST for text in found)
    assert len(read(tmp_path)[0]) == 3  # beside others, the long file is one document
    (tmp_path / "line.txt").write_text("x" * 200_000)
    assert "".join(read(tmp_path / "line.txt")[0]) == "x" * 200_000


def test_stdlib_is_source_without_tests():
    found = sources.find("stdlib")
    names = [source.name for source in found]
    assert "argparse.py" in names and names == sorted(names) and len(names) > 300
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert sum(source.size_bytes for source in found) > 5e6


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", '{"body": "x"}\n', "it has: body"),
        ("a.jsonl", '{"text": 3}\n', "no text in field"),
        ("a.jsonl", "[]\n", "no text in field"),
        ("a.bin", "\0", "binary"),
    ],
)
def test_bad_input_is_named(name, content, complaint, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=complaint) as error:
        read(tmp_path / name)
    assert name in str(error.value)


def test_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x\\ud800"}\n')
    assert read(tmp_path / "a.jsonl", "body")[0] == ["x\ufffd"]
    parquet.write_table(pyarrow.table({"body": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet has no text column 'text' .it has: body"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("spec", ["missing", "empty"])
def test_missing_and_empty_corpora(spec, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=spec):
        sources.find(str(tmp_path / spec))
