"""Every mesh computes what one device computes: loss, every gradient, the parameters after three steps."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.spread import spread
from tests.train.battery import compare, configuration, measure, on_one_device

MESHES = {
    "dp8": {},
    "fsdp8": {},
    "tp2": {},
    "dp4,tp2": {},
    "dp2,fsdp2,tp2": {"train__microbatches": 2, "remat": "full"},
    "rep2,dp2,tp2": {"optimizer__shard": "data", "remat": "selective"},
    "dp4": {"optimizer__shard": "data", "train__microbatches": 4},
    "fsdp2,tp4": {"remat": "dots"},
    "pp2,dp2,tp2": {"remat": "selective"},
    "pp2,fsdp2,tp2": {"optimizer__shard": "data"},
}
"""Meshes of the default suite, each with other ways to cut the same computation."""

MORE = {
    "dp2": {"train__microbatches": 8},
    "fsdp2": {"train__microbatches": 2, "train__loss_chunk": 100},
    "tp4": {"train__loss_chunk": 60},
    "tp2,dp2": {"optimizer__shard": "data"},
    "rep2,fsdp4": {"remat": "full"},
    "rep2,fsdp2,tp2": {"optimizer__shard": "none"},
    "rep8": {},
    "rep2,dp4": {"optimizer__shard": "data"},
    "dp4,fsdp2": {"optimizer__shard": "data", "remat": "dots"},
    "dp2,tp4": {"train__microbatches": 2, "optimizer__shard": "data", "remat": "selective"},
    "fsdp4,tp2": {"train__microbatches": 4},
    "rep2,dp2,fsdp2": {"train__microbatches": 2},
    "pp2": {"pipeline__schedule": "gpipe"},
    "pp2,dp4": {"pipeline__schedule": "zb", "optimizer__shard": "data"},
    "pp2,tp4": {"remat": "full"},
}
"""Meshes of the slow suite."""


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("mesh", MESHES)
def test_mesh_equals_one_device(mesh: str, style: str) -> None:
    config = configuration(style, **MESHES[mesh])
    compare(measure(config, mesh), on_one_device(configuration(style))).check()


@pytest.mark.parametrize(("style", "mesh"), [("gpt", "dp4,tp2"), ("llama", "dp2,fsdp2,tp2")])
def test_adafactor_equals_one_device(mesh: str, style: str) -> None:
    config = configuration(style, "adafactor", **MESHES[mesh])
    compare(measure(config, mesh), on_one_device(configuration(style, "adafactor"))).check()


@pytest.mark.parametrize("mesh", ["dp2,cp2,tp2", pytest.param("pp2,dp2,cp2", marks=pytest.mark.slow)])
def test_dropout_takes_the_same_elements(mesh: str) -> None:
    dropped = configuration("gpt", model__dropout=0.3)
    assert abs(on_one_device(dropped).losses[0] / on_one_device(configuration("gpt")).losses[0] - 1) > 1e-3
    compare(measure(dropped, mesh), on_one_device(dropped)).check()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp2,tp2", "rep2,dp2", "pp2,tp2"])
def test_dropout_takes_the_same_elements_in_microbatches(mesh: str) -> None:
    how = "train__microbatches" if "pp" not in mesh else "pipeline__microbatches"
    dropped = configuration("gpt", model__dropout=0.3, **{how: 4})
    compare(measure(dropped, mesh), on_one_device(configuration("gpt", model__dropout=0.3))).check()


@pytest.mark.parametrize(("mesh", "style"), spread(MORE, ("gpt", "llama"), together=1))
def test_more_meshes_equal_one_device(mesh: str, style: str) -> None:
    config = configuration(style, **MORE[mesh])
    wanted = on_one_device(configuration(style))
    compare(measure(config, mesh), wanted).check()


@pytest.mark.parametrize(
    ("mesh", "optimizer", "style"),
    spread(
        ["dp8", "fsdp8", "tp2", "dp4,tp2", "dp2,fsdp2,tp2", "rep2,dp2,tp2"],
        ["adafactor", "lion", "muon", "sgd"],
        ["gpt", "llama"],
        together=1,
    ),
)
def test_every_optimizer_equals_one_device(mesh: str, optimizer: str, style: str) -> None:
    config = configuration(style, optimizer, **MESHES[mesh])
    compare(measure(config, mesh), on_one_device(configuration(style, optimizer))).check()


@st.composite
def runs(draw: st.DrawFn) -> tuple[str, dict]:
    """A mesh of up to 8 devices and a model and batch that it divides."""
    left, sizes = 8, {}
    for axis in draw(st.permutations(["rep", "dp", "fsdp", "tp"])):
        sizes[axis] = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= left]))
        left //= sizes[axis]
    tp, rows = sizes["tp"], sizes["rep"] * sizes["dp"] * sizes["fsdp"]
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    heads = math.lcm(kv_heads, tp) * draw(st.sampled_from([1, 2]))
    microbatches = draw(st.sampled_from([1, 2]))
    # No configuration is made in here: beartype looks at items of its tuples by chance, and drawing must not.
    model = {
        "layers": draw(st.integers(1, 3)),
        "heads": heads,
        "kv_heads": kv_heads if kv_heads % tp == 0 or tp % kv_heads == 0 else heads,
        "head_size": 8 * draw(st.integers(1, 2)),
        "embed": 8 * draw(st.integers(2, 5)),
        "mlp": 8 * draw(st.integers(1, 6)),
        "windows": draw(st.sampled_from([(), (5,), (0, 7)])),
    }
    mesh = ",".join(f"{axis}{size}" for axis, size in sizes.items())
    return mesh, {
        "style": draw(st.sampled_from(["gpt", "llama"])),
        **{f"model__{name}": value for name, value in model.items()},
        "data__batch_size": rows * microbatches * draw(st.integers(1, 2)),
        "data__sequence_length": draw(st.sampled_from([6, 16, 24])),
        "train__microbatches": microbatches,
        "train__z_loss": draw(st.sampled_from([0.0, 1e-3])),
        "train__label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "train__loss_chunk": draw(st.sampled_from([0, 96])),
        "remat": draw(st.sampled_from(["none", "full", "dots", "selective"])),
        "optimizer__shard": draw(st.sampled_from(["none", "data"])),
    }


def check_drawn(run: tuple[str, dict]) -> None:
    mesh, keys = run
    config = configuration(**keys)
    compare(measure(config, mesh), on_one_device(config)).check()


@settings(max_examples=3)
@given(runs())
def test_drawn_meshes_and_shapes_equal_one_device(run: tuple[str, dict]) -> None:
    check_drawn(run)


@pytest.mark.slow
@settings(max_examples=6)
@given(runs())
def test_many_drawn_meshes_and_shapes_equal_one_device(run: tuple[str, dict]) -> None:
    check_drawn(run)
