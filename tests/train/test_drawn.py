"""Products of all seven axes, drawn at random: each is refused in a line that names its cure, or trains as one device.

A mesh of up to 8 devices is drawn, and a model, a batch and a pipeline that it divides; then some of the numbers are
replaced by any others. What is accepted is built, layout by layout, and traced; some of it is run.
"""

import contextlib
import io
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxlm.config import cli
from jaxlm.config.checks import BATCH, check
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import AXES, parse
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import option, text
from jaxlm.parallel.schedules import validate
from jaxlm.train import stages
from jaxlm.train.__main__ import main
from jaxlm.train.step import abstract_batch, eval_step
from tests.train.battery import build, compare, configuration, measure, on_one_device
from tests.train.rows import ROUNDED, SCHEDULES

Keys = dict[str, Any]
"""Dotted keys."""

METHODS = ("ring", "allgather", "ulysses")
DEVICES = 8


@st.composite
def sizes(draw: st.DrawFn, choices: tuple[int, ...] = (1, 2, 2, 3, 4, 5, 6, 7, 8)) -> dict[str, int]:
    """Of each axis; all together at most DEVICES. Half of them small, so that several find room."""
    left, found = DEVICES, {}
    for axis in draw(st.permutations(list(AXES))):
        found[axis] = draw(st.sampled_from([n for n in choices if n <= left]))
        left //= found[axis]
    return found


def mesh_of(found: dict[str, int]) -> str:
    return ",".join(f"{axis}{size}" for axis, size in found.items())


@st.composite
def fitting(draw: st.DrawFn) -> Keys:
    """A mesh, and a small run that it divides."""
    of = draw(sizes())
    rows, tp, cp, pp = math.prod(of[axis] for axis in BATCH), of["tp"], of["cp"], of["pp"]
    schedule, method = draw(st.sampled_from(SCHEDULES)), draw(st.sampled_from(METHODS))
    chunks = draw(st.integers(2, 3)) if schedule == "interleaved" else None
    heads = tp * (cp if method == "ulysses" else 1) * draw(st.integers(1, 2))
    kv_heads = [n for n in range(1, heads + 1) if heads % n == 0 and (n % tp == 0 or tp % n == 0)]
    parts = draw(st.sampled_from([None, pp, pp + 1])) if pp > 1 else None
    accumulated = draw(st.integers(1, 2)) if pp == 1 else 1
    experts = of["ep"] * draw(st.integers(1, 2)) if of["ep"] > 1 else draw(st.sampled_from([0, 0, 3]))
    keys = {
        "mesh": mesh_of(of),
        "model.layers": pp * (chunks or 1) + draw(st.integers(0, 2)),
        "model.heads": heads,
        "model.kv_heads": draw(st.sampled_from(kv_heads)),
        "model.head_size": 8,
        "model.embed": math.lcm(8, of["fsdp"] * pp) * draw(st.integers(1, 2)),
        "model.mlp": tp * draw(st.integers(1, 9)),
        "model.vocabulary": 128 * tp - draw(st.integers(0, 9)),
        "model.experts": experts,
        "data.sequence_length": 2 * cp * tp * draw(st.integers(1, 4)),
        "data.batch_size": rows * (parts or pp) * accumulated * draw(st.integers(1, 2)),
        "train.microbatches": accumulated,
        "pipeline.schedule": schedule,
        "pipeline.microbatches": parts,
        "context.method": method,
        "context.sequence_parallel": draw(st.sampled_from(["auto", "on", "off"])),
    }
    if chunks:
        keys["pipeline.chunks"] = chunks
    if experts:
        keys["model.experts_per_token"] = draw(st.integers(1, min(experts, 3)))
    if draw(st.booleans()):
        keys |= {"model.positions": "rotary", "model.norm": "rms", "model.gated": True, "model.tied": False}
    return keys


NUMBERS = [
    *("model.layers", "model.heads", "model.kv_heads", "model.head_size", "model.embed", "model.mlp"),
    *("model.vocabulary", "model.experts", "model.experts_per_token", "data.sequence_length", "data.batch_size"),
    *("train.microbatches", "pipeline.microbatches", "pipeline.chunks"),
]
small = st.dictionaries(st.sampled_from(NUMBERS), st.integers(1, 24), max_size=2)
silly_sizes = st.sampled_from([0, -1, -2, 9, 64, 1024, 10**9, 10**30])
any_mesh = st.dictionaries(st.sampled_from(list(AXES)), st.integers(1, 8) | silly_sizes, min_size=1).map(mesh_of)
anything = st.dictionaries(st.sampled_from(NUMBERS), st.integers(-2, 70) | silly_sizes, max_size=3)
others = st.builds(lambda keys, mesh: keys | ({"mesh": mesh} if mesh else {}), anything, st.none() | any_mesh)


def arguments(keys: Keys) -> list[str]:
    return [f"{option(key)}={text(value)}" for key, value in keys.items()]


def answer(keys: Keys) -> tuple[int, str]:
    """Exit code of the command and what it says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        cli.run(main, [*arguments(keys), "--print-config"])
    return int(end.value.code or 0), said.getvalue()


def names_value_field_and_cure(line: str) -> bool:
    field, value = re.search(r"--[a-z.-]+|^error: mesh ", line), re.search(r"\d", line)
    cure = re.search(r"\b(use|set|give|write|leave|nearest is|must be) ", line)
    return bool(field and value and cure)


@settings(max_examples=200)
@given(fitting())
def test_a_product_that_divides_is_accepted(keys: Keys) -> None:
    assert answer(keys) == (0, "")


@settings(max_examples=400)
@given(fitting(), others)
def test_another_product_is_accepted_or_refused_in_one_line(keys: Keys, more: Keys) -> None:
    code, said = answer(keys | more)
    if code or said:
        assert code == 2
        assert len(said.splitlines()) == 1
        assert names_value_field_and_cure(said), said


def accepted(keys: Keys) -> RunConfig | None:
    config = load(RunConfig, arguments(keys))[0]
    try:
        check(config, parse(config.mesh))
    except UserError:
        return None
    return config


def build_and_trace(config: RunConfig) -> None:
    """All that is decided before XLA compiles, of training, evaluation and generation."""
    assembly = build(config, config.mesh)
    model, layout = assembly.model, assembly.runtime.layout
    for leaf in jax.tree.leaves((assembly.plan.abstract, assembly.batch)):
        leaf.sharding.shard_shape(leaf.shape)
    if layout.mesh.shape["pipeline"] > 1:
        validate(stages.table(config, layout))
    for variant in ("forward", "decode"):
        other = assembly.unpiped(variant).layout
        jax.tree.map(lambda leaf, dims, other=other: other.spec(dims, leaf.shape), model.abstract, model.dims)
    jax.eval_shape(assembly.step, assembly.plan.abstract, assembly.batch)
    runtime = assembly.unpiped("forward")
    batch = abstract_batch(config, runtime)
    for leaf in batch.values():
        leaf.sharding.shard_shape(leaf.shape)
    lengths = jax.ShapeDtypeStruct((model.padded_vocabulary,), jnp.int32)
    jax.eval_shape(eval_step(model, config, runtime), assembly.plan.abstract["params"], batch, lengths)


def check_built(keys: Keys) -> None:
    config = accepted(keys)
    assume(config is not None)
    build_and_trace(config)


@settings(max_examples=10, suppress_health_check=list(HealthCheck))
@given(fitting(), small)
def test_what_is_accepted_can_be_built(keys: Keys, more: Keys) -> None:
    check_built(keys | more)


@pytest.mark.every
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(fitting(), small)
def test_more_of_what_is_accepted_can_be_built(keys: Keys, more: Keys) -> None:
    check_built(keys | more)


@st.composite
def battery_runs(draw: st.DrawFn) -> tuple[str, str, Keys, Keys]:
    """A mesh, a decoder of the battery, what changes the decoder or the batch, and how the computation is cut besides.

    Sizes are the battery's, or the next that divide: of smaller ones rounding would decide (docs/parity.md).
    """
    of = draw(sizes((1, 2, 2, 3, 4, 6, 8)))
    rows, tp, cp, pp = math.prod(of[axis] for axis in BATCH), of["tp"], of["cp"], of["pp"]
    method = draw(st.sampled_from(METHODS))
    ways = tp * (cp if method == "ulysses" else 1)
    style = "moe" if of["ep"] > 1 else draw(st.sampled_from(["gpt", "llama"]))
    heads = math.lcm(4, ways)
    what = {
        "model__heads": heads,
        "model__kv_heads": heads,
        "model__head_size": 32,
        "model__embed": math.lcm(128, of["fsdp"] * pp),
        "model__mlp": math.lcm(256, tp),
        "model__vocabulary": math.lcm(256, tp) - 6,
        "data__sequence_length": math.lcm(32, 2 * cp * tp),
    } | ROUNDED
    if style == "gpt":
        what |= {"model__max_positions": what["data__sequence_length"]}
    if style == "moe":
        what |= {"model__experts": math.lcm(8, of["ep"])}
    how: Keys = {
        "remat": draw(st.sampled_from(["none", "full", "dots", "selective"])),
        "context__method": method,
        "context__sequence_parallel": draw(st.sampled_from(["on", "off"])),
        "train__loss_chunk": draw(st.sampled_from([0, 100])),
    }
    parts = 1
    if pp > 1:
        schedule = draw(st.sampled_from(SCHEDULES))
        parts = draw(st.sampled_from([pp, 2 * pp]))
        chunks = 2 if schedule == "interleaved" else 1
        what["model__layers"] = pp * chunks + draw(st.integers(0, 1))
        how |= {"pipeline__schedule": schedule, "pipeline__microbatches": parts}
    elif draw(st.booleans()):
        parts = how["train__microbatches"] = 2
    what["data__batch_size"] = math.lcm(16, rows * parts)
    if of["dp"] > 1 and draw(st.booleans()):
        how["optimizer__shard"] = "data"
    return mesh_of(of), style, what, how


@pytest.mark.slow
@settings(max_examples=4)
@given(battery_runs())
def test_drawn_products_of_all_axes_equal_one_device(run: tuple[str, str, Keys, Keys]) -> None:
    mesh, style, what, how = run
    config = configuration(style, **what, **how)
    check(config, parse(mesh))
    compare(measure(config, mesh), on_one_device(configuration(style, **what))).check()
