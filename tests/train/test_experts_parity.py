"""Mixtures of experts train alike on every mesh: the parity battery with experts dealt out over devices."""

import pytest

from tests.spread import every_third, spread
from tests.train.battery import compare, configuration, measure, on_one_device

MESHES = {
    ("moe", "ep8"): {},
    ("moe", "ep2,tp2,dp2"): {"train__microbatches": 2, "remat": "full"},
    ("moe_shared", "fsdp2,ep4"): {"remat": "selective"},
    ("moe_capped", "ep2,tp2"): {},
    ("moe_shared", "pp2,ep2,cp2"): {},
}
"""Styles and meshes of the default suite, each with other ways to cut the same computation."""

MORE = {
    ("moe", "ep2"): {},
    ("moe", "ep4"): {"train__microbatches": 4},
    ("moe", "dp2,ep2"): {"optimizer__shard": "data"},
    ("moe", "ep2,tp2"): {"remat": "dots"},
    ("moe", "fsdp2,ep2"): {},
    ("moe", "fsdp2,ep2,tp2"): {"train__microbatches": 2},
    ("moe", "tp4"): {},
    ("moe", "rep2,ep4"): {},
    ("moe_shared", "ep8"): {"train__microbatches": 2},
    ("moe_shared", "ep2,tp2,dp2"): {"optimizer__shard": "data"},
    ("moe_shared", "ep4,tp2"): {},
    ("moe_shared", "dp2,fsdp2,tp2"): {},
    ("moe", "pp2,ep2,tp2"): {"pipeline__schedule": "zb"},
    ("moe", "cp2,ep2,tp2"): {},
    ("moe_shared", "pp2,fsdp2,ep2"): {"remat": "full"},
    ("moe_capped", "pp2,ep2,dp2"): {},
    ("moe_capped", "ep4,dp2"): {"train__microbatches": 2},
    ("moe_capped", "fsdp2,ep2,tp2"): {"remat": "full"},
}
"""A third of them of the slow suite; the battery (`make parity`) has them all."""


@pytest.mark.parametrize(("style", "mesh"), MESHES)
def test_mesh_equals_one_device(style: str, mesh: str) -> None:
    config = configuration(style, **MESHES[style, mesh])
    compare(measure(config, mesh), on_one_device(configuration(style))).check()


@pytest.mark.parametrize(("style", "mesh"), every_third(MORE))
def test_more_meshes_equal_one_device(style: str, mesh: str) -> None:
    config = configuration(style, **MORE[style, mesh])
    compare(measure(config, mesh), on_one_device(configuration(style))).check()


@pytest.mark.parametrize(
    ("optimizer", "run"),
    spread(["adafactor", "muon", "sgd"], [("moe", "ep2,tp2,dp2"), ("moe_shared", "fsdp2,ep4")], together=1),
)
def test_every_optimizer_equals_one_device(optimizer: str, run: tuple[str, str]) -> None:
    """Lion is left out: its update is a sign, and among half a million elements of experts there are some whose
    momentum is within rounding of zero. One of them alone is more than 1e-5 of its kernel."""
    style, mesh = run
    config = configuration(style, optimizer, **MESHES[run])
    compare(measure(config, mesh), on_one_device(configuration(style, optimizer))).check()
