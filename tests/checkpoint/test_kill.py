"""kill -9 in the middle of a save: the step before is what counts, and the same step can be saved afterwards."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm.checkpoint.store import Store

SAVER = """
import os, signal, sys
import jax.numpy as jnp
from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import Store

folder, point = sys.argv[1:]
state = {"x": jnp.arange(2.0**18), "y": jnp.ones((3,))}
store = Store(folder, keep=1)
store.save(1, state, {"position": 16})
store.wait()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if point == "while arrays are written":
    store.save(2, state, {"position": 32})
    while not any("tmp" in name for _, names, _ in os.walk(folder) for name in names):
        pass
    die()
if point == "before the manifest":
    manifest.commit = die
if point == "inside the manifest":
    manifest.Path.replace = lambda path, _: die() if path.name.startswith("manifest") else path.rename(_)
if point == "after the manifest":
    manifest.delete = die
if point == "inside retention":
    manifest.shutil.rmtree = die
store.save(2, state, {"position": 32})
store.wait()
"""


@pytest.mark.parametrize(
    ("point", "survivor"),
    [
        ("while arrays are written", 1),
        ("before the manifest", 1),
        ("inside the manifest", 1),
        ("after the manifest", 2),
        ("inside retention", 2),
    ],
)
def test_kill(tmp_path, point, survivor):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SAVER, str(tmp_path), point]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    wanted = {"x": jax.ShapeDtypeStruct((2**18,), jnp.float32), "y": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with closing(Store(tmp_path, keep=1)) as store:
        assert store.latest_valid(lambda _: None) == survivor
        assert store.meta(survivor)["position"] == 16 * survivor
        assert store.restore(survivor, wanted)["x"].tolist() == list(range(2**18))
        state = {"x": jnp.arange(2.0**18) + 1, "y": jnp.ones((3,))}
        store.save(2, state, {"position": 32})
        store.wait()
        assert store.latest_valid(pytest.fail) == 2
        assert store.restore(2, wanted)["x"][0] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert len(list((tmp_path / "2").iterdir())) == 2  # the manifest and one save
