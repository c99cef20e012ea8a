"""Attention on each device's own batch rows, heads and part of the sequence, where the partitioner cannot help.

A kernel is opaque to the partitioner, and a ring is written with collectives: both run under `jax.shard_map`, batch
over the data axes, heads over "model", the sequence over "context".
"""

from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

BATCH_AXES = ("replica", "data", "fsdp", "expert")
HEAD_AXIS = "model"
SEQUENCE_AXIS = "context"
STAGE_AXIS = "pipeline"

Local = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Queries, keys, values and segments of one device -> output."""


def parts(mesh: Mesh | None, axis: str) -> int:
    """Devices along `axis`; 1 where there is no such axis."""
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def on_shards(
    local: Local,
    mesh: Mesh | None,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
) -> jax.Array:
    """Run `local` on what each device holds; within a shard_map, over the axes it left automatic."""
    inside = jax.sharding.get_abstract_mesh()
    manual = set(inside.manual_axes)
    around: Mesh | AbstractMesh | None = inside if manual else mesh
    free = [] if around is None else [name for name in around.axis_names if name not in manual]
    if around is None or not free:
        return local(q_BTNH, k_BTKH, v_BTKH, segments_BT)
    sequence = SEQUENCE_AXIS if SEQUENCE_AXIS in free and around.shape[SEQUENCE_AXIS] > 1 else None
    # An axis that is not mentioned costs an all-reduce of the gradients, even where its size is 1.
    batch = tuple(a for a in free if a in BATCH_AXES or (a != HEAD_AXIS and around.shape[a] == 1)) or None
    heads = PartitionSpec(batch, sequence, HEAD_AXIS if HEAD_AXIS in free else None, None)
    # check_vma is off because a kernel's outputs do not say over which axes they vary.
    return jax.shard_map(
        local, mesh=around, in_specs=(heads, heads, heads, PartitionSpec(batch, sequence)), out_specs=heads,
        axis_names=frozenset(free), check_vma=False,
    )(q_BTNH, k_BTKH, v_BTKH, segments_BT)  # fmt: skip
