"""Replicas: gradients are reduced inside each first, and only then across the slow network between them."""

import math

import jax
import pytest

from jaxlm.parallel.collectives import collectives
from tests.train.battery import batch, build, configuration, place


def sums(mesh: str, **changes) -> dict[str, int]:
    """Axes -> bytes of the sums over them in the compiled step, scalars left out."""
    assembly = build(configuration("gpt", **changes), mesh)
    found = collectives(assembly.compile().as_text(), assembly.runtime.layout.mesh)
    return {c.axes: c.bytes for c in found if c.kind in ("all-reduce", "reduce-scatter") and c.bytes > 64}


def parameter_bytes(mesh: str) -> int:
    """Of what one device holds."""
    leaves = jax.tree.leaves(build(configuration("gpt"), mesh).plan.abstract["params"])
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("mesh", ["rep2,dp4", "rep2,fsdp4"])
def test_one_sum_inside_then_one_across(mesh):
    """Across replicas travels what a device holds: of fsdp4 a quarter of the gradients, not all of them."""
    found, inside = sums(mesh), mesh.partition(",")[2][:-1]
    assert set(found) == {"rep", inside}, found
    assert found["rep"] == pytest.approx(parameter_bytes(mesh), rel=0.01)


@pytest.mark.slow
def test_sums_in_bfloat16():
    config = configuration("gpt", precision__params="bfloat16", precision__compute="bfloat16")
    losses = []
    for mesh in ("dp4", "rep2,dp2"):
        assembly = build(config, mesh)
        losses.append(float(assembly.compile()(assembly.init(), place(assembly, batch(config, 0)))[1]["loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
