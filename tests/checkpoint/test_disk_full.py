"""A full disk: one line, no traceback, the old checkpoint intact, the space given back, later saves fine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.folders import write_model
from tests.checkpoint.shapes import config_json

SAVER = """
import sys
import jax
from jaxlm.checkpoint.store import SaveFailed, Store

store = Store(sys.argv[1], keep=1)
x = jax.random.normal(jax.random.key(0), (300_000,))
store.save(1, {"x": x}, {})
store.wait()
store.save(2, {"x": x, "y": x * 2, "z": x * 3}, {})
try:
    store.wait()
except SaveFailed as error:
    print("failed:", error)
print("valid:", store.latest_valid(print))
store.save(3, {"x": x}, {})
store.wait()
print("steps:", store.steps())
store.close()
"""


@pytest.fixture
def small_disk(tmp_path):
    """3 MiB of memory as a file system; only root can mount one."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk(small_disk):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SAVER, str(small_disk / "checkpoints")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    failed, valid, steps = result.stdout.splitlines()
    assert failed.startswith("failed: saving checkpoint 2") and "No space left on device (free some" in failed
    assert "os_error_code" not in failed and "ocdbt" not in failed  # TensorStore's words are not for people
    assert (valid, steps) == ("valid: 1", "steps: [3]")
    assert "Traceback" not in result.stderr


def test_full_disk_of_an_import(small_disk, tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("model"), config_json("llama", "grouped") | {"vocab_size": 20_000})
    command = [sys.executable, "-m", "jaxlm.checkpoint", "import", f"--from={folder}", f"--run={small_disk / 'run'}"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: no space left on the disk") and result.stderr.count("\n") == 1
    assert not list(small_disk.rglob("*.json"))  # the space is given back
