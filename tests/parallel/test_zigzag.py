"""The order of a cut sequence: every device has the same to do, and each token moves once."""

import jax
import numpy as np
import pytest

from jaxlm.config.mesh_spec import parse
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel import rules
from jaxlm.parallel.collectives import collectives
from jaxlm.parallel.zigzag import order, zigzag


def layout_of(mesh):
    spec = parse(mesh)
    return rules.layout(meshes.from_devices(spec, jax.devices()[: spec.device_count]))


def work(tokens, window):
    """Keys that these queries see in one document."""
    seen = tokens + 1
    return int((np.minimum(seen, window) if window else seen).sum())


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [0, 40])
def test_all_devices_have_the_same_to_do(devices, window):
    length = 48 * devices
    parts = order(length, devices).reshape(devices, -1)
    assert sorted(parts.ravel()) == list(range(length))
    amounts = [work(part, window) for part in parts]
    plain = [work(part, window) for part in np.arange(length).reshape(devices, -1)]
    if window == 0:
        assert len(set(amounts)) == 1
    assert max(amounts) <= max(plain)
    assert devices == 1 or max(plain) > min(plain)


@pytest.mark.parametrize("mesh", ["cp2", "cp3", "dp2,cp4", "cp2,tp2", "fsdp2,cp2,tp2"])
def test_tokens_arrive_in_that_order_and_move_once(mesh):
    layout = layout_of(mesh)
    devices = layout.mesh.shape["context"]
    tokens_BT = np.arange(4 * 12 * devices, dtype=np.int32).reshape(4, -1)
    arrays = {"tokens": tokens_BT, "loss_mask": tokens_BT.astype(np.float32)}
    placed = {name: jax.device_put(x, layout.sharding(("batch", "sequence"))) for name, x in arrays.items()}
    compiled = jax.jit(lambda batch: zigzag(batch, layout)).lower(placed).compile()
    for name, found in compiled(placed).items():
        assert found.sharding.is_equivalent_to(placed[name].sharding, 2)
        np.testing.assert_array_equal(found, arrays[name][:, order(12 * devices, devices)])
    moves = collectives(compiled.as_text(), layout.mesh)
    assert {move.kind for move in moves} == {"collective-permute"}
    part_bytes = tokens_BT.nbytes // layout.axis_size("batch", "sequence")
    assert sum(move.bytes for move in moves) <= 2 * part_bytes


def test_a_whole_sequence_stays_as_it_is():
    batch = {"tokens": np.arange(8, dtype=np.int32).reshape(2, 4)}
    assert zigzag(batch, layout_of("dp2")) is batch
