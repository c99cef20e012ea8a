"""Bits that flip: copies that differ are not saved, and what has no copy is found by doing the steps again."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.errors import Diverged, Preempted
from jaxlm.config.mesh_spec import parse
from jaxlm.metrics.jsonl import read
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import Assembly
from jaxlm.train.faults import StopRequest
from jaxlm.train.replay import Different, Replay, replay
from jaxlm.train.replicas import PIECE, Replicas, at_once, by_pieces
from tests.processes import two_ranks
from tests.train.flips import BITS, OUTCOMES, PAGE, RESULTS, TARGETS, Study, faulty, flipped, render
from tests.train.running import losses, train

ARRAY = "params.blocks.mlp.up.kernel"
KEYS = {"mesh": "dp4", "train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 0}
KEYS |= {"eval__every": 0, "eval__sample_tokens": 0}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flips") / "whole"
    train(corpus, run, **KEYS)
    return run


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run / "events.jsonl") if event.get("kind") == kind]


def test_one_replica_is_named_and_the_steps_done_again(corpus: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Assembly, "compile", faulty(Assembly.compile, 3, slice(2, 3)))
    train(corpus, tmp_path, **KEYS)
    (found,), (redo,) = events(tmp_path, "replicas differ"), events(tmp_path, "redo")
    assert (found["step"], found["arrays"][0]) == (4, f"{ARRAY} on device 2 of process 0")
    assert (redo["step"], redo["to"]) == (4, 2)
    assert losses(tmp_path) == losses(whole) and list(losses(whole)) == list(range(1, 7))
    replay(Replay(run=str(tmp_path), step=6))


def test_before_the_first_checkpoint_and_at_the_last_step(
    corpus: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(Assembly, "compile", faulty(Assembly.compile, 6, slice(0, 1)))
    train(corpus, tmp_path, **(KEYS | {"checkpoint__every": 0}))
    assert [event["to"] for event in events(tmp_path, "redo")] == [0]
    assert losses(tmp_path) == losses(whole)


def test_a_device_that_stays_faulty_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Assembly, "compile", faulty(Assembly.compile, 5, slice(1, 2), times=9))
    with pytest.raises(Diverged, match="went back 2 times .*same command continues from checkpoint 4") as raised:
        train(corpus, tmp_path, **KEYS)
    assert f"{ARRAY} on device 1 of process 0" in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(path.parent.name for path in tmp_path.glob("checkpoints/*/manifest.json")) == ["2", "4"]


def test_a_stop_saves_nothing_that_differs(corpus: Path, whole: Path, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as changed:
        changed.setattr(Assembly, "compile", faulty(Assembly.compile, 3, slice(1, 2)))
        changed.setattr(StopRequest, "due", lambda stop, step: step == 3)
        with pytest.raises(Preempted, match=f"after step 3 .*{ARRAY} on device 1 .*nothing was saved; the same"):
            train(corpus, tmp_path, **KEYS)
    train(corpus, tmp_path, **KEYS)
    assert [event["step"] for event in read(tmp_path / "events.jsonl") if event["event"] == "resume"] == [2]
    assert losses(tmp_path) == losses(whole)


def test_all_copies_are_found_by_replay_alone(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(Assembly, "compile", faulty(Assembly.compile, 3, slice(0, 4)))
    train(corpus, tmp_path, **KEYS)
    assert not events(tmp_path, "replicas differ")
    monkeypatch.undo()
    with pytest.raises(Different, match="step 4 grad_norm|checkpoint 4"):
        replay(Replay(run=str(tmp_path), step=4))
    replay(Replay(run=str(tmp_path), step=6))  # which begins with what is wrong, and cannot see it


@pytest.mark.parametrize(("spec", "slices"), [((), 1), (("data",), 2), (("data", "fsdp"), 4), ((None, "model"), 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_bit_on_every_device_counts(spec: tuple[str | None, ...], slices: int, dtype: str) -> None:
    """Any one bit of any one device is found where there is a copy of it, and named where there are three."""
    mesh = meshes.from_devices(parse("dp2,fsdp2,tp2"), jax.devices())
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    array = jax.device_put(jnp.arange(-24, 24).reshape(8, 6).astype(dtype), sharding)
    replicas = Replicas({"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)})
    assert replicas.differing({"w": array}) == []
    part = array.addressable_shards[0].data.size
    copies = 8 // slices
    for number, device in enumerate(jax.devices()):
        for bit in (0, 6, 7, array.dtype.itemsize * 8 - 1):
            (difference,) = replicas.differing({"w": flipped(array, [device], number % part, bit)})
            assert difference.array == "w" and device in difference.devices
            assert len(difference.devices) == (1 if copies > 2 else 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (7,), (3, PIECE), (5, 7, 999), (2 * PIECE + 1,)])
def test_a_checksum_in_pieces_is_the_checksum(shape: tuple[int, ...], dtype: str) -> None:
    array = (1000 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    assert int(jax.jit(by_pieces)(array)) == int(jax.jit(at_once)(array)) != 0


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.1), ("bfloat16", 1.1)])
def test_the_memory_of_a_checksum(dtype: str, most: float) -> None:
    """None for a copy of float32."""
    array = jax.ShapeDtypeStruct((2**21 + 3,), dtype)
    kept = [jax.jit(run).lower(array).compile().memory_analysis() for run in (by_pieces, at_once)]
    sizes = [memory.temp_size_in_bytes / (array.size * array.dtype.itemsize) for memory in kept]
    assert sizes[0] < most < sizes[1], sizes


def test_what_has_no_copy_is_not_compared() -> None:
    mesh = meshes.from_devices(parse("fsdp8"), jax.devices())
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = jax.device_put(jnp.arange(16.0), sharding)
    replicas = Replicas({"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)})
    assert replicas.differing({"w": flipped(array, jax.devices()[:1], 0, 0)}) == []


TRAIN = """
import os, sys
rank, port, corpus, run = sys.argv[1:]
os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": rank,
               "JAX_NUM_CPU_DEVICES": "1", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
from pathlib import Path
from jaxlm.train.assemble import Assembly
from tests.train.flips import faulty
from tests.train.running import train
Assembly.compile = faulty(Assembly.compile, 3, slice(1, 2))
train(Path(corpus), Path(run), mesh="dp2", distributed="true", train__steps=6, checkpoint__every=2)
"""


@pytest.mark.slow
def test_processes_go_back_together(corpus: Path, tmp_path: Path) -> None:
    two_ranks(TRAIN, str(corpus), str(tmp_path))
    (found,), (redo,) = events(tmp_path, "replicas differ"), events(tmp_path, "redo")
    (line,) = found["arrays"]
    assert line.startswith(f"{ARRAY} on devices 0 of process 0, ") and line.endswith(" of process 1")
    assert (redo["step"], redo["to"]) == (4, 2)
    assert list(losses(tmp_path)) == list(range(1, 7))
    assert [line["step"] for line in read(tmp_path / "metrics.superseded.jsonl")] == [3, 4]


RANK = """
import sys
import jax, jax.numpy as jnp
from jaxlm.config.mesh_spec import parse
from jaxlm.train.replicas import Replicas
from jaxlm.parallel import mesh as meshes
from tests.train.flips import flipped

rank, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
sharding = jax.NamedSharding(meshes.from_devices(parse("dp4"), jax.devices()), jax.P())
state = {"w": jax.jit(lambda: jnp.arange(6.0), out_shardings=sharding)()}
replicas = Replicas({"w": jax.ShapeDtypeStruct((6,), "float32", sharding=sharding)})
assert replicas.differing(state) == []
print(*replicas.differing({"w": flipped(state["w"], jax.devices()[3:], 5, 0)}))
"""


@pytest.mark.slow
def test_all_processes_see_it() -> None:
    for out in two_ranks(RANK):
        assert out.splitlines()[-1].startswith("w on device") and out.splitlines()[-1].endswith(" of process 1")


@pytest.mark.slow
def test_a_sample_of_the_study() -> None:
    study = Study("dp2,fsdp2")
    first = {target: {name for row in study.rows(target, 2, seed=1) for name in row["first"]} for target in TARGETS}
    assert all("missed" not in found for found in first.values())
    for target, found in first.items():
        assert ("checksum" in found) == (target.endswith("one copy") or target.startswith("gradients, after")), target
        assert ("replay" in found) == (target.endswith("all copies") or target.startswith("gradients, before")), target


def test_the_tables_are_those_of_the_results() -> None:
    results = json.loads(RESULTS.read_text())
    page = PAGE.read_text(encoding="utf-8")
    assert render(page, results) == page
    flips = {(row["mesh"], row["target"], row["bit"]): sum(row["first"].values()) for row in results["rows"]}
    assert set(flips.values()) == {results["flips_of_each"]}
    assert {bit for _, _, bit in flips} == set(BITS) and {target for _, target, _ in flips} == set(TARGETS)
    assert set().union(*(row["first"] for row in results["rows"])) <= set(OUTCOMES) - {"missed"}
    # What the page says of them.
    for row in results["rows"]:
        compared = row["target"].endswith("one copy") or "after their sum" in row["target"]
        assert "checksum" not in row["all"] or (compared and row["mesh"] != "dp4 zero"), row
        assert "watch" not in row["all"] or row["bit"] in ("sign", "high exponent"), row
        if row["target"].endswith("one copy") and row["mesh"] != "dp4 zero":
            assert "replay" not in row["first"], row
