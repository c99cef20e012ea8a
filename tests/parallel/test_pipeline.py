"""The pipeline engine's pieces, and what XLA makes of it; that it equals one device is the parity battery's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from jaxlm.config.mesh_spec import parse
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import pipeline
from jaxlm.parallel.collectives import axes_in_branches, collectives
from tests.train.battery import GPT, build, configuration


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 20))
def test_every_layer_stands_once_in_order_and_the_ends_have_no_more_than_the_middle(stages, chunks, more):
    layers = stages * chunks + more
    numbers = pipeline.layer_numbers(layers, stages, chunks)
    assert numbers.shape[:2] == (stages, chunks)
    virtual = numbers.swapaxes(0, 1).reshape(stages * chunks, -1)
    assert [n for row in virtual for n in row if n >= 0] == list(range(layers))
    counts = (virtual >= 0).sum(axis=1)
    assert counts.max() - counts.min() <= 1
    assert counts[0] <= counts.max()
    assert counts[-1] <= counts[len(counts) // 2]


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, ("fsdp", "pipeline"))], ids=["whole", "cut"])
@pytest.mark.parametrize(("layers", "chunks"), [(8, 2), (7, 1), (6, 2)])
def test_chunks_are_the_layers_of_their_numbers(layers, chunks, spec):
    mesh = meshes.from_devices(parse("pp2,fsdp2,tp2"), jax.devices())
    numbers = pipeline.layer_numbers(layers, 2, chunks)
    leaf = jnp.arange(layers * 8 * 6, dtype=jnp.float32).reshape(layers, 8, 6)

    def local(leaf):
        return pipeline.to_chunks(leaf, spec, numbers, ())[None]

    cut = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=spec,
            out_specs=PartitionSpec("pipeline", None, None, "fsdp" if len(spec) else None),
            check_vma=False,
        )
    )(leaf)
    wanted = np.asarray(leaf)[np.maximum(numbers, 0)]
    np.testing.assert_array_equal(np.asarray(cut), wanted)


@pytest.fixture(scope="module")
def compiled():
    """Steps by (mesh, schedule, microbatches), compiled once."""
    cache = {}

    def get(mesh, schedule="1f1b", microbatches=8, layers=4):
        key = (mesh, schedule, microbatches, layers)
        if key not in cache:
            config = configuration(
                dataclasses.replace(GPT, layers=layers),
                pipeline__schedule=schedule,
                pipeline__microbatches=microbatches,
                data__batch_size=2 * microbatches,
            )
            assembly = build(config, mesh)
            cache[key] = assembly.compile(), assembly.runtime.layout.mesh
        return cache[key]

    return get


def test_what_a_branch_sends_stays_within_a_stage(compiled):
    program, mesh = compiled("pp2,fsdp2,tp2")
    inside = axes_in_branches(program.as_text(), mesh)
    assert {"fsdp", "tp"} <= inside  # else this would show nothing
    assert not {axes for axes in inside if "pp" in axes or axes == "other"}, inside


def test_gradients_are_summed_over_data_once_and_not_in_the_loop(compiled):
    program, mesh = compiled("pp2,dp2,tp2")
    found = collectives(program.as_text(), mesh)
    over_data = [c for c in found if "dp" in c.axes.split("+")]
    assert over_data
    ticks = 8 + 2
    assert all(c.count < ticks for c in over_data), over_data
    assert "dp" not in axes_in_branches(program.as_text(), mesh)


def test_weights_gathered_over_fsdp_stay_cut_over_tp(compiled):
    """XLA's partitioner, left alone, gathers them over both."""
    program, mesh = compiled("pp2,fsdp2,tp2")
    weights = 2 * 4 * 128 * 256  # one mlp kernel, float32
    gathered = [c for c in collectives(program.as_text(), mesh) if c.kind == "all-gather"]
    over_tp = sum(c.bytes for c in gathered if c.axes == "tp")
    over_fsdp = sum(c.bytes for c in gathered if c.axes == "fsdp")
    assert over_fsdp > 10 * weights
    assert over_tp < over_fsdp / 20, gathered  # the looked-up embeddings of each microbatch


@pytest.mark.parametrize("mesh", ["pp4,dp2"])
def test_memory_of_1f1b_does_not_grow_with_microbatches(compiled, mesh):
    few, many = (compiled(mesh, "1f1b", m)[0].memory_analysis().temp_size_in_bytes for m in (8, 32))
    assert many <= 1.02 * few
    few, many = (compiled(mesh, "gpipe", m)[0].memory_analysis().temp_size_in_bytes for m in (8, 32))
    assert many > 1.2 * few  # the measure can tell
