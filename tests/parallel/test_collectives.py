"""What `--explain` reads from compiled programs: small ones whose collectives are known, HLO text, the train step."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config.mesh_spec import parse
from jaxlm.parallel.collectives import Collective, collectives
from jaxlm.parallel.mesh import from_devices
from tests.train.battery import GPT, LLAMA, build, configuration


def mesh_of(text: str) -> jax.sharding.Mesh:
    spec = parse(text)
    return from_devices(spec, jax.devices()[: spec.device_count])


def found(function, mesh, in_spec, out_spec, *shape: int) -> list[tuple]:
    """(kind, axes, count, bytes) of `function` under shard_map on one float32 array of ones."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    compiled = jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return [(c.kind, c.axes, c.count, c.bytes) for c in collectives(compiled.as_text(), mesh)]


MESH = "dp2,fsdp2,tp2"
NAMES = {"dp": "data", "fsdp": "fsdp", "tp": "model"}


@pytest.mark.parametrize("axes", ["dp", "fsdp", "tp", "dp+fsdp", "dp+tp", "fsdp+tp", "dp+fsdp+tp"])
def test_all_reduce_over_each_product_of_axes(axes):
    over = tuple(NAMES[a] for a in axes.split("+"))
    assert found(lambda x: jax.lax.psum(x, over), mesh_of(MESH), P(), P(), 4, 6) == [("all-reduce", axes, 1, 96)]


@pytest.mark.parametrize("axis", list(NAMES))
def test_other_kinds(axis):
    mesh, name = mesh_of(MESH), NAMES[axis]

    def gather(x):
        return jax.lax.all_gather(x, name, tiled=True)

    def scatter(x):
        return jax.lax.psum_scatter(x, name, tiled=True)

    def transpose(x):
        return jax.lax.all_to_all(x, name, split_axis=1, concat_axis=0, tiled=True)

    def shift(x):
        return jax.lax.ppermute(x, name, [(0, 1), (1, 0)])

    assert found(gather, mesh, P(name), P(), 8, 4) == [("all-gather", axis, 1, 128)]
    assert found(scatter, mesh, P(), P(name), 8, 4) == [("reduce-scatter", axis, 1, 64)]
    assert found(transpose, mesh, P(name), P(None, name), 8, 4) == [("all-to-all", axis, 1, 64)]
    assert found(shift, mesh, P(name), P(name), 8, 4) == [("collective-permute", axis, 1, 64)]


def test_dtypes_count_their_own_bytes():
    mesh = mesh_of("dp8")
    for dtype, size in [("bfloat16", 2), ("float32", 4), ("int8", 1)]:
        gather = jax.shard_map(
            lambda x: jax.lax.all_gather(x, "data", tiled=True), mesh=mesh, in_specs=P("data"), out_specs=P(),
            check_vma=False,
        )  # fmt: skip
        compiled = jax.jit(gather).lower(jax.ShapeDtypeStruct((64,), dtype)).compile()
        (row,) = collectives(compiled.as_text(), mesh)
        assert (row.kind, row.axes, row.count) == ("all-gather", "dp", 1)
        # XLA:CPU may send small types as larger ones; what it sends is what counts.
        assert row.bytes in (64 * size, 64 * 4)


def test_loops_multiply():
    mesh = mesh_of("dp2,tp4")

    def nested(x):
        def inner(y, _):
            return jax.lax.psum(y, "model") * 0.5, None

        def outer(y, _):
            y, _ = jax.lax.scan(inner, y, None, length=5)
            return jax.lax.ppermute(y, "data", [(0, 1), (1, 0)]), None

        return jax.lax.psum(jax.lax.scan(outer, x, None, length=7)[0], ("data", "model"))

    assert found(nested, mesh, P(), P(), 3, 5) == [
        ("all-reduce", "tp", 35, 35 * 60),
        ("collective-permute", "dp", 7, 7 * 60),
        ("all-reduce", "dp+tp", 1, 60),
    ]


def test_branches_inside_loops_multiply():
    mesh = mesh_of("tp8")

    def branching(x):
        def turn(y, i):
            return jax.lax.cond(i % 2 == 0, lambda z: jax.lax.psum(z, "model") * 0.1, lambda z: z * 2.0, y), None

        return jax.lax.scan(turn, x, jnp.arange(6))[0]

    assert found(branching, mesh, P(), P(), 5) == [("all-reduce", "tp", 6, 120)]


def test_text_of_a_kernel_ends_no_computation():
    """As Splash attention's, whose metadata has lines of its own."""
    hlo = """HloModule m

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4] parameter(0)
  %kernel = f32[4] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": 128
}}, metadata={op_name="kernel"}
  ROOT %sum = f32[4] all-reduce(%kernel), replica_groups={{0,1}}, to_apply=%add
}
"""
    assert [(c.kind, c.bytes) for c in collectives(hlo, mesh_of("dp2"))] == [("all-reduce", 16)]


def test_none():
    assert found(lambda x: x * 2.0, mesh_of("dp8"), P("data"), P("data"), 8) == []


HEADER = "HloModule m\n\n%add (a: f32[], b: f32[]) -> f32[] {\n  ROOT %c = f32[] add(%a, %b)\n}\n\n"
HEADER += "%product (d: f32[8]) -> f32[8] {\n  %d = f32[8]{0} parameter(0)\n  ROOT %e = f32[8]{0} dot(%d, %d)\n}\n\n"


def hlo(*instructions: str) -> str:
    lines = "\n".join(f"  {line}" for line in instructions)
    return f"{HEADER}ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{lines}\n}}\n"


REDUCE = "%r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add"


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tp"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "dp"),
        ("{{0,2,4,6},{1,3,5,7}}", "dp+fsdp"),
        ("{{0,1,2,3,4,5,6,7}}", "dp+fsdp+tp"),
        ("{}", "dp+fsdp+tp"),
        ("{{0,3},{1,2},{4,7},{5,6}}", "other"),
        ("{{0},{1},{2},{3},{4},{5},{6},{7}}", "none"),
        ("[4,2]<=[8]", "tp"),
        ("[1,8]<=[8]", "dp+fsdp+tp"),
        ("[2,4]<=[4,2]T(1,0)", "dp+fsdp"),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp"),
        ("[4,2]<=[2,4]T(1,0)", "dp"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tp"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "dp+fsdp"),
        ("mesh['a'=2,'b'=4,'c'=1], device_ids=([4,2]T(1,0)) {'a'}", "tp"),
        ("mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", "dp+fsdp"),
        ("mesh['a'=8] {'a':(2)2}", "fsdp"),
        ("mesh['a'=8] {'a':(1)2}", "dp"),
        ("mesh['a'=8] {'a':(1)2, 'a':(4)2}", "dp+tp"),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", "dp+tp"),
    ],
)
def test_every_way_to_write_groups(groups, axes):
    (row,) = collectives(hlo(REDUCE.format(groups)), mesh_of(MESH))
    assert row == Collective(kind="all-reduce", axes=axes, count=1, bytes=32)


@pytest.mark.parametrize(
    "line, done, size",
    [
        ("(f32[1]{0}, f32[8]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}", "f32[8]", 32),
        (
            "((bf16[1], f32[2]), (bf16[8], f32[16])) all-gather-start(%p, %q), replica_groups=[1,8]<=[8]",
            "(bf16[8], f32[16])",
            16 + 64,
        ),
        ("((f32[64]), f32[8]) reduce-scatter-start(%p), replica_groups=[1,8]<=[8], to_apply=%add", "f32[8]", 32),
        (
            "(f32[4]{0}, f32[6]{0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add",
            "(f32[4]{0}, f32[6]{0})",
            40,
        ),
        ("f32[4]{0} all-reduce-start(%p), replica_groups={}, to_apply=%add", "f32[4]", 16),
        (
            "(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
            "f32[8]",
            32,
        ),
        ("(f32[4]{0}, /*index=1*/pred[3]{0}) all-to-all(%p, %q), replica_groups={}", None, 19),
        ("f32[64]{0} ragged-all-to-all(%p, %o, %i, %s, %j, %r), channel_id=1, replica_groups={}", None, 256),
        ("f32[8,128]{1,0:T(8,128)S(1)} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", None, 4096),
        ("f8e4m3fn[8]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}", None, 8),
    ],
)
def test_results_of_every_form(line, done, size):
    lines = [f"%s = {line}"]
    if done:  # the other half of an asynchronous one is not another collective
        kind = re.search(r" ([a-z-]+)-start", line)[1]
        lines.append(f"%d = {done} {kind}-done(%s)")
    (row,) = collectives(hlo(*lines), mesh_of("dp8"))
    assert (row.axes, row.count, row.bytes, row.overlapped) == ("dp", 1, size, 0)


@pytest.mark.parametrize(
    "between, overlapped",
    [
        ((), 0),
        (("%g = f32[8]{0} bitcast(%p)", "%t = (f32[8]{0}) tuple(%g)"), 0),
        (('%w = f32[8]{0} custom-call(%p), custom_call_target="gemm"',), 1),
    ],
)
def test_overlapped_is_what_has_work_between_start_and_done(between, overlapped):
    start = "%s = f32[8]{0} all-reduce-start(%p), replica_groups={}, to_apply=%add"
    after = '%after = f32[8]{0} custom-call(%d), custom_call_target="gemm"'
    (row,) = collectives(hlo(start, *between, "%d = f32[8]{0} all-reduce-done(%s)", after), mesh_of("dp8"))
    assert row.overlapped == overlapped


MB = 2**20
FSDP = {("all-gather", "fsdp", 1, 2 * MB, 0), ("reduce-scatter", "fsdp", 1, MB // 2, 0)}


@pytest.mark.parametrize(
    "file, mesh, wanted",
    [
        ("tpu_reduce_scatter", "fsdp4,tp2", FSDP),
        ("gpu_reduce_scatter", "fsdp4,tp2", FSDP),
        (
            "tpu_asynchronous",
            MESH,
            {
                ("all-gather", "fsdp", 5, 10 * MB, 5),
                ("all-reduce", "tp", 5, 10 * MB, 0),
                ("collective-permute", "dp", 5, 10 * MB, 0),
                ("all-reduce", "fsdp", 5, 10 * MB, 0),
                ("all-reduce", "dp+fsdp", 1, 4, 0),
            },
        ),
        (
            "gpu_loop",
            MESH,
            {
                ("all-gather", "fsdp", 5, 10 * MB, 5),
                ("all-reduce", "tp", 5, 10 * MB, 0),
                ("collective-permute", "dp", 5, 10 * MB, 0),
                ("all-reduce", "fsdp", 5, 10 * MB, 0),
                ("all-reduce", "dp+fsdp", 1, 4, 0),
            },
        ),
    ],
)
def test_programs_of_other_compilers(file, mesh, wanted):
    """Compiled for TPU v5p and H100: loops without a stated trip count, reduce-scatters and asynchronous collectives
    written as fusions, starts whose results hold operands too."""
    text = (Path(__file__).with_name("hlo") / f"{file}.txt").read_text()
    assert {dataclasses.astuple(row)[:5] for row in collectives(text, mesh_of(mesh))} == wanted


LOOP = """HloModule m
%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %limit = s32[] constant({limit})
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction={direction}
}}
%body (b: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %b = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant({step})
  %next = s32[] add(%j, %one)
  %x = f32[8]{{0}} get-tuple-element(%b), index=1
  %r = f32[8]{{0}} all-reduce(%x), replica_groups={{}}, to_apply=%add
  ROOT %carried = (s32[], f32[8]{{0}}) tuple(%next, %r)
}}
ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  %start = s32[] constant({start})
  %copied = s32[] copy(%start)
  %first = (s32[], f32[8]{{0}}) tuple(%copied, %p)
  %loop = (s32[], f32[8]{{0}}) while(%first), condition=%condition, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%loop), index=1
}}
"""


@pytest.mark.parametrize(
    "limit, start, step, direction, turns",
    [(7, 0, 1, "LT", 7), (7, 2, 1, "LT", 5), (7, 0, 2, "LT", 4), (7, 0, 1, "NE", 1)],
)
def test_turns_of_a_loop_are_read_from_its_condition(limit, start, step, direction, turns):
    text = LOOP.format(limit=limit, start=start, step=step, direction=direction)
    (row,) = collectives(text, mesh_of("dp8"))
    assert row.count == turns


@cache
def step(mesh: str, style: str, **keys) -> tuple[list[Collective], int, int]:
    """Collectives of the compiled train step, its temporary bytes a device, and bytes of the parameters."""
    config = configuration(style, **keys)
    config = dataclasses.replace(config, model=dataclasses.replace({"gpt": GPT, "llama": LLAMA}[style], **{
        "layers": 4, "vocabulary": 256,
    }))  # fmt: skip
    assembly = build(config, mesh)
    compiled = assembly.compile()
    parameters = sum(int(np.prod(leaf.shape)) * 4 for leaf in jax.tree.leaves(assembly.model.abstract))
    rows = collectives(compiled.as_text(), assembly.runtime.layout.mesh)
    return rows, compiled.memory_analysis().temp_size_in_bytes, parameters


def total(rows: list[Collective], kind: str, axes: str) -> tuple[int, int]:
    chosen = [row for row in rows if (row.kind, row.axes) == (kind, axes)]
    return sum(row.count for row in chosen), sum(row.bytes for row in chosen)


SCALARS = 4096
"""Bytes of the norms, losses and counts that a step may sum beside its gradients."""


def test_dp_only_sums_each_gradient_once():
    rows, _, parameters = step("dp8", "gpt")
    assert {(row.kind, row.axes) for row in rows} == {("all-reduce", "dp")}
    assert parameters - SCALARS <= total(rows, "all-reduce", "dp")[1] <= parameters + SCALARS


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_tp_reduces_four_times_a_layer(style):
    rows, _, _ = step("tp2", style)
    assert {(row.kind, row.axes) for row in rows} == {("all-reduce", "tp")}
    # Attention and feed-forward, forward and backward; embedding; of the loss the peak, the sums, the gradient; norms.
    assert total(rows, "all-reduce", "tp")[0] == 4 * 4 + 1 + 3 + 1


def test_dp_tp_sums_gradients_over_dp_and_activations_over_tp():
    rows, _, parameters = step("dp4,tp2", "gpt")
    assert {row.kind for row in rows} == {"all-reduce"}
    assert sum(row.bytes for row in rows if row.axes not in ("dp", "tp")) <= SCALARS
    assert total(rows, "all-reduce", "tp")[0] == 4 * 4 + 1 + 3 + 1
    # Half of each matrix, and all of what tp leaves whole: position table, norms, biases of outputs.
    half, whole = parameters / 2, (32 + 4 * 8) * 128 * 4
    assert half - SCALARS <= total(rows, "all-reduce", "dp")[1] <= half + whole


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_fsdp_gathers_each_layer_in_the_loop_and_again_for_the_backward(style):
    rows, temporary, parameters = step("fsdp8", style)
    assert {row.kind for row in rows} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert {row.axes for row in rows} == {"fsdp"}
    assert total(rows, "all-reduce", "fsdp")[1] <= parameters / 100, "gradients are scattered, but those of biases"
    count, gathered = total(rows, "all-gather", "fsdp")
    assert 1.7 * parameters < gathered <= 2 * parameters
    assert count > 4 * 2 * 6  # six matrices a layer at the least, each twice
    # What is gathered does not stay: the same step on dp8 holds all gradients, this one weights and gradients of one of
    # four layers at a time, together half a model, and its eighth of the rest.
    _, whole, _ = step("dp8", style)
    assert temporary < whole - parameters / 4


def test_no_axis_moves_what_another_owns():
    rows, _, _ = step("dp2,fsdp2,tp2", "llama", remat="full", train__microbatches=2)
    for row in rows:
        allowed = {"all-gather": ("fsdp",), "reduce-scatter": ("fsdp",), "all-reduce": ("tp", "dp")}
        assert row.axes in allowed.get(row.kind, ()) or row.bytes <= SCALARS, row


CHAIN = """HloModule m
%start (p: f32[4]) -> (f32[4], f32[8]) {
  %p = f32[4]{0} parameter(0)
  %g = f32[8]{0} all-gather(%p), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %t = (f32[4]{0}, f32[8]{0}) custom-call(%g), custom_call_target="start"
}
%async_collective_fusion (x: f32[8,8], q: f32[4], r: f32[8]) -> (f32[8,8], f32[8]) {
  %x = f32[8,8]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %r = f32[8]{0} parameter(2)
  %d = f32[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf
  %h = f32[8]{0} all-gather(%q), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  ROOT %u = (f32[8,8]{1,0}, f32[8]{0}) tuple(%d, %h)
}
%all-reduce-scatter (y: f32[8,8]) -> f32[4,8] {
  %y = f32[8,8]{1,0} parameter(0)
  %s = f32[8,8]{1,0} all-reduce(%y), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %v = f32[4,8]{1,0} dynamic-slice(%s, %zero, %zero), dynamic_slice_sizes={4,8}
}
ENTRY %main (a: f32[4], b: f32[8,8]) -> f32[4,8] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %first = (f32[4]{0}, f32[8]{0}) fusion(%a), kind=kCustom, calls=%start
  %own = f32[4]{0} get-tuple-element(%first), index=0
  %all = f32[8]{0} get-tuple-element(%first), index=1
  %second = (f32[8,8]{1,0}, f32[8]{0}) fusion(%b, %own, %all), kind=kCustom, calls=%async_collective_fusion
  %product = f32[8,8]{1,0} get-tuple-element(%second), index=0
  ROOT %part = f32[4,8]{1,0} fusion(%product), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_what_reads_a_product_that_hid_a_collective_may_be_another_collective():
    found = {dataclasses.astuple(row) for row in collectives(CHAIN, mesh_of("dp2"))}
    assert found == {("reduce-scatter", "dp", 1, 128, 0), ("all-gather", "dp", 1, 32, 1)}
