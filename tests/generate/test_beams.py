"""Beam search: the best of all texts where every one is looked at, and the plain search without a cache elsewhere."""

import re
from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.generate.beams import Beams, Search, rule
from jaxlm.generate.decode import Generator, generate
from jaxlm.generate.sampling import Sampling
from tests.generate.tiny import EXPERTS, GPT, LLAMA, MULTI_QUERY, make

PROMPTS = [[7, 3, 99], list(range(20, 39)), [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW, LENGTH = 10, 32


class Plain:
    """Searches written down a second time, each step a forward pass over whole texts, on one device."""

    def __init__(self, config, **shape):
        self.model, self.params, self.runtime = make(config, **shape)
        self.known = {}

        @jax.jit
        def following(params, batch, ends):
            x = self.model.hidden(params, batch, self.runtime)
            logits = self.model.logits(params, x, self.runtime)
            last = logits[np.arange(len(ends)), ends - 1]
            return jax.nn.log_softmax(last, axis=-1)

        self.following = following

    def log_probabilities(self, texts):
        """Of the token behind each text, as an array [texts, V]."""
        asked = [text for text in dict.fromkeys(map(tuple, texts)) if text not in self.known]
        for first in range(0, len(asked), 8):
            part = asked[first : first + 8]
            rows = {name: np.zeros((8, LENGTH), np.int32) for name in ("tokens", "segment_ids", "positions")}
            rows["positions"][:] = np.arange(LENGTH)
            for row, text in enumerate(part):
                rows["tokens"][row, : len(text)] = text
                rows["segment_ids"][row, : len(text)] = 1
            ends = np.array([len(text) for text in part] + [1] * (8 - len(part)))
            self.known |= zip(part, np.asarray(self.following(self.params, rows, ends)), strict=False)
        return np.stack([self.known[tuple(text)] for text in texts])

    def search(self, prompt, beams, count, ends=(), power=1.0):
        """The best text, without the id that ended it, and how many texts had ended when the search did."""
        going, ended = [(0.0, [])], []
        for length in range(1, count + 1):
            scores = self.log_probabilities([prompt + text for _, text in going])
            grown = [
                (total + float(scores[row, token]), [*text, token])
                for row, (total, text) in enumerate(going)
                for token in range(scores.shape[1])
            ]
            grown.sort(key=lambda one: -one[0])
            stays = [one for one in grown if one[1][-1] not in ends and length < count]
            ended += [(total / length**power, text) for total, text in grown[:beams] if (total, text) not in stays]
            ended = sorted(ended, key=lambda one: -one[0])[:beams]
            going = stays[:beams]
            if not going or (len(ended) == beams and going[0][0] / length**power <= ended[-1][0]):
                break
        text = ended[0][1]
        return text[:-1] if text[-1] in ends else text, length


@pytest.fixture(scope="module")
def plain():
    return Plain(LLAMA)


@pytest.fixture(scope="module")
def llama(plain):
    """A generator whose programs the tests share, and its parameters."""
    return Generator(plain.model, plain.runtime), plain.params


@pytest.fixture(scope="module")
def three_words():
    plain = Plain(GPT, vocabulary=3)
    return plain, Generator(plain.model, plain.runtime)


@pytest.mark.parametrize("power", [1.0, 0.3])
@pytest.mark.parametrize("ends", [(), (2,)])
def test_enough_beams_find_the_best_of_all_texts(ends, power, three_words):
    (plain, generator), count, prompts = three_words, 4, [[0, 1], [2, 2, 1], [1]]
    search = Beams(beams=3**count, length_penalty=power)
    found = generator(plain.params, prompts, max_new_tokens=count, rule=search, stop_ids=ends)
    for prompt, text in zip(prompts, found, strict=True):
        scores = {}
        for whole in product(range(3), repeat=count):
            length = next((i for i, token in enumerate(whole, 1) if token in ends), count)
            befores = [prompt + list(whole[:i]) for i in range(length)]
            each = plain.log_probabilities(befores)[np.arange(length), list(whole[:length])]
            scores[whole[:length]] = each.sum() / length**power
        best = max(scores, key=scores.get)
        assert text == [token for token in best if token not in ends]


def test_one_beam_is_greedy(llama):
    generator, params = llama
    greedy = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling())
    for eos in (None, greedy[0][4]):
        expected = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling(), eos_id=eos)
        assert generator(params, PROMPTS, max_new_tokens=NEW, rule=Beams(beams=1), eos_id=eos) == expected
    assert generator(params, PROMPTS, max_new_tokens=NEW, rule=Beams(beams=3)) != greedy, "a search has to differ"


@pytest.mark.parametrize("beams, power", [(2, 1.0), (3, 0.6), (4, 1.0), (4, -1.0)])
def test_search_with_cache_is_search_without(beams, power, plain, llama):
    """Without an end, with one, and with so many that the search ends early."""
    generator, params = llama
    search = Beams(beams=beams, length_penalty=power)
    free = generator(params, PROMPTS, max_new_tokens=NEW, rule=search)
    assert len({token for row in free for token in row}) > 8, "a model that repeats itself proves little"
    for ends in ((), (free[0][4],), *([range(0, 100, 4)] if beams == 4 else [])):
        expected = [plain.search(prompt, beams, NEW, ends, power) for prompt in PROMPTS]
        new = generator(params, PROMPTS, max_new_tokens=NEW, rule=search, stop_ids=ends)
        assert new == [text for text, _ in expected]
        assert (new == free) is not bool(ends)
        assert len(ends) < 2 or min(map(len, new)) < min(steps for _, steps in expected) < NEW


@pytest.mark.parametrize("mesh", ["tp2", "dp2"])
def test_text_does_not_depend_on_the_mesh(mesh, llama):
    """Three prompts, so that the data axis is filled up; what crosses it is the candidates, never the cache."""
    generator, params = llama
    search = {"max_new_tokens": NEW, "rule": Beams(beams=3), "stop_ids": (40, 60)}
    expected = generator(params, PROMPTS, **search)[:3]
    model, params, runtime = make(LLAMA, mesh)
    generator = Generator(model, runtime)
    assert generator(params, PROMPTS[:3], **search) == expected
    step = next(program for key, program in generator.programs.items() if key[0] == "step")
    if mesh == "dp2":
        sent = [line for line in step.as_text().splitlines() if re.search(r" (all|collective)-[a-z-]+\(", line)]
        rows, candidates = 4 * 3, 2 * 3
        assert sent and all(f"[{rows},{candidates}]" in line for line in sent), sent
        shape = (LLAMA.layers, rows, 48, LLAMA.kv_heads, LLAMA.head_size)
        assert step.output_shardings[0]["k"].shard_shape(shape)[1] == rows // 2


@pytest.mark.slow
@pytest.mark.parametrize("config, mesh", [(GPT, "rep2,fsdp2,tp2"), (MULTI_QUERY, "cp2,tp2"), (EXPERTS, "ep2,tp2")])
def test_other_models_on_other_meshes(config, mesh):
    asked = {"max_new_tokens": NEW, "beams": 3, "stop_ids": (40, 60)}
    assert generate(*make(config, mesh), PROMPTS[:3], **asked) == generate(*make(config), PROMPTS[:3], **asked)


def test_a_prompt_is_read_once_and_few_programs_compile(monkeypatch):
    model, params, runtime = make(replace(GPT, layers=1))
    generator, read = Generator(model, runtime), []
    decode = type(model).decode

    def noted(self, params, batch, runtime, cache):
        read.append(batch["tokens"].shape)
        return decode(self, params, batch, runtime, cache)

    monkeypatch.setattr(type(model), "decode", noted)
    for prompts, new, ends in (([[1, 2], [3]], 5, ()), ([[4], [5, 6, 7]], 9, (8, 9))):
        generator(params, prompts, max_new_tokens=new, rule=Beams(beams=4), stop_ids=ends)
    assert read == [(2, 16), (8, 1)], "prompts, then rows, and each is traced once"


def test_text_does_not_depend_on_batch_mates(llama):
    generator, params = llama
    search = {"max_new_tokens": NEW, "rule": Beams(beams=3), "eos_id": 60}
    other = generator(params, [[4], PROMPTS[1], list(range(50, 80)), PROMPTS[0]], **search)
    assert generator(params, PROMPTS, **search)[:2] == [other[3], other[1]]


def test_a_row_is_heard_when_it_is_done_and_may_be_cut(llama):
    generator, params = llama
    heard = []
    search = {"max_new_tokens": NEW, "rule": Beams(beams=3)}
    new = generator(params, PROMPTS, **search, on_token=lambda *told: heard.append(told))
    assert heard == [(row, token) for row, text in enumerate(new) for token in text]
    assert generator.speed.decoded_tokens == len(PROMPTS) * (NEW - 1)
    cut = generator(params, PROMPTS, **search, on_token=lambda row, token: row == 1 and token == new[1][2])
    assert cut == [text[:3] if row == 1 else text for row, text in enumerate(new)]


def test_a_search_without_a_text_that_goes_on_is_done():
    """Where every token ends the text, and where fewer go on than there are beams."""
    scores, tokens = np.log(np.array([[0.5, 0.3, 0.2]] * 2, np.float32)), np.array([[4, 5, 6]] * 2)
    search = Search(Beams(beams=2), range(10), 8)
    search.advance(scores, tokens)
    assert search.done and search.text == [4]
    search = Search(Beams(beams=2), (4, 6), 8)
    assert search.advance(scores, tokens) == ([0, 0], [5, 0]) and not search.done
    assert search.advance(scores, tokens) == ([0, 0], [5, 0]) and search.done
    assert search.text == [4]


def test_only_the_best_of_all_may_end():
    """The end in third place is none: two texts would have ended, and those that go on are worse by then."""
    search = Search(Beams(beams=2), (4, 6), 8)
    scores = np.log(np.array([[0.4, 0.3, 0.2, 0.1]] * 2, np.float32))
    assert search.advance(scores, np.array([[4, 5, 6, 7]] * 2)) == ([0, 0], [5, 7])
    scores = np.log(np.array([[0.01, 0.01, 0.01, 0.01]] * 2, np.float32))
    assert search.advance(scores, np.array([[1, 2, 3, 4]] * 2)) == ([0, 0], [1, 2]) and not search.done


def test_nothing_asked_for_is_nothing(llama):
    generator, params = llama
    assert generator(params, [[1]], max_new_tokens=0, rule=Beams(beams=2)) == [[]]


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"beams": 0}, ["--beams=0", "1"]),
        ({"beams": 4, "temperature": 0.8}, ["--beams=4", "--temperature=0.8", "use --temperature=0,"]),
        ({"beams": 4, "length_penalty": float("nan")}, ["--length-penalty=nan", "from -10 to 10"]),
        ({"beams": 4, "length_penalty": 11.0}, ["--length-penalty=11"]),
        ({"length_penalty": 0.6}, ["--length-penalty=0.6", "--beams=4"]),
    ],
)
def test_mistakes_are_said_in_one_line(asked, words):
    sampling = Sampling(temperature=asked.pop("temperature", 0.0))
    with pytest.raises(UserError) as raised:
        rule(sampling, **{"beams": 1, "length_penalty": 1.0} | asked)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)
