"""Pipeline schedules: every table that is built is valid, and nothing that is not valid passes as such."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.config.errors import UserError
from jaxlm.parallel.schedules import Table, build, validate
from jaxlm.parallel.schedules.order import ORDERS
from jaxlm.parallel.schedules.table import ROWS

NUMBERS = ("stages", "chunks", "microbatches", "activation_slots", "cotangent_slots")

schedules = st.sampled_from(sorted(ORDERS))
stages = st.integers(1, 8)


@st.composite
def tables(draw, most_stages: int = 8) -> Table:
    p = draw(st.integers(1, most_stages))
    return build(draw(schedules), p, draw(st.integers(p, 3 * p + 2)), draw(st.integers(2, 4)))


@given(tables())
def test_tables_are_valid(table):
    validate(table)
    for kind in "fb":
        assert (getattr(table, f"{kind}_microbatch") >= 0).sum() == table.microbatches * table.virtual


@given(tables(most_stages=4), st.data())
def test_any_single_change_is_found(table, data):
    name = data.draw(st.sampled_from(ROWS))
    rows = getattr(table, name).copy()
    index = tuple(data.draw(st.integers(0, size - 1)) for size in rows.shape)
    largest = max(table.microbatches, table.activation_slots)
    rows[index] = data.draw(st.integers(-2, largest).filter(lambda value: value != rows[index]))
    with pytest.raises(ValueError):
        validate(replace(table, **{name: rows}))


@pytest.mark.parametrize("schedule", sorted(ORDERS))
def test_every_single_change_is_found(schedule):
    table = build(schedule, 2, 3, 2)
    changes = 0
    for name in ROWS:
        for index in np.ndindex(table.ticks, table.stages):
            for value in range(-2, max(table.microbatches, table.activation_slots) + 1):
                rows = getattr(table, name).copy()
                if rows[index] != value:
                    rows[index] = value
                    changes += 1
                    with pytest.raises(ValueError):
                        validate(replace(table, **{name: rows}))
    assert changes > 500


@given(tables(), st.sampled_from(NUMBERS), st.sampled_from([-1, 1]))
def test_a_wrong_number_is_found(table, name, more):
    with pytest.raises((ValueError, IndexError)):
        validate(replace(table, **{name: getattr(table, name) + more}))


@given(tables(), st.randoms(use_true_random=False))
def test_exchanged_ticks_are_found(table, random):
    """An order of ticks that is not the schedule's breaks it, but for the ticks that do the same."""
    order = list(range(table.ticks))
    random.shuffle(order)
    shuffled = {name: getattr(table, name)[order] for name in ROWS}
    if any((shuffled[name] != getattr(table, name)).any() for name in ROWS):
        with pytest.raises(ValueError):
            validate(replace(table, **shuffled))


def broken(schedule: str, **entries: tuple[int, int, int]) -> Table:
    """A table of 2 stages and 3 microbatches with entries (tick, stage, value) changed."""
    table = build(schedule, 2, 3, 2)
    rows = {name: getattr(table, name).copy() for name in ROWS}
    for name, (tick, stage, value) in entries.items():
        rows[name][tick, stage] = value
    return replace(table, **rows)


@pytest.mark.parametrize(
    "table, message",
    [
        (broken("1f1b", f_microbatch=(1, 0, 0)), "tick 1 stage 0: forward of microbatch 0 .* was done before"),
        (broken("1f1b", f_microbatch=(1, 0, -1)), "tick 1 stage 0: f_chunk=0 belongs to no F"),
        (broken("1f1b", b_microbatch=(1, 1, 2)), "tick 1 stage 1: backward of microbatch 2 .* before its forward"),
        (broken("1f1b", f_slot=(1, 1, -1)), "tick 1 stage 1: forward .* reads no activation slot"),
        (broken("1f1b", f_slot=(1, 0, 0)), "tick 1 stage 0: forward .* has no activation to read"),
        (broken("1f1b", receive_activation_slot=(0, 1, -1)), "tick 0 stage 1: the activation of microbatch 0 is sent"),
        (broken("1f1b", receive_activation_slot=(0, 0, 0)), "tick 0 stage 0: .* receives, but nothing was sent"),
        (broken("gpipe", receive_activation_slot=(1, 1, 0)), "tick 1 stage 1: .* overwritten, but holds microbatch 0"),
        (broken("gpipe", b_slot=(4, 1, 2)), "tick 4 stage 1: .* activation slot 2 holds microbatch 2"),
        (broken("gpipe", f_microbatch=(1, 0, 3)), "tick 1 stage 0: f_microbatch=3 is not from -1 to 2"),
        (replace(build("gpipe", 2, 3), name="ours"), "schedule 'ours' is none of"),
        (replace(build("gpipe", 2, 3), name="zb"), "cotangent slot 0 is overwritten, but holds microbatch 0"),
        (replace(build("1f1b", 1, 3), microbatches=4), "^forward of microbatch 3 on virtual stage 0 is missing"),
        (replace(build("gpipe", 2, 3), activation_slots=4), "activation_slots is 4, but 3 are used"),
    ],
)
def test_validate_says_what_is_wrong(table, message):
    with pytest.raises(ValueError, match=message):
        validate(table)


@given(stages, st.integers(0, 20))
def test_one_f_one_b(p, more):
    """The stash does not depend on the microbatches; the first stage has none, the second the most."""
    table = build("1f1b", p, p + more)
    assert table.ticks == p + more + 2 * (p - 1)
    assert table.activation_slots == (0 if p == 1 else min(2 * p - 3, p + more))
    assert table.cotangent_slots == (p > 1)


@given(stages, st.integers(0, 20))
def test_gpipe(p, more):
    table = build("gpipe", p, p + more)
    assert table.ticks == 2 * (p + more + p - 1)
    assert table.activation_slots == (0 if p == 1 else p + more)
    forward, backward = (getattr(table, f"{kind}_microbatch") >= 0 for kind in "fb")
    assert np.argwhere(forward)[:, 0].max() < np.argwhere(backward)[:, 0].min()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("1f1b", 4, 3), r"--pipeline.microbatches=3 is less than the 4 stages.*use --pipeline.microbatches=4 or more"),
        (("1f1b", 0, 3), "0 stages"),
        (("dualpipe", 4, 4), "--pipeline.schedule=dualpipe: no such schedule; use .*1f1b"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        build(*arguments)


def test_tables_cannot_change():
    with pytest.raises(ValueError, match="read-only"):
        build("1f1b", 2, 2).f_slot[0, 0] = 1


def test_schedules_need_no_jax():
    code = "import sys, jaxlm.parallel.schedules.build; print('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
