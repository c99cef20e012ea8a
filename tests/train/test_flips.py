"""Bits that flip: copies that differ are not saved, and what has no copy is found by doing the steps again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.errors import Diverged
from jaxlm.config.mesh_spec import parse
from jaxlm.metrics.jsonl import read
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import Assembly
from jaxlm.train.replay import Different, Replay, replay
from jaxlm.train.replicas import Replicas
from tests.train.flips import flipped
from tests.train.running import losses, train

ARRAY = "params.blocks.mlp.up.kernel"
KEYS = {"mesh": "dp4", "train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 0, "eval__every": 0}


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flips") / "whole"
    train(corpus, run, **KEYS)
    return run


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Flips the lowest bit of one weight on some devices after a step, the first `times` times that it is done."""
    compile_ = Assembly.compile

    def put(after: int, devices: slice, times: int = 1) -> None:
        left = [times]

        def compiled(self: Assembly, *arguments: Any) -> Callable[..., Any]:
            program = compile_(self, *arguments)

            def step(state: Any, batch: Any) -> Any:
                new, metrics = program(state, batch)
                if int(new["step"]) == after and left[0]:
                    left[0] -= 1
                    up = new["params"]["blocks"]["mlp"]["up"]
                    up["kernel"] = flipped(up["kernel"], jax.devices()[devices], at=5, bit=0)
                return new, metrics

            return step

        monkeypatch.setattr(Assembly, "compile", compiled)

    return put


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read(run / "events.jsonl") if event.get("kind") == kind]


def test_one_replica_is_named_and_the_steps_done_again(corpus: Path, whole: Path, tmp_path: Path, faulty) -> None:
    faulty(3, slice(2, 3))
    train(corpus, tmp_path, **KEYS)
    (found,), (redo,) = events(tmp_path, "replicas differ"), events(tmp_path, "redo")
    assert (found["step"], found["arrays"][0]) == (4, f"{ARRAY} on device 2 of process 0")
    assert (redo["step"], redo["to"]) == (4, 2)
    assert losses(tmp_path) == losses(whole) and list(losses(whole)) == list(range(1, 7))
    replay(Replay(run=str(tmp_path), step=6))


def test_before_the_first_checkpoint_and_at_the_last_step(corpus: Path, whole: Path, tmp_path: Path, faulty) -> None:
    faulty(6, slice(0, 1))
    train(corpus, tmp_path, **(KEYS | {"checkpoint__every": 0}))
    assert [event["to"] for event in events(tmp_path, "redo")] == [0]
    assert losses(tmp_path) == losses(whole)


def test_a_device_that_stays_faulty_ends_the_run(corpus: Path, tmp_path: Path, faulty) -> None:
    faulty(5, slice(1, 2), times=9)
    with pytest.raises(Diverged, match="went back 2 times .*same command continues from checkpoint 4") as raised:
        train(corpus, tmp_path, **KEYS)
    assert f"{ARRAY} on device 1 of process 0" in str(raised.value) and "\n" not in str(raised.value)
    assert sorted(path.parent.name for path in tmp_path.glob("checkpoints/*/manifest.json")) == ["2", "4"]


def test_all_copies_are_found_by_replay_alone(corpus: Path, tmp_path: Path, faulty, monkeypatch) -> None:
    faulty(3, slice(0, 4))
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


def test_what_has_no_copy_is_not_compared() -> None:
    mesh = meshes.from_devices(parse("fsdp8"), jax.devices())
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    array = jax.device_put(jnp.arange(16.0), sharding)
    replicas = Replicas({"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)})
    assert replicas.differing({"w": flipped(array, jax.devices()[:1], 0, 0)}) == []
