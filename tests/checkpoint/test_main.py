"""The command that looks at checkpoints."""

import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxlm.checkpoint.__main__ import main
from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import NoValidCheckpoint, UserError


@pytest.fixture
def run_folder(tmp_path):
    with closing(Store(tmp_path / "run" / "checkpoints")) as store:
        for step in (10, 20):
            store.save(
                step,
                {"w": jnp.ones((8, 4)), "b": jnp.bfloat16([1.0])},
                {"position": step, "mesh": "dp4,tp2", "config": "a: 1\nb:\n  c: 2\n"},
            )
    return tmp_path / "run"


def damage(run_folder, step):
    path = next((run_folder / "checkpoints" / str(step)).rglob("manifest.ocdbt"))
    path.write_bytes(path.read_bytes()[:-1])


def test_list(run_folder, capsys):
    (run_folder / "checkpoints" / "30").mkdir()
    assert main(["list", str(run_folder)]) == 0
    header, first, second, last = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["step", "saved"] and first.split()[0] == "10" and second.split()[0] == "20"
    assert "dp4,tp2" in first and last.endswith("30")


def test_show(run_folder, capsys):
    assert main(["show", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert "config:\n  a: 1\n  b:\n    c: 2\n" in out
    assert "step: 20" in out and "mesh: dp4,tp2" in out and "jax: " in out
    assert ["w", "float32", "[8,", "4]", "32"] in [line.split() for line in out.splitlines()]
    main(["show", str(run_folder), "--step=10"])
    assert "step: 10" in capsys.readouterr().out


def test_verify(run_folder, capsys):
    assert main(["verify", str(run_folder)]) == 0
    damage(run_folder, 20)
    assert main(["verify", str(run_folder)]) == 0  # one is valid
    assert "checkpoint 20: damaged: arrays" in capsys.readouterr().out
    assert main(["verify", str(run_folder), "--step=20"]) == 4
    damage(run_folder, 10)
    assert main(["verify", str(run_folder)]) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["list"], UserError, "name the run folder"),
        (["lst", "x"], UserError, "no verb 'lst'"),
        (["list", "/no/such/run"], UserError, "no run folder /no/such/run"),
        (["verify", "RUN", "--step=5"], NoValidCheckpoint, "no checkpoint 5 .* there are: 10 20"),
        (["show", "RUN", "--stp=5"], UserError, "nearest is --step"),
    ],
)
def test_mistakes(run_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        main([str(run_folder) if word == "RUN" else word for word in arguments])


def test_a_run_without_checkpoints(tmp_path):
    with pytest.raises(NoValidCheckpoint, match="no checkpoint in"):
        main(["verify", str(tmp_path)])


def test_a_process_of_its_own_without_jax(run_folder):
    shutil.rmtree(run_folder / "checkpoints" / "10")
    damage(run_folder, 20)
    command = [sys.executable, "-X", "importtime", "-m", "jaxlm.checkpoint", "verify", str(run_folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 4 and "damaged" in result.stdout and "Traceback" not in result.stderr
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "jaxlm.checkpoint.manifest" in imported and not imported & {"jax", "orbax.checkpoint", "numpy"}


def test_diff_of_two_checkpoints(run_folder, capsys):
    assert main(["diff", str(run_folder)]) == 1
    out = capsys.readouterr().out
    assert "position: 20 and 10" in out and "bitwise the same" in out and "saved_at" not in out
    assert main(["diff", str(run_folder), "--other-step=20"]) == 0


def test_diff_of_two_runs(run_folder, tmp_path, capsys):
    changed = jnp.ones((8, 4)).at[3, 2].set(1.5)
    with closing(Store(tmp_path / "other" / "checkpoints")) as store:
        store.save(
            7, {"w": changed, "c": jnp.zeros(3)}, {"position": 20, "mesh": "dp8", "config": "a: 1\nb:\n  c: 3\n"}
        )
    assert main(["diff", str(run_folder), f"--other={tmp_path / 'other'}"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {"config.b.c: 2 and 3", "mesh: dp4,tp2 and dp8", "leaf b: bfloat16[1] and None"} <= set(lines)
    assert "leaf c: None and float32[3]" in lines and not [line for line in lines if "position" in line]
    assert lines[-1].split() == ["w", "1", "32", "5.00e-01", "8.84e-02"]


def test_diff_names_what_is_missing(run_folder):
    with pytest.raises(UserError, match="no checkpoint before 10 .*--other-step"):
        main(["diff", str(run_folder), "--step=10"])
    with pytest.raises(UserError, match="no run folder"):
        main(["diff", str(run_folder), "--other=nowhere"])
    with pytest.raises(NoValidCheckpoint, match=r"no checkpoint 5 .*there are: 10 20 \(--other-step\)"):
        main(["diff", str(run_folder), "--other-step=5"])
