import math

import pytest

from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import AXES, nearest, parse


def test_axes_stand_in_network_order():
    assert list(AXES) == ["rep", "pp", "dp", "fsdp", "ep", "cp", "tp"]
    assert list(parse("tp2,dp4").sizes) == list(AXES)


@pytest.mark.parametrize("text", ["dp4,tp2", "tp2,dp4", " dp4 , tp2 ", "rep1,dp4,tp2"])
def test_order_and_space_do_not_matter(text):
    assert str(parse(text)) == "dp4,tp2"
    assert parse(text) == parse("dp4,tp2")


@pytest.mark.parametrize(
    "text, devices, resolved",
    [
        ("dp-1", 8, "dp8"),
        ("dp-1,tp2", 8, "dp4,tp2"),
        ("fsdp-1", 1, "dp1"),
        ("dp2,fsdp2,tp2", 8, "dp2,fsdp2,tp2"),
        ("rep2,dp2,tp-1", 8, "rep2,dp2,tp2"),
    ],
)
def test_the_rest_of_the_devices(text, devices, resolved):
    assert str(parse(text).resolve(devices)) == resolved


@pytest.mark.parametrize(
    "text, parts",
    [
        ("dp3", ["dp 3 = 3", "8 devices", "use dp8"]),
        ("dp4,tp4", ["dp 4 x tp 4 = 16", "use dp2,tp4"]),
        ("dp3,tp2", ["= 6", "use dp4,tp2"]),
        ("dp-1,tp3", ["tp 3 = 3 does not divide", "use dp"]),
        ("tp16", ["use tp8"]),
        ("dp-1,tp16", ["does not divide"]),
    ],
)
def test_a_mesh_that_does_not_fit_names_one_that_does(text, parts):
    with pytest.raises(UserError) as caught:
        parse(text).resolve(8)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    advice = message.partition("use ")[2].partition(" (")[0]
    assert math.prod(parse(advice).resolve(8).sizes.values()) == 8


@pytest.mark.parametrize(
    "text, parts",
    [
        ("", ["dp4,tp2"]),
        ("dp", ["'dp' is not an axis and a size"]),
        ("4", ["'4' is not"]),
        ("dp4tp2", ["'dp4tp2' is not"]),
        ("dp4,", ["'' is not"]),
        ("dp2.5", ["'dp2.5' is not"]),
        ("xp4", ["no axis 'xp'", "nearest is"]),
        ("model4", ["nearest is 'tp'"]),
        ("dp2,dp4", ["'dp' stands twice"]),
        ("dp0", ["size 0 of 'dp'"]),
        ("dp-2", ["size -2 of 'dp'"]),
        ("dp-1,tp-1", ["two sizes are -1; give all but one a number"]),
        ("x" * 10_000 + "4", ["no axis"]),
        ("dp" + "9" * 10_000, ["is not an axis"]),
    ],
)
def test_mistakes(text, parts):
    with pytest.raises(UserError) as caught:
        parse(text)
    assert all(part in str(caught.value) for part in (*parts, "(--mesh)"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("devices", [1, 2, 6, 8, 12, 64, 96])
def test_nearest_keeps_the_axes_and_fits(devices):
    for text in ("dp4,tp2", "rep2,dp3,tp5", "fsdp7", "dp-1,tp3"):
        found = nearest(parse(text), devices)
        assert found.device_count == devices
        asked = {axis for axis, size in parse(text).sizes.items() if size != 1}
        assert {axis for axis, size in found.sizes.items() if size != 1} <= asked
