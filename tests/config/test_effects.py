"""A key that is set where it has no effect is one line: an error, or said where it may be meant for another start."""

from dataclasses import replace

import pytest

from jaxlm.config import mesh_spec
from jaxlm.config.checks import check
from jaxlm.config.effects import AXES_NEEDED, NEEDS, condition, idle, mistakes
from jaxlm.config.errors import UserError
from jaxlm.config.help import render
from jaxlm.config.load import items, kinds, load
from jaxlm.config.schema import PipelineConfig, RunConfig
from jaxlm.config.values import option, text

SET = {
    "model.windows": "16,0",
    "model.max_positions": "256",
    "model.rope_theta": "5e5",
    "model.rope_local_theta": "1e4",
    "model.rope_scaling": "yarn",
    "model.rope_factor": "8",
    "model.rope_original_length": "4096",
    "model.rope_frequencies": "1,32",
    "model.experts_per_token": "1",
    "model.shared_experts": "1",
    "model.router": "sigmoid",
    "model.router_scale": "2.5",
    "model.capacity_factor": "1.25",
    "model.balance_loss": "0.01",
    "model.balance_rate": "0.001",
    "model.router_z_loss": "0.001",
    "data.weights": "1",
    "data.vocabulary": "4096",
    "optimizer.beta1": "0.8",
    "optimizer.beta2": "0.99",
    "optimizer.epsilon": "1e-6",
    "optimizer.decay_fraction": "0.5",
    "optimizer.final_fraction": "0",
    "optimizer.shard": "data",
    "pipeline.schedule": "gpipe",
    "pipeline.microbatches": "4",
    "pipeline.chunks": "4",
    "context.method": "ulysses",
    "context.sequence_parallel": "on",
    "checkpoint.keep_every": "10",
    "eval.batches": "3",
    "eval.prompt": "class ",
    "eval.sample_tokens": "10",
}
"""A value of each key of the table that is not its default."""

GOVERNING = {
    "model.architecture": ("encoder", {}, "decoder"),
    "model.positions": ("none", {"model.max_positions": "learned"}, "rotary"),
    "model.windows": ("0,0", {}, "16,0"),
    "model.rope_scaling": ("none", {}, "llama3"),
    "model.rope_factor": ("1", {}, "8"),
    "model.experts": ("0", {}, "4"),
    "model.router": ("topk_softmax", {}, "sigmoid"),
    "data.path": ("a", {"data.weights": "a,b"}, "a"),
    "data.tokenizer": ("bytes", {}, "bpe"),
    "optimizer.name": ("adafactor", {}, "adamw"),
    "optimizer.schedule": ("inverse_sqrt", {}, "wsd"),
    "pipeline.schedule": ("zb", {}, "interleaved"),
    "checkpoint.keep": ("0", {}, "3"),
    "eval.every": ("0", {}, "10"),
    "eval.sample_tokens": ("0", {}, "10"),
}
"""Of each key that decides over others: a value under which they do not count, and one under which they do (a key may
have its own)."""

ROWS = [(need, key) for need in NEEDS for key in need.keys]
AXES = [(axis, key) for axis, keys in AXES_NEEDED.items() for key in keys]
named = pytest.mark.parametrize(("need", "key"), ROWS, ids=[f"{key}-{need.of}" for need, key in ROWS])


def run(**keys):
    return load(RunConfig, [f"{option(key)}={value}" for key, value in keys.items()])[0]


def without(need, key):
    noise = {"data.noise": "0.15"} if need.of == "model.architecture" else {}
    return run(**{key: SET[key], need.of: GOVERNING[need.of][0], **noise})


@named
def test_a_key_without_effect_is_one_line(need, key):
    config = without(need, key)
    lines = [*mistakes(config), *idle(config, mesh_spec.parse("dp1"))]
    (line,) = [line for line in lines if f"has no effect with {option(need.of)}" in line]
    assert line.startswith(f"{option(key)}={text(dict(items(config))[key])} ")
    assert f"set {option(need.of)} to {need.words}" in line
    assert line.isprintable()


@named
def test_where_it_counts_it_is_silent(need, key):
    """Once all that it needs is there: what the line asks for is a cure."""
    needed = {other.of: GOVERNING[other.of][1].get(key, GOVERNING[other.of][2]) for other, k in ROWS if k == key}
    assert not [line for line in mistakes(run(**{key: SET[key], **needed})) if line.startswith(f"{option(key)}=")]


@named
def test_its_default_never_complains(need, key):
    default = dict(items(RunConfig()))[key]
    assert not list(mistakes(run(**{key: text(default), need.of: GOVERNING[need.of][0]})))


@named
def test_only_a_key_of_what_is_switched_off_is_no_error(need, key):
    config, said = without(need, key), []
    if need.switch:
        check(config, mesh_spec.parse("dp1"), said.append)
        assert len(said) == 1 and "has no effect" in said[0]
    else:
        with pytest.raises(UserError, match="has no effect"):
            check(config, mesh_spec.parse("dp1"))


@pytest.mark.parametrize(("axis", "key"), AXES)
def test_a_key_of_an_axis_that_is_missing_is_said_and_no_error(axis, key):
    config, said = run(**{key: SET[key]}), []
    (line,) = idle(config, mesh_spec.parse("dp1"))
    assert line == f"{option(key)}={SET[key]} has no effect on mesh dp1, which has no {axis}"
    assert not list(idle(config, mesh_spec.parse(f"{axis}2")))
    assert key == "pipeline.chunks" or check(config, mesh_spec.parse("rep2"), said.append) is None
    assert key == "pipeline.chunks" or "has no effect on mesh rep2" in said[0]


def test_a_pipelined_run_goes_on_without_one():
    keys = PipelineConfig(schedule="interleaved", chunks=4, microbatches=8)
    said = []
    check(replace(RunConfig(), pipeline=keys), mesh_spec.parse("dp1"), said.append)
    assert len(said) == 3


def test_the_table_is_of_the_schema():
    keys = set(kinds(RunConfig))
    assert {key for _, key in ROWS} | {key for _, key in AXES} == set(SET) <= keys
    assert {need.of for need in NEEDS} == set(GOVERNING) <= keys
    assert not list(mistakes(RunConfig())) + list(idle(RunConfig(), mesh_spec.parse("dp1")))


def test_help_says_where_a_key_counts():
    shown = " ".join(render(RunConfig, {}, "chunks").split())
    assert "Only where --pipeline.schedule is interleaved and the mesh has pp." in shown
    assert condition("model.layers") == ""
