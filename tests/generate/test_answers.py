"""An encoder-decoder answers what it has read: with a cache as without one, in any company, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.data.tokenizer import Bytes
from jaxlm.generate.decode import Generator, generate
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from tests.generate.tiny import ANSWERS, GPT, make

PROMPTS = [[7, 3, 99], list(range(20, 39)), [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW, START = 10, 4


@pytest.fixture(scope="module")
def parts():
    return make(ANSWERS)


def whole(parts, prompt, count):
    """The likeliest tokens, each from a pass over all that was read and written, without padding."""
    model, params, runtime = parts

    @jax.jit
    def likeliest(params, source, written):
        def of(tokens, prefix=""):
            ones = jnp.ones_like(tokens)
            places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            return {f"{prefix}tokens": tokens, f"{prefix}segment_ids": ones, f"{prefix}positions": places}

        x = model.hidden(params, of(written) | of(source, "source_"), runtime)
        return model.logits(params, x, runtime)[0].argmax(-1)

    text = np.full((1, count), START, np.int32)  # what is behind a token it does not see
    for at in range(count):
        following = int(likeliest(params, jnp.asarray([prompt], jnp.int32), jnp.asarray(text))[at])
        if at + 1 < count:
            text[0, at + 1] = following
    return [*text[0, 1:].tolist(), following]


def test_greedy_answers_are_those_without_a_cache(parts):
    together = generate(*parts, PROMPTS, max_new_tokens=NEW, start_id=START)
    assert together == [whole(parts, prompt, NEW) for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) == len(PROMPTS), "each answers its own prompt"
    searched = generate(*parts, PROMPTS, max_new_tokens=NEW, start_id=START, beams=3)
    assert searched != together and all(len(row) == NEW for row in searched)


def test_an_end_ends_an_answer(parts):
    generator = Generator(parts[0], parts[2])
    rule = {"max_new_tokens": NEW, "start_id": START, "rule": Sampling()}
    (answer,) = generator(parts[1], PROMPTS[:1], **rule)
    assert generator(parts[1], PROMPTS[:1], eos_id=answer[3], **rule) == [answer[: answer.index(answer[3])]]
    assert generator.speed.prompt_tokens == len(PROMPTS[0])


@pytest.mark.parametrize("mesh", ["dp2,tp2", pytest.param("fsdp2,tp2", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_answers_of_one_device(parts, mesh):
    for rule in ({"temperature": 1.0, "seed": 5}, {"beams": 2}):
        asked = {"max_new_tokens": NEW, "start_id": START, **rule}
        assert generate(*make(ANSWERS, mesh), PROMPTS, **asked) == generate(*parts, PROMPTS, **asked)


def test_what_is_read_and_what_is_printed():
    tokenizer = Bytes().with_sentinels(2)
    answers, goes_on = (Prompts(model=config, tokenizer=tokenizer, prefix=[9]) for config in (ANSWERS, GPT))
    assert answers.encode("ab") == [9, 97, 98, tokenizer.eos_id] and goes_on.encode("ab") == [9, 97, 98]
    assert (answers.start_id, goes_on.start_id) == (tokenizer.start_id, None)
    assert answers.stream(answers.encode("ab")).push(99) == goes_on.stream(goes_on.encode("ab")).push(99) == "c"


def test_mistakes(parts):
    with pytest.raises(ValueError, match="start_id"):
        generate(*parts, PROMPTS, max_new_tokens=1)
    with pytest.raises(UserError, match="token 100 is not one of the model's 100"):
        generate(*parts, [[100]], max_new_tokens=1, start_id=START)
