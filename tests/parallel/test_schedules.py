"""Pipeline schedules: every table that is built is valid, and nothing that is not valid passes as such."""

import io
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jaxlm.config.errors import UserError
from jaxlm.parallel.schedules import Table, build, forward, validate
from jaxlm.parallel.schedules.__main__ import main
from jaxlm.parallel.schedules.draw import cells as draw_cells
from jaxlm.parallel.schedules.draw import colour, ink, picture
from jaxlm.parallel.schedules.order import ORDERS, interleaved
from jaxlm.parallel.schedules.simulate import Costs, simulate
from jaxlm.parallel.schedules.table import ROWS
from jaxlm.parallel.schedules.validate import KINDS

NUMBERS = ("stages", "chunks", "microbatches", "activation_slots", "cotangent_slots")

schedules = st.sampled_from(sorted(KINDS))
stages = st.integers(1, 8)


def arguments(most_stages: int = 8) -> st.SearchStrategy[tuple[str, int, int, int]]:
    """Of `made`: schedule, stages, microbatches, chunks."""
    numbers = st.integers(1, most_stages).flatmap(lambda p: st.tuples(st.just(p), st.integers(p, 3 * p + 2)))
    return st.builds(lambda name, pm, v: (name, *pm, v), schedules, numbers, st.integers(2, 4))


def made(schedule: str, p: int, m: int, v: int) -> Table:
    return forward(p, m, v) if schedule == "forward" else build(schedule, p, m, v)


@given(arguments())
def test_tables_are_valid(arguments):
    table = made(*arguments)
    validate(table)
    for kind in "fbw":
        done = table.microbatches * table.virtual if kind in KINDS[table.name] else 0
        assert (getattr(table, f"{kind}_microbatch") >= 0).sum() == done


@given(arguments(most_stages=4), st.data())
def test_any_single_change_is_found(arguments, data):
    table = made(*arguments)
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


@given(arguments(), st.sampled_from(NUMBERS), st.sampled_from([-1, 1]))
def test_a_wrong_number_is_found(arguments, name, more):
    table = made(*arguments)
    with pytest.raises(ValueError):
        validate(replace(table, **{name: getattr(table, name) + more}))


def computed(table: Table, weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Gradients [virtual] of sum(y^2) / 2 where virtual stage j multiplies by weights[j], computed as an engine would.

    Buffers start with a number of their own, so that what was never written shows.
    """
    p, last, gradients = table.stages, table.virtual - 1, np.zeros_like(weights)
    activations = np.full((p, table.activation_slots + 1), 7)
    cotangents = np.full((p, table.cotangent_slots + 1), 11)
    for tick, actions in enumerate(table.actions()):
        ys, dxs = np.full(p, 13), np.full(p, 17)
        for s, kind, i, j, slot, cotangent_slot in actions:
            x = inputs[i] if j == 0 else activations[s, slot]
            y = weights[j] * x
            dy = y if j == last else cotangents[s, cotangent_slot]
            if kind == "f":
                ys[s] = y
            if kind == "b":
                dxs[s] = weights[j] * dy
            if kind == KINDS[table.name][-1]:
                gradients[j] += dy * x
        for s in range(p):
            activations[s, table.receive_activation_slot[tick, s]] = ys[s - 1]
            cotangents[s, table.receive_cotangent_slot[tick, s]] = dxs[(s + 1) % p]
    return gradients


def expected(table: Table, weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    outputs = inputs * weights.prod()
    return (outputs**2).sum() // weights


@given(arguments(most_stages=4), st.data())
def test_what_is_accepted_computes_the_gradients(arguments, data):
    """Also after ticks were exchanged, which may or may not give another valid schedule."""
    table = made(*arguments)
    weights = np.resize(np.array([2, -1, 3, 1, 1]), table.virtual)
    inputs = np.arange(table.microbatches) + 1
    if KINDS[table.name] != "f":
        assert (computed(table, weights, inputs) == expected(table, weights, inputs)).all()
    first = data.draw(st.integers(0, table.ticks - 1))
    order = np.arange(table.ticks)
    order[[first, first - 1]] = order[[first - 1, first]]
    exchanged = replace(table, **{name: getattr(table, name)[order] for name in ROWS})
    try:
        validate(exchanged)
    except ValueError:
        return
    if KINDS[table.name] != "f":
        assert (computed(exchanged, weights, inputs) == expected(exchanged, weights, inputs)).all()


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
        (
            broken("zb", w_microbatch=(2, 0, 1)),
            "weight gradients of microbatch 1 .* before its backward",
        ),
        (broken("zb", w_cotangent_slot=(2, 1, 0)), "tick 2 stage 1: .* has no cotangent to read"),
        (broken("interleaved", f_chunk=(0, 0, -1)), "tick 0 stage 0: f_chunk=-1 is no chunk"),
        (replace(build("zb", 2, 3), name="1f1b"), "1f1b has none"),
        (replace(build("gpipe", 2, 3), name="ours"), "schedule 'ours' is none of"),
        (replace(build("gpipe", 2, 3), name="zb"), "cotangent slot 0 is overwritten, but holds microbatch 0"),
        (replace(build("1f1b", 1, 3), microbatches=4), "^forward of microbatch 3 on virtual stage 0 is missing"),
        (replace(build("1f1b", 1, 3), microbatches=0), "1 stages, 1 chunks, 0 microbatches: 1 or more each"),
        (replace(build("gpipe", 2, 3), activation_slots=4), "activation_slots is 4, but 3 are used"),
    ],
)
def test_validate_says_what_is_wrong(table, message):
    with pytest.raises(ValueError, match=message):
        validate(table)


def test_validate_wants_the_form_and_no_idle_end():
    table = build("1f1b", 2, 3)
    longer = {name: np.pad(getattr(table, name), ((0, 1), (0, 0)), constant_values=-1) for name in ROWS}
    with pytest.raises(ValueError, match="tick 5, the last, is empty"):
        validate(replace(table, **longer))
    object.__setattr__(table, "b_slot", longer["b_slot"])  # the class itself would refuse it where types are checked
    with pytest.raises(ValueError, match=r"b_slot is int32\[6, 2\], not int32\[5, 2\]"):
        validate(table)


@given(stages, st.integers(0, 10))
def test_one_f_one_b(p, more):
    """The stash does not depend on the microbatches; the first stage has none, the second the most."""
    table = build("1f1b", p, p + more)
    assert table.ticks == p + more + 2 * (p - 1)
    assert table.activation_slots == (0 if p == 1 else min(2 * p - 3, p + more))
    assert table.cotangent_slots == (p > 1)


@given(stages, st.integers(0, 10))
def test_gpipe(p, more):
    table = build("gpipe", p, p + more)
    assert table.ticks == 2 * (p + more + p - 1)
    assert table.activation_slots == (0 if p == 1 else p + more)
    forward, backward = (getattr(table, f"{kind}_microbatch") >= 0 for kind in "fb")
    assert np.argwhere(forward)[:, 0].max() < np.argwhere(backward)[:, 0].min()


@given(stages, st.integers(0, 10))
def test_zb(p, more):
    """Every stage makes the weight gradients of a microbatch in one tick, and the stash is that of 1f1b but for one."""
    m = p + more
    table, other = build("zb", p, m), build("1f1b", p, m)
    for name in ("f_microbatch", "f_chunk", "b_microbatch", "b_chunk"):
        assert (getattr(table, name) == getattr(other, name)).all()
    assert (table.w_microbatch == np.r_[[-1] * 2 * (p - 1), range(m)][:, None]).all()
    assert table.activation_slots == (0 if p == 1 else min(2 * (p - 1), m))
    assert table.cotangent_slots == p - 1


@given(stages, st.integers(1, 4), st.integers(2, 5))
def test_interleaved_in_whole_groups(p, groups, v):
    """The ticks of Megatron's schedule: nothing is idle between a stage's first and last forward."""
    m = groups * p
    order, table = interleaved(p, m, v), build("interleaved", p, m, v)
    for i, j in np.ndindex(m, p * v):
        (g, r), (c, s) = divmod(i, p), divmod(j, p)
        assert order.forward[i, j] == g * v * p + c * p + r + s
        assert order.backward[i, j] == (v * p - 1) + g * v * p + (v - 1 - c) * p + r + (p - 1 - s)
    assert table.ticks == m * v + v * p - 1 + p - 1
    assert table.chunks == v


@given(stages, st.integers(0, 15), st.integers(2, 4))
def test_interleaved_stash_does_not_grow(p, more, v):
    """Also where the microbatches are no multiple of the stages: the largest group is below twice the stages."""
    table = build("interleaved", p, p + more, v)
    assert table.activation_slots <= (v - 1) * (2 * p - 1) * 2 + 2 * p - 1
    whole = -(-(p + more) // p) * p
    assert table.ticks <= build("interleaved", p, whole, v).ticks


@given(stages, st.integers(1, 15), st.integers(1, 4))
def test_forward(p, m, v):
    """No stage waits for anything but the pipeline to fill, and for the first microbatch to come round the ring."""
    table = forward(p, m, v)
    assert table.ticks == (v * m + p - 1 if m >= p else (v - 1) * p + m + p - 1)
    assert table.activation_slots <= p
    assert table.cotangent_slots == 0
    assert (table.b_microbatch == -1).all() and (table.w_microbatch == -1).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("1f1b", 4, 3), r"--pipeline.microbatches=3 is less than the 4 stages.*use --pipeline.microbatches=4 or more"),
        (("1f1b", 0, 3), "0 stages"),
        (("interleaved", 4, 8, 1), "--pipeline.chunks=1: .* use --pipeline.chunks=2, or --pipeline.schedule=1f1b"),
        (("dualpipe", 4, 4), "--pipeline.schedule=dualpipe: no such schedule; use .*1f1b"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        build(*arguments)
    with pytest.raises(UserError, match="0 microbatches"):
        forward(2, 0)


def test_tables_cannot_change():
    with pytest.raises(ValueError, match="read-only"):
        build("1f1b", 2, 2).f_slot[0, 0] = 1


def test_schedules_need_no_jax():
    code = (
        "import sys, jaxlm.parallel.schedules.__main__; print([m for m in ('jax', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


prices = st.builds(
    lambda f, b, i, w: Costs(forward=f, backward=b, input_backward=i, weights=w),
    *[st.sampled_from([1.0, 1.5, 2.0, 3.0])] * 4,
)


@given(stages, st.integers(0, 10), prices)
def test_time_of_gpipe_and_1f1b(p, more, costs):
    """The same bubble, (p - 1) / (m + p - 1), whatever the costs; stages that wait for less win nothing."""
    m = p + more
    for schedule in ("gpipe", "1f1b"):
        simulation = simulate(build(schedule, p, m), costs)
        one = costs.forward + costs.backward
        assert simulation.busy == pytest.approx((m * one,) * p)
        assert simulation.time == simulation.loose_time == pytest.approx((m + p - 1) * one)
        assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1))


@given(stages, st.integers(1, 4), st.integers(2, 5), prices)
def test_time_of_interleaved(p, groups, v, costs):
    m = groups * p
    simulation = simulate(build("interleaved", p, m, v), costs)
    assert simulation.ideal_time == pytest.approx(m * (costs.forward + costs.backward))
    assert simulation.bubble == pytest.approx((p - 1) / (v * m + p - 1))


@given(stages, st.integers(0, 10), prices)
def test_time_of_zb(p, more, costs):
    """The ticks that fill and drain cost a forward and an input's backward; without ticks it is the paper's time."""
    m = 2 * p + more
    table, one = build("zb", p, m), costs.forward + costs.input_backward
    simulation = simulate(table, costs)
    assert simulation.time == pytest.approx(m * (one + costs.weights) + (p - 1) * one)
    equal = simulate(table, Costs(input_backward=1.0, weights=1.0))
    assert equal.loose_time == pytest.approx(3 * m + p - 1)


@given(arguments(), prices)
def test_simulation(arguments, costs):
    table = made(*arguments)
    simulation = simulate(table, costs)
    assert max(simulation.busy) <= simulation.loose_time <= simulation.time + 1e-9
    assert 0 <= simulation.loose_bubble <= simulation.bubble + 1e-9
    assert len(simulation.starts) == table.ticks + 1
    assert max(simulation.stash) == table.activation_slots and max(simulation.cotangents) == table.cotangent_slots
    assert simulation.stash_bytes(10) == 10 * (table.activation_slots + table.cotangent_slots)


def test_terminal(capsys, monkeypatch):
    """Every microbatch stands in a line of its stage and kind; long tables go on below, within the width."""
    monkeypatch.setenv("COLUMNS", "80")
    main(["--stages=2", "--microbatches=3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1f1b: 2 stages, 3 microbatches, 5 ticks"
    assert lines[3:8] == [
        "tick      0 1 2 3 4",
        "stage 0 F 0 1 2 . .",
        "        B . . 0 1 2",
        "stage 1 F . 0 1 2 .",
        "        B . 0 1 2 .",
    ]
    assert "time    16, of which 12 work" in lines[9] and "bubble  25.0%" in lines[10]
    assert lines[11] == "stash   1 stage input (by stage: 0 1), 1 cotangent"
    main(["--schedule=interleaved", "--microbatches=16", "--input-bytes=1000"])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"stage 0 F +(.*)", out)[0].split()[:9] == ["0a", "1a", "2a", "3a", "0b", "1b", "2b", "3b", "4a"]
    cells = " ".join(re.findall(r"stage 3 F +(.*)", out)).replace(".", "").split()
    assert sorted(cells) == sorted(f"{i}{chunk}" for i in range(16) for chunk in "ab")
    assert "(9 + 1) x 1,000 bytes = 10,000 bytes on each stage" in out
    main(["--schedule=zb", "--stages=1", "--microbatches=1"])
    assert "stage 0 F 0\n        B 0\n        W 0\n" in capsys.readouterr().out


def test_colours_differ():
    """Of kinds and of chunks, and no text is lost on its background."""
    shades = [colour(kind, chunk, 8) for kind in "fbw" for chunk in range(8)]
    assert len(set(shades)) == len(shades)
    assert ink("#000000") == "white" and ink("#ffffff") == "black"
    with_colour = Console(force_terminal=True, color_system="truecolor", width=80, file=io.StringIO())
    for line in draw_cells(build("interleaved", 2, 2, 2), 80):
        with_colour.print(line)
    assert with_colour.file.getvalue().count("48;2;") == 2 * 2 + 2 * (2 * 2 * 2)  # legend, then each action


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
@pytest.mark.parametrize("schedule", sorted(ORDERS))
def test_picture(tmp_path, capsys, schedule, suffix, start):
    pytest.importorskip("matplotlib")
    out = tmp_path / f"schedule.{suffix}"
    main([f"--schedule={schedule}", "--stages=2", "--microbatches=3", f"--out={out}"])
    assert out.read_bytes().startswith(start)
    assert f"wrote {out}" in capsys.readouterr().out


def test_picture_is_on_the_clock(tmp_path):
    """Bars are as long as their actions take, and stand where the simulator has them."""
    pytest.importorskip("matplotlib")
    table = build("1f1b", 2, 2)
    axes = picture(table, simulate(table), tmp_path / "schedule.png").axes[0]
    spans = sorted(
        (round(ys.mean()), round(xs.min(), 6), round(xs.max(), 6))
        for collection in axes.collections
        for xs, ys in (path.vertices.T for path in collection.get_paths())
        if xs.max() > xs.min()
    )
    stage_0 = [(0, 0, 1), (0, 1, 2), (0, 5, 8), (0, 9, 12)]
    stage_1 = [(1, 1, 2), (1, 2, 5), (1, 5, 6), (1, 6, 9)]
    assert spans == stage_0 + stage_1
    assert axes.get_title(loc="left") == "1f1b: 2 stages, 2 microbatches, 4 ticks; bubble 33.3%"
    assert {text.get_text() for text in axes.texts} == {"0", "1"}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--chunks=3"], "--chunks=3 has no effect with --schedule=1f1b; use --schedule=interleaved"),
        (["--microbatches=3"], "--microbatches=3 is less than the 4 stages.*use --microbatches=4 or more"),
        (["--schedule=interleaved", "--chunks=1"], "--chunks=1: .* use --chunks=2, or --schedule=1f1b"),
        (["--schedule=zb2"], "--schedule='zb2' is not one of .* nearest is zb"),
        (["--stages=0"], "--stages=0: must be 1 or more"),
        (["--input-bytes=0"], "--input-bytes=0: must be 1 or more"),
        (["--microbatches=1000000"], "too large to read; use up to"),
        (["--stages=2", "--out=schedule.exe"], "--out=schedule.exe: no picture format '.exe'"),
        (["--stages=2", "--out=/no/such/folder/x.png"], "--out=/no/such/folder/x.png cannot be written: no such file"),
    ],
)
def test_mistakes_of_the_command(argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)


def test_picture_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"jaxlm\[plot\]"):
        main(["--out=schedule.png"])


def test_exit_code():
    command = [sys.executable, "-m", "jaxlm.parallel.schedules", "--stages=9"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert (
        result.stderr.startswith("error: --microbatches=8 is less than the 9 stages") and result.stderr.count("\n") == 1
    )
