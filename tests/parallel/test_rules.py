"""The rules table: what each dim becomes on a mesh, what is refused, and that nothing is replicated in silence."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import AXES, parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models.build import build
from jaxlm.parallel import rules
from jaxlm.parallel.mesh import from_devices


def mesh_of(text: str) -> jax.sharding.Mesh:
    spec = parse(text)
    return from_devices(spec, jax.devices()[: spec.device_count])


def layout_of(text: str, **keys) -> rules.Layout:
    return rules.layout(mesh_of(text), **keys)


@pytest.mark.parametrize(
    "mesh, dims, spec",
    [
        ("dp4,tp2", ("batch", "sequence"), PartitionSpec(("data",), None)),
        ("rep2,dp2,fsdp2", ("batch", "sequence"), PartitionSpec(("replica", "data", "fsdp"), None)),
        ("fsdp4,tp2", ("embed", "heads", None), PartitionSpec(("fsdp",), ("model",), None)),
        ("fsdp4,tp2", ("vocab", "embed"), PartitionSpec(("model",), ("fsdp",))),
        ("dp8", ("embed", "mlp"), PartitionSpec(None, None)),
        ("pp2,ep2,cp2", ("layers", "experts", "sequence"), PartitionSpec(("pipeline",), ("expert",), ("context",))),
    ],
)
def test_dims_follow_the_table(mesh, dims, spec):
    assert layout_of(mesh).spec(dims) == spec


def test_every_rule_names_axes_of_the_mesh_and_every_axis_is_used():
    used = {axis for axes in rules.RULES.values() for axis in axes}
    assert used == set(AXES.values())
    assert {mesh_axis: flag for flag, mesh_axis in AXES.items()} == rules.FLAG


def test_an_unknown_dim_names_the_parameter_and_the_dims_there_are():
    with pytest.raises(UserError, match=r"blocks\.w: no rule for dim 'width'; the dims are batch .*experts"):
        layout_of("dp8").spec(("embed", "width"), (8, 8), "blocks.w")


def test_two_dims_on_one_axis():
    two = ("heads", "mlp")
    with pytest.raises(UserError, match=r"blocks\.w: dims 'heads' and 'mlp' both map to mesh axis 'model'"):
        layout_of("tp2").spec(two, (4, 4), "blocks.w")
    assert layout_of("dp8").spec(two, (4, 4)) == PartitionSpec(None, None)  # no axis, no conflict


@pytest.mark.parametrize(
    "mesh, size, advice",
    [("tp4", 10, "use 8 or 12"), ("tp4", 3, "use 4,"), ("tp8", 1, "use 8,"), ("tp2", 5, "use 4 or 6")],
)
def test_a_size_that_does_not_divide_names_the_nearest(mesh, size, advice):
    ways = parse(mesh).device_count
    with pytest.raises(UserError) as caught:
        layout_of(mesh).spec(("embed", "mlp"), (16, size), "blocks.mlp.up.kernel")
    message = str(caught.value)
    assert message.startswith(f"blocks.mlp.up.kernel: mlp {size} does not divide over {mesh} ({ways} devices)")
    assert advice in message
    for near in (int(word) for word in message.partition("use ")[2].replace(",", " ").split() if word.isdigit()):
        layout_of(mesh).spec(("embed", "mlp"), (16, near))


def test_axes_of_one_dim_multiply():
    with pytest.raises(
        UserError, match=r"array: batch 12 does not divide over rep2,dp2,fsdp2 \(8 devices\); use 8 or 16"
    ):
        layout_of("rep2,dp2,fsdp2").spec(("batch",), (12,))
    assert layout_of("rep2,dp2,fsdp2").axis_size("batch", "sequence") == 8
    assert layout_of("rep2,dp2,tp2").axis_size("batch") == 4


@pytest.mark.parametrize("heads, whole", [(1, True), (2, True), (4, False), (8, False)])
def test_kv_heads_are_whole_only_where_fewer_than_tp(heads, whole):
    spec = layout_of("dp2,tp4", kv_heads=heads).spec(("embed", "kv_heads", None), (16, heads, 8))
    assert spec[1] == (None if whole else "model")


@pytest.mark.parametrize("heads", [3, 6])
def test_kv_heads_that_neither_divide_nor_are_divided_are_refused(heads):
    with pytest.raises(UserError, match=rf"k: kv_heads {heads} does not divide over tp4"):
        layout_of("tp4", kv_heads=heads).spec(("kv_heads",), (heads,), "k")


@pytest.mark.parametrize(
    "mesh, spec, shape, wanted",
    [
        ("dp4,tp2", (None, "model"), (8, 6), PartitionSpec(("data",), "model")),
        ("dp4,tp2", (None, "model"), (6, 8), PartitionSpec(None, ("model", "data"))),
        ("dp4,fsdp2", (("fsdp",), None), (8, 6), PartitionSpec(("fsdp", "data"), None)),
        ("dp4,tp2", ("model", None), (8, 4), PartitionSpec("model", ("data",))),
        ("dp4,fsdp2", (("fsdp",), None), (4, 4), PartitionSpec(("fsdp",), ("data",))),
        ("dp2,tp2", (), (5, 4), PartitionSpec(None, ("data",))),
        ("dp2", (), (4, 6, 8), PartitionSpec(None, None, ("data",))),
        ("tp2", (None, "model"), (6, 8), PartitionSpec(None, "model")),
        ("dp4", (None,), (6,), PartitionSpec(None)),
    ],
)
def test_zero_takes_the_largest_whole_dim_that_can(mesh, spec, shape, wanted):
    mesh = mesh_of(mesh)
    found = rules.spread(PartitionSpec(*spec), shape, mesh, "data", "w")
    assert found == wanted
    NamedSharding(mesh, found).shard_shape(shape)  # JAX takes it


def test_zero_refuses_a_large_array_that_it_cannot_cut():
    mesh = mesh_of("dp4")
    small, large = (127, 129), (129, 129)
    assert rules.spread(PartitionSpec(), small, mesh, "data", "w") == PartitionSpec()
    with pytest.raises(UserError, match=r"w \(129, 129\): no dim divides by dp4.*--optimizer.shard=none"):
        rules.spread(PartitionSpec(), large, mesh, "data", "w")


@st.composite
def meshes(draw) -> str:
    left, sizes = 8, {}
    for axis in draw(st.permutations(["rep", "dp", "fsdp", "tp"])):
        sizes[axis] = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= left]))
        left //= sizes[axis]
    return ",".join(f"{axis}{size}" for axis, size in sizes.items())


SHAPES = [
    ModelConfig(layers=2, embed=64, heads=8, mlp=64, vocabulary=200),
    ModelConfig(layers=3, embed=64, heads=8, kv_heads=2, mlp=128, vocabulary=300, gated=True, norm="rms", tied=False),
    ModelConfig(layers=1, embed=32, heads=4, kv_heads=1, head_size=8, mlp=48, vocabulary=90, qk_norm="projection"),
]


@settings(max_examples=40)
@given(meshes(), st.sampled_from(SHAPES))
def test_every_parameter_a_rule_means_to_shard_is_sharded(text, config):
    """Each device holds exactly the fraction that the axes of a parameter's dims leave."""
    spec, model = parse(text), MODELS[config]
    layout = rules.layout(mesh_of(text), kv_heads=config.key_value_heads)
    leaves = jax.tree_util.tree_flatten_with_path(model.abstract)[0]
    dims = dict(jax.tree_util.tree_flatten_with_path(model.dims, is_leaf=lambda x: isinstance(x, tuple))[0])
    refused = []
    for path, leaf in leaves:
        try:
            sharding = layout.sharding(dims[path], leaf.shape, str(path))
        except UserError as error:
            refused.append(str(error))
            continue
        ways = 1
        if "embed" in dims[path]:
            ways *= spec.sizes["fsdp"]
        kept = (config.key_value_heads) % spec.sizes["tp"] != 0
        if {"heads", "mlp", "vocab"} & set(dims[path]) or ("kv_heads" in dims[path] and not kept):
            ways *= spec.sizes["tp"]
        assert math.prod(sharding.shard_shape(leaf.shape)) * ways == math.prod(leaf.shape)
        assert len(set(map(str, sharding.devices_indices_map(leaf.shape).values()))) == ways
    heads = config.heads % spec.sizes["tp"]
    assert bool(refused) == bool(heads), (text, refused)


MODELS = {config: build(config, None) for config in SHAPES}


def test_the_arrays_themselves_are_cut():
    layout = layout_of("fsdp4,tp2")
    x = jax.device_put(np.zeros((16, 8), np.float32), layout.sharding(("embed", "mlp"), (16, 8)))
    assert {shard.data.shape for shard in x.addressable_shards} == {(4, 4)}
    pinned = jax.jit(lambda y: layout.constrain(y * 2, "batch", "mlp"))(x)
    assert {shard.data.shape for shard in pinned.addressable_shards} == {(4, 4)}
    assert dataclasses.replace(layout, rules={**layout.rules, "mlp": ()}).spec(("mlp",)) == PartitionSpec(None)
