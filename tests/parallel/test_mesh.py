"""From a mesh spec to devices: simulated in a process of its own, or joined from several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxlm.config.mesh_spec import AXES, parse
from jaxlm.parallel import mesh as meshes
from tests.processes import free_port

BUILD = """
import json, sys
from jaxlm.config.mesh_spec import parse
from jaxlm.parallel import mesh as meshes

said = []
try:
    mesh, spec = meshes.build(parse(sys.argv[1]), simulate=sys.argv[2] == "simulate", announce=said.append)
    print(json.dumps({"spec": str(spec), "devices": mesh.size, "shape": dict(mesh.shape), "said": said}))
except ValueError as error:
    print(json.dumps({"error": str(error)}))
"""

RANK = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import parse
from jaxlm.parallel import mesh as meshes

said = []
mesh, spec = meshes.build(parse("dp-1,tp2"), distributed=True, announce=said.append)
assert not said, said
placed = jax.make_array_from_callback(
    (4,), jax.NamedSharding(mesh, jax.P(("data", "model"))), lambda index: np.arange(1.0, 5.0, dtype=np.float32)[index]
)
total = jax.jit(
    jax.shard_map(
        lambda x: (jax.lax.psum(x, "data"), jax.lax.psum(x, "model")),
        mesh=mesh, in_specs=jax.P(("data", "model")), out_specs=(jax.P("model"), jax.P("data")),
    ),
    out_shardings=jax.NamedSharding(mesh, jax.P()),
)(placed)
print("mesh", spec, dict(mesh.shape)["data"], [float(x) for part in total for x in part])
meshes._join_processes = lambda: None
for wrong in ("dp2", "dp2,tp4"):
    try:
        meshes.build(parse(wrong), distributed=True)
    except UserError as error:
        print("refused:", error)
"""

ROOT = Path(__file__).parents[2]


def python(program: str, *arguments: str, **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


CASES = {
    "dp4,tp2": ("simulate", {}),
    "dp-1": ("simulate", {}),
    "dp-1,tp2": ("simulate", {}),
    "fsdp2": ("simulate", {"JAX_NUM_CPU_DEVICES": "8"}),
    "rep-1,fsdp2": ("simulate", {"XLA_FLAGS": "--xla_force_host_platform_device_count=6"}),
    "tp4": ("simulate", {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}),
    "dp2,tp2": ("refuse", {}),
    "dp3": ("refuse", {"JAX_NUM_CPU_DEVICES": "4"}),
}


@pytest.fixture(scope="module")
def built() -> dict[str, dict]:
    """What each case of `CASES` printed; they run side by side."""

    running = {mesh: python(BUILD, mesh, how, **environment) for mesh, (how, environment) in CASES.items()}
    return {mesh: json.loads(output(process)) for mesh, process in running.items()}


@pytest.mark.parametrize(
    "asked, resolved, devices",
    [
        ("dp4,tp2", "dp4,tp2", 8),
        ("dp-1", "dp1", 1),
        ("dp-1,tp2", "tp2", 2),
        ("fsdp2", "fsdp2", 2),
        ("rep-1,fsdp2", "rep3,fsdp2", 6),
    ],
)
def test_a_cpu_host_simulates_the_devices_asked_for(built, asked, resolved, devices):
    found = built[asked]
    assert (found["spec"], found["devices"]) == (resolved, devices)
    assert list(found["shape"]) == list(AXES.values())
    assert {a: n for a, n in found["shape"].items() if n > 1} == {
        AXES[a]: n for a, n in parse(resolved).sizes.items() if n > 1
    }
    if devices > 1:
        assert len(found["said"]) == 1 and f"simulating {devices} devices" in found["said"][0]
    else:
        assert not found["said"]


@pytest.mark.parametrize(
    "asked, parts",
    [
        ("tp4", ["tp 4 = 4 is not the 2 devices", "use tp2"]),
        ("dp2,tp2", ["dp 2 x tp 2 = 4 is not the 1 devices", "use dp1"]),
        ("dp3", ["dp 3 = 3 is not the 4 devices", "use dp4"]),
    ],
)
def test_a_mesh_that_does_not_fit_shows_the_arithmetic(built, asked, parts):
    message = built[asked]["error"]
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_inner_axes_are_neighbours():
    mesh = meshes.from_devices(parse("rep2,dp2,tp2"), jax.devices())
    ids = [[[d.id for d in row] for row in plane] for plane in mesh.devices.reshape(2, 2, 2)]
    assert ids == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def test_no_other_processes_is_one_line():
    message = output(
        python(
            "import sys\nfrom jaxlm.config.mesh_spec import parse\nfrom jaxlm.parallel import mesh\n"
            "try:\n    mesh.build(parse('dp2'), distributed=True)\nexcept ValueError as e:\n    print(e)"
        )
    )
    assert message.count("\n") == 1
    assert "jax.distributed found no other processes" in message and "drop --distributed" in message


def test_two_processes_make_one_mesh():
    address = f"127.0.0.1:{free_port()}"
    ranks = [
        python(
            RANK,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(rank),
            JAX_NUM_CPU_DEVICES="2",
        )
        for rank in range(2)
    ]
    for out in map(output, ranks):
        refused = [line for line in out.splitlines() if line.startswith("refused")]
        assert "dp 2 = 2 is not the 4 devices" in refused[0]
        assert "dp 2 x tp 4 = 8 is not the 4 devices" in refused[1]
        # Over data 1 + 3 and 2 + 4, over model 1 + 2 and 3 + 4: the first process holds the devices of data 0.
        assert "mesh dp2,tp2 2 [4.0, 6.0, 3.0, 7.0]" in out
