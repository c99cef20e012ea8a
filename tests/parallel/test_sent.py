"""What a device sends in the collectives of a program, on hand-made programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config.mesh_spec import parse
from jaxlm.parallel.collectives import Collective, collectives
from jaxlm.parallel.mesh import from_devices


def mesh_of(text: str) -> jax.sharding.Mesh:
    spec = parse(text)
    return from_devices(spec, jax.devices()[: spec.device_count])


def test_bytes_sent_around_a_ring():
    """A hand-made program with one collective of each kind, on arrays of 64 and 256 numbers."""
    mesh = mesh_of("dp2,tp4")

    def every(x):  # [64] on each device
        gathered = jax.lax.all_gather(x, "model", tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "model", tiled=True)
        exchanged = jax.lax.all_to_all(scattered.reshape(8, 8), "model", 0, 1, tiled=True)
        shifted = jax.lax.ppermute(exchanged, "data", [(0, 1), (1, 0)])
        return jax.lax.psum(jax.lax.psum(shifted, "data") * 0.5, ("data", "model"))

    mapped = jax.shard_map(every, mesh=mesh, in_specs=P("model"), out_specs=P(), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((256,), jnp.float32)).compile().as_text()
    sent = {(row.kind, row.axes): row.sent(mesh) for row in collectives(program, mesh)}
    assert sent == {
        ("all-gather", "tp"): 3 * 64 * 4,
        ("reduce-scatter", "tp"): 3 * 64 * 4,
        ("all-to-all", "tp"): 48 * 4,
        ("collective-permute", "dp"): 64 * 4,
        ("all-reduce", "dp"): 2 * 32 * 4,
        ("all-reduce", "dp+tp"): 2 * 56 * 4,
    }


def test_a_device_alone_sends_nothing_and_groups_of_no_axis_are_an_error():
    mesh = mesh_of("dp2,fsdp2,tp2")
    assert Collective(kind="all-reduce", axes="none", count=1, bytes=32).sent(mesh) == 0
    with pytest.raises(ValueError, match="no axes"):
        Collective(kind="all-reduce", axes="other", count=1, bytes=32).sent(mesh)
