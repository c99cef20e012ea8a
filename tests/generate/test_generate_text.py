"""Text that arrives token by token adds up to the text decoded at once, and goes where it should."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config.errors import UserError
from jaxlm.data.tokenizer import Bytes, train_bpe
from jaxlm.generate.text import Output, TextStream, read_prompts

TOKENIZERS = [Bytes(), train_bpe(["the cat sat on the mat, the cat ran"] * 3, 280)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: type(t).__name__)
@given(prompt=st.text(max_size=12), text=st.text(max_size=12))
def test_pieces_add_up(tokenizer, prompt, text):
    stream = TextStream(tokenizer.decode, tokenizer.encode(prompt))
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=lambda t: type(t).__name__)
@given(ids=st.lists(st.integers(0, 256), max_size=20))
def test_pieces_of_nonsense_add_up(tokenizer, ids):
    stream = TextStream(tokenizer.decode, tokenizer.encode("ab"))
    assert "ab" + "".join([stream.push(i) for i in ids]) + stream.finish() == tokenizer.decode(
        [*tokenizer.encode("ab"), *ids]
    )


def test_a_character_appears_when_it_is_whole():
    stream = TextStream(Bytes().decode, [])
    assert [stream.push(byte) for byte in "a€".encode()] == ["a", "", "", "€"]
    assert stream.push(0xE2) == "" and stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    "stops, pieces, rest",
    [
        (["cd"], ["a", "b", "", ""], ""),
        (["cx"], ["a", "b", "", "cd"], "e"),
        (["zz", "d", "bcd"], ["a", "", "", ""], ""),
        (["", "f"], ["a", "b", "c", "d"], "e"),
        (["bq", "bcdef"], ["a", "", "", ""], "bcde"),
    ],
)
def test_text_ends_before_the_first_stop(stops, pieces, rest):
    stream = TextStream(Bytes().decode, [], stops)
    assert [stream.push(byte) for byte in b"abcd"] == pieces
    assert stream.ended == (rest == "")
    assert stream.push(ord("e")) + stream.finish() == rest and stream.finish() == ""


@given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_before_stops_in_any_pieces(text, stops):
    stream = TextStream(Bytes().decode, [], stops)
    found = ""
    for byte in text.encode():
        found += stream.push(byte)
        if stream.ended:
            break
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    seen = text[: min(ends)] if ends else text  # generation ends with the first stop that is whole
    first = min((at for stop in stops if (at := seen.find(stop)) >= 0), default=len(seen))
    assert found + stream.finish() == seen[:first]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def written(monkeypatch, out, texts, pushes):
    monkeypatch.setattr(sys, "stdout", out)
    output = Output(texts, [TextStream(Bytes().decode, text.encode()) for text in texts])
    for row, token in pushes:
        output.push(row, token)
        yield out.getvalue()
    output.finish()
    yield out.getvalue()


def test_a_terminal_sees_the_first_row_grow_and_then_the_others(monkeypatch):
    shown = list(written(monkeypatch, Terminal(), ["ab", "x"], [(0, 99), (1, 121), (0, 100)]))
    first = "--- 1 of 2 ---\nabc"
    assert shown == [first, first, f"{first}d", f"{first}d\n--- 2 of 2 ---\nxy\n"]


def test_elsewhere_several_come_at_once_and_one_as_it_is_made(monkeypatch):
    pushes = [(0, 99), (0, 100)]
    assert list(written(monkeypatch, io.StringIO(), ["ab"], pushes)) == ["abc", "abcd", "abcd\n"]
    last = "--- 1 of 2 ---\nabcd\n--- 2 of 2 ---\nx\n"
    assert list(written(monkeypatch, io.StringIO(), ["ab", "x"], pushes)) == ["", "", last]


def test_a_model_cannot_drive_the_terminal(monkeypatch):
    pushes = [(0, byte) for byte in b"\x1b[2J\n"]
    assert list(written(monkeypatch, Terminal(), ["a"], pushes))[-1] == "a\ufffd[2J\n\n"
    assert list(written(monkeypatch, io.StringIO(), ["a"], pushes))[-1] == "a\x1b[2J\n\n"


def test_prompt_files(tmp_path):
    plain, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_bytes("def f\r\n\n  é\n".encode())
    lines.write_text("\n".join(json.dumps(text) for text in ("a\nb", "")) + "\n")
    assert read_prompts(plain) == ["def f", "  é"]
    assert read_prompts(lines) == ["a\nb", ""]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"\n \n", "holds no prompt"),
        ("p.txt", b"\xff", "not UTF-8"),
        ("p.jsonl", b'"a"\n{"b": 1}', "line 2 is not a JSON string"),
        ("p.jsonl", b"[" * 9999, "line 1 is not a JSON string"),
        ("p.txt", None, "cannot be read"),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_prompts(path)
    assert str(path) in str(raised.value)
