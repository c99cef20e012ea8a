"""Decoding with a KV cache: the same tokens as without one, on any mesh, in any batch."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.generate import decode
from jaxlm.generate.decode import Generator, bucket, generate, left_padded
from jaxlm.generate.sampling import Sampling
from tests.generate.tiny import CONFIGS, EXPERTS, GPT, LLAMA, MULTI_QUERY, make

PROMPTS = [[7, 3, 99], list(range(20, 39)), [50], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
NEW = 20


def without_cache(config, prompts, count, eos_id=None):
    """Greedy continuations, each token by a forward pass over the whole text, a row at a time, on one device."""
    model, params, runtime = make(config)
    length = 64

    @jax.jit
    def following(params, batch, end):
        x = model.hidden(params, batch, runtime)
        return jnp.argmax(model.logits(params, x, runtime)[0, end - 1])

    new = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(count):
            rows = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
            rows["tokens"][0, : len(text)] = text
            rows["segment_ids"][0, : len(text)] = 1
            rows["positions"][0] = np.arange(length)
            text.append(int(following(params, rows, len(text))))
            if text[-1] == eos_id:
                text.pop()
                break
        new.append(text[len(prompt) :])
    return new


@pytest.fixture(scope="module")
def expected():
    return {name: without_cache(config, PROMPTS, NEW) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def gpt():
    """A generator whose programs the tests share, and its parameters."""
    model, params, runtime = make(GPT)
    return Generator(model, runtime), params


@pytest.mark.parametrize(
    "name, mesh",
    [
        *((name, "dp1") for name in CONFIGS),
        *(("gpt", "dp2,tp2"), ("llama", "dp2,tp2"), ("multi_query", "rep2,fsdp2,tp2"), ("llama", "cp2,tp2")),
        *(("experts", "ep2,tp2"), ("experts", "pp2,ep4")),
    ],
)
def test_greedy_with_cache_is_greedy_without(name, mesh, expected):
    """The meshes split kv heads over tp, and keep the one of multi-query attention whole; cp takes rows of its own."""
    new = generate(*make(CONFIGS[name], mesh), PROMPTS, max_new_tokens=NEW)
    assert new == expected[name]
    assert len({token for row in new for token in row}) > 8, "a model that repeats itself proves little"
    assert len(set(map(tuple, new))) == len(PROMPTS)


@pytest.mark.parametrize("backend", ["reference", "cudnn"])
def test_any_training_backend_decodes(backend, expected):
    assert generate(*make(LLAMA, attention=backend, remat="full"), PROMPTS, max_new_tokens=NEW) == expected["llama"]


def test_no_expert_is_too_full_for_a_token_that_is_generated(expected):
    """A capacity is a share of a sequence that is trained on; prompts and new tokens come in pieces of any length."""
    assert generate(*make(replace(EXPERTS, capacity_factor=0.1)), PROMPTS, max_new_tokens=NEW) == expected["experts"]


def test_a_router_is_not_rounded():
    model, params, runtime = make(EXPERTS, dtype=jnp.dtype("bfloat16"))
    cast = Generator(model, runtime)._in_compute_dtype(params)
    found = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_flatten_with_path(cast)[0]}
    assert {d for name, d in found.items() if "router" in name} == {jnp.dtype("float32")}
    assert {d for name, d in found.items() if "experts" in name and "kernel" in name} == {jnp.dtype("bfloat16")}


def test_long_prompts_are_read_in_chunks(monkeypatch, expected):
    monkeypatch.setattr(decode, "CHUNK", 8)
    assert generate(*make(LLAMA), PROMPTS, max_new_tokens=NEW) == expected["llama"]


def test_a_window_forgets():
    """What lies outside every window cannot change the text; without windows it does."""
    near = replace(LLAMA, layers=1, windows=(3,))
    for config, same in ((near, True), (replace(near, windows=()), False)):
        texts = [[first] + list(range(40, 60)) for first in (5, 6)]
        one, other = generate(*make(config), texts, max_new_tokens=16)
        assert (one == other) is same


def test_eos_ends_a_row_and_the_others_go_on(gpt, expected):
    generator, params = gpt
    eos = expected["gpt"][0][4]
    ends = [row.index(eos) if eos in row else NEW for row in expected["gpt"]]
    assert len(set(ends)) > 1
    heard = []
    new = generator(
        params,
        PROMPTS,
        max_new_tokens=NEW,
        rule=Sampling(),
        eos_id=eos,
        on_token=lambda row, token: heard.append((row, token)),
    )
    assert new == [row[:end] for row, end in zip(expected["gpt"], ends, strict=True)]
    assert [[token for r, token in heard if r == row] for row in range(len(PROMPTS))] == new


def test_any_of_several_ids_ends_a_row_and_so_does_the_listener(gpt, expected):
    generator, params = gpt
    stops = {expected["gpt"][0][4], expected["gpt"][1][2]}
    ends = [next((i for i, token in enumerate(row) if token in stops), NEW) for row in expected["gpt"]]
    new = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling(), stop_ids=stops)
    assert new == [row[:end] for row, end in zip(expected["gpt"], ends, strict=True)]
    counts = [0] * len(PROMPTS)

    def third(row, token):
        counts[row] += 1
        return row == 1 and counts[row] == 3

    new = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling(), on_token=third)
    assert [len(row) for row in new] == counts == [NEW, 3, NEW, NEW]


def test_generation_stops_when_every_row_has_ended(gpt, expected):
    generator, params = gpt
    eos = expected["gpt"][2][0]
    assert generator(params, [PROMPTS[2]], max_new_tokens=NEW, rule=Sampling(), eos_id=eos) == [[]]
    assert generator.speed.decoded_tokens == 0 and generator.speed.prompt_tokens == 1


def test_an_empty_prompt_starts_behind_eos(gpt):
    generator, params = gpt
    empty, eos = generator(params, [[], [99]], max_new_tokens=3, rule=Sampling(), eos_id=99)
    assert empty == eos


def test_nothing_asked_for_is_nothing(gpt):
    generator, params = gpt
    assert generator(params, [], max_new_tokens=3, rule=Sampling()) == []
    assert generator(params, [[1]], max_new_tokens=0, rule=Sampling()) == [[]]


def test_few_programs_compile():
    model, params, runtime = make(GPT)
    generator = Generator(model, runtime)

    def run(length, new, **rule):
        generator(params, [list(range(length))], max_new_tokens=new, rule=Sampling(**rule))
        return len(generator.programs)

    assert run(3, 9) == run(16, 16) == run(1, 2) == 2
    assert run(2, 5, temperature=0.5, top_k=3) == run(9, 7, temperature=2.0, top_p=0.3, seed=8) == 4
    assert run(17, 3) == 6, "another bucket of prompt lengths"
    assert run(17, 3) == 6


def test_the_cache_is_sharded_and_never_copied():
    model, params, runtime = make(GPT, "dp2,tp2")
    generator = Generator(model, runtime)
    generator(params, PROMPTS[:3], max_new_tokens=NEW, rule=Sampling())
    step = next(program for key, program in generator.programs.items() if key[0] == "step")
    cache = step.output_shardings[0]
    slots = bucket(len(PROMPTS[1])) + bucket(NEW)
    rows = 4  # three prompts and one to fill up the data axis
    heads = GPT.heads
    assert cache["k"].shard_shape((2, rows, slots, heads, 8)) == (2, rows // 2, slots, heads // 2, 8)
    assert cache["segments"].shard_shape((rows, slots)) == (rows // 2, slots)
    shard_bytes = 2 * 4 * 2 * rows * slots * heads * 8 // 4
    assert step.memory_analysis().alias_size_in_bytes >= shard_bytes, "the step must write into its own input"


def test_matrices_are_cast_once_and_only_matrices():
    model, params, runtime = make(GPT, dtype=jnp.dtype("bfloat16"))
    generator = Generator(model, runtime)
    cast = generator._in_compute_dtype(params)
    assert cast["blocks"]["mlp"]["up"]["kernel"].dtype == cast["tokens"]["embedding"].dtype == jnp.bfloat16
    assert cast["final_norm"]["scale"].dtype == cast["blocks"]["mlp"]["up"]["bias"].dtype == jnp.float32
    tokens = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling())
    generator._in_compute_dtype = lambda params: params
    generator.programs.clear()
    assert generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling()) == tokens


def test_text_does_not_depend_on_batch_mates(gpt):
    generator, params = gpt
    rule = Sampling(temperature=1.0, top_p=0.9, seed=5)
    one = generator(params, PROMPTS, max_new_tokens=NEW, rule=rule)
    other = generator(params, [PROMPTS[0], list(range(33)), PROMPTS[0], [4]], max_new_tokens=NEW, rule=rule)
    assert one[0] == other[0], "the longer mate pads this row further, which must not matter"
    assert other[0] != other[2], "rows with one prompt must differ"
    assert generator(params, PROMPTS, max_new_tokens=NEW, rule=replace(rule, seed=6))[0] != one[0]


def test_text_does_not_depend_on_the_mesh(gpt):
    generator, params = gpt
    rule = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 11}
    one = generator(params, PROMPTS, max_new_tokens=NEW, rule=Sampling(**rule))
    assert generate(*make(GPT, "dp2,tp2"), PROMPTS, max_new_tokens=NEW, **rule) == one


@pytest.mark.parametrize(
    "prompts, new, words",
    [
        ([[1], []], 3, ["prompt 2", "empty"]),
        ([[1, 100]], 3, ["prompt 1", "token 100", "model's 100"]),
        ([[-1]], 3, ["token -1"]),
        ([[1] * 50], 15, ["50 tokens", "15 new", "65", "64 learned positions", "--max-tokens"]),
        ([[1]], -1, ["--max-tokens=-1"]),
    ],
)
def test_what_cannot_be_generated_is_said_in_one_line(prompts, new, words, gpt):
    generator, params = gpt
    with pytest.raises(UserError) as raised:
        generator(params, prompts, max_new_tokens=new, rule=Sampling())
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


def test_learned_positions_may_be_used_up_and_rotary_ones_never_end(gpt):
    generator, params = gpt
    (new,) = generator(params, [[1] * 50], max_new_tokens=14, rule=Sampling())
    assert len(new) == 14
    config = replace(MULTI_QUERY, max_positions=8)
    assert len(generate(*make(config), [[1] * 9], max_new_tokens=9)[0]) == 9


def test_left_padding():
    batch = left_padded([[5, 6, 7], [8]], rows=3)
    assert {a.shape for a in batch.values()} == {(3, 16)}
    assert batch["tokens"][:, -3:].tolist() == [[5, 6, 7], [0, 0, 8], [0, 0, 0]]
    assert batch["segment_ids"].sum(axis=1).tolist() == [3, 1, 1]
    assert batch["positions"][0].tolist() == [0] * 14 + [1, 2]
    assert [bucket(n) for n in (1, 16, 17, 512, 513)] == [16, 16, 32, 512, 1024]
