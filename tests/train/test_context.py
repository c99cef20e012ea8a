"""A sequence that is cut over devices: training and evaluation compute what one device computes, in flat memory."""

import math
import re

import jax
import numpy as np
import pytest

from jaxlm.parallel.collectives import collectives
from jaxlm.train.step import eval_step
from tests.spread import spread
from tests.train.battery import batch, build, compare, configuration, measure, on_one_device, place

RUNS = {
    "cp2": ("gpt", {}),
    "dp2,cp2,tp2": ("llama", {"train__microbatches": 2, "remat": "selective"}),
    "fsdp2,cp2": ("llama", {"context__method": "allgather"}),
    "cp4": ("gpt", {"context__method": "ulysses"}),
}
"""Meshes of the default suite: model and how it is computed."""

METHODS = ("ring", "allgather", "ulysses")
MORE = ["cp2", "cp4", "cp2,tp2", "cp4,tp2", "dp2,cp2,tp2", "fsdp2,cp2", "fsdp2,cp2,tp2", "rep2,cp2,ep2", "cp8"]
MORE += ["pp2,cp2", "pp2,fsdp2,cp2", "pp2,cp2,tp2"]


def check(mesh, style, **changes):
    run = {key: value for key, value in changes.items() if key.startswith(("model__", "optimizer__"))}
    compare(measure(configuration(style, **changes), mesh), on_one_device(configuration(style, **run))).check()


@pytest.mark.parametrize("mesh", RUNS)
def test_mesh_equals_one_device(mesh):
    check(mesh, RUNS[mesh][0], **RUNS[mesh][1])


@pytest.mark.parametrize(("mesh", "method", "style"), spread(MORE, METHODS, ("gpt", "llama"), together=1))
def test_more_meshes_equal_one_device(mesh, method, style):
    # With 8 heads one element of a gradient is 1e-8, its rounding: the default epsilon would divide it by itself, and
    # one device would differ from itself with and without rematerialisation.
    check(mesh, style, context__method=method, model__heads=8, optimizer__epsilon=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"train__microbatches": 4}, {"train__loss_chunk": 100}, {"remat": "dots"}])
def test_other_cuts_equal_one_device(changes):
    check("dp2,cp2,tp2", "gpt", **changes)


def test_evaluation_is_that_of_one_device():
    config = configuration("llama")
    sums = []
    for mesh in ("dp1", "dp2,cp2,tp2"):
        assembly = build(config, mesh)
        lengths = np.arange(assembly.model.padded_vocabulary, dtype=np.int32)
        step = eval_step(assembly.model, config, assembly.runtime)
        sums.append([float(x) for x in step(assembly.init()["params"], place(assembly, batch(config, 0)), lengths)])
    assert sums[1] == pytest.approx(sums[0], rel=1e-6)


def test_the_compiled_step_moves_keys_and_gradients_and_no_activations():
    config = configuration("llama", model__layers=1)
    assembly = build(config, "dp2,cp2")
    found = collectives(assembly.compile().as_text(), assembly.runtime.layout.mesh)
    assert {row.kind for row in found} == {"collective-permute", "all-reduce"}
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(assembly.init()["params"]))
    reduced = [row for row in found if row.kind == "all-reduce"]
    assert sum(row.bytes for row in reduced if "cp" in row.axes) <= 1.01 * parameter_bytes


def test_a_device_of_a_longer_sequence_on_more_devices_holds_the_same():
    def temporary_bytes(mesh, length):
        changes = {"data__sequence_length": length, "data__batch_size": 4, "model__max_positions": 256}
        changes |= {"model__layers": 1}
        return build(configuration("gpt", **changes), mesh).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("cp8", 256) <= 1.02 * temporary_bytes("cp4", 128)


def test_no_masks_of_the_whole_sequence_are_kept():
    """They follow from the segments alone, which are the same in all layers: JAX would make them once, all together."""
    config = configuration("gpt", data__sequence_length=512, data__batch_size=4, model__max_positions=512)
    text = build(config, "cp8").compile().as_text()
    masks = [shape.split(",") for shape in re.findall(r"pred\[([\d,]+)\]", text)]
    assert max(math.prod(map(int, shape)) for shape in masks) <= 2 * 4 * 4 * 64 * 64, "more than one visit's"
