"""A person and a model: messages of several lines, replies that come as they are made and that Ctrl-C stops."""

import io
import sys

import pytest

from jaxlm.data.tokenizer import Bytes
from jaxlm.generate import talk
from jaxlm.generate.chat import Chat
from jaxlm.generate.decode import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from tests.generate.tiny import GPT, make


@pytest.fixture(scope="module")
def parts():
    model, params, runtime = make(GPT, vocabulary=257)
    rule = Sampling(temperature=1.0, seed=3)
    prompts = Prompts(model=model.config, tokenizer=Bytes())
    return {"generator": Generator(model, runtime), "params": params, "prompts": prompts, "rule": rule}


class Template(Chat):
    """One that needs no Jinja."""

    def __init__(self):
        pass

    def render(self, messages, *, begin_reply=True):
        return "".join(f"{m['role'][0]}:{m['content'][:4]};" for m in messages)


def read(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return list(talk.messages())


def test_messages_of_one_line_and_of_several(monkeypatch):
    assert read(monkeypatch, "one\n\n  \n two\n") == ["one", " two"]
    assert read(monkeypatch, '"""\na\n\n b\n"""\nthen\n') == ["a\n\n b", "then"]
    assert read(monkeypatch, '"""a""" left out\n"""a\nb"""\n') == ["a", "a\nb"]
    assert read(monkeypatch, 'x\n"""never ended\n') == ["x"]


def test_a_reply_comes_in_pieces_and_each_is_another(parts):
    pieces, partner = [], talk.Talk(**parts, max_new_tokens=8)
    partner.answer("ab", pieces.append, pytest.fail)
    assert len([piece for piece in pieces if piece]) > 2 and pieces[-1] == "\n"
    first = "".join(pieces)
    pieces.clear()
    partner.answer("ab", pieces.append, pytest.fail)
    assert "".join(pieces) != first, "the same message again, drawn anew"
    assert not partner.messages, "without a template each message stands alone"
    again = []
    talk.Talk(**parts, max_new_tokens=8).answer("ab", again.append, pytest.fail)
    assert "".join(again) == first


def test_ctrl_c_stops_the_reply_and_not_the_talk(parts):
    partner, pieces = talk.Talk(**parts, max_new_tokens=8, chat=Template()), []

    def write(piece):
        pieces.append(piece)
        if len("".join(pieces)) == 2:
            raise KeyboardInterrupt

    partner.answer("ab", write, pytest.fail)
    said = "".join(pieces).removesuffix("\n")
    assert 2 <= len(said) < 8
    assert partner.messages == [{"role": "user", "content": "ab"}, {"role": "assistant", "content": said}]
    partner.answer("cd", [].append, pytest.fail)
    assert [m["role"] for m in partner.messages] == ["user", "assistant"] * 2


def test_a_conversation_that_is_too_long_begins_anew(parts):
    partner, notes = talk.Talk(**parts, max_new_tokens=40, chat=Template()), []
    for _ in range(4):
        partner.answer("abcdefgh", [].append, notes.append)
    assert notes and all("begins anew" in note for note in notes)
    assert partner.messages[0]["role"] == "user" and 2 <= len(partner.messages) <= 4


def test_a_stop_ends_a_reply(parts):
    pieces = []
    talk.Talk(**parts, max_new_tokens=8).answer("ab", pieces.append, pytest.fail)
    whole = "".join(pieces).removesuffix("\n")
    pieces.clear()
    talk.Talk(**parts, max_new_tokens=8, stops=[whole[2:4]]).answer("ab", pieces.append, pytest.fail)
    assert "".join(pieces) == whole[: whole.index(whole[2:4])] + "\n"
