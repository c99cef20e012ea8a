"""Saving and restoring: bitwise, onto any mesh, without disturbing training, and never a wrong step."""

import errno
import json
import os
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint import store as stores
from jaxlm.checkpoint.store import SaveFailed, Store
from jaxlm.config.errors import UserError


def mesh(**sizes):
    devices = np.asarray(jax.devices()[: int(np.prod(list(sizes.values())))]).reshape(tuple(sizes.values()))
    return jax.sharding.Mesh(devices, tuple(sizes))


def put(array, mesh_, *spec):
    return jax.device_put(array, jax.NamedSharding(mesh_, jax.P(*spec)))


def make_state(seed=0):
    """What a trainer saves: sharded and replicated arrays, an optax state, PRNG key data, an empty leaf."""
    draw = np.random.default_rng(seed).standard_normal
    here = mesh(data=4, model=2)
    blocks = {
        "up": put(draw((2, 8, 16)).astype(np.float32), here, None, "data", "model"),
        "half": put(jnp.asarray(draw((8, 8)), jnp.bfloat16), here, "model", None),
        "scale": put(np.full((8,), np.nan, np.float32), here),
    }
    params = {"blocks": blocks, "list": [jnp.int8([1, -2]), jnp.zeros((0, 4))]}
    return {
        "params": params,
        "optimizer": jax.jit(optax.adamw(1e-3).init)(blocks),
        "step": jnp.uint32(7 + seed),
        "key": jax.random.key_data(jax.random.key(seed)),
        "mask": jnp.array([True, False]),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


@pytest.fixture
def store(tmp_path):
    with closing(Store(tmp_path / "checkpoints")) as opened:
        yield opened


def save(store, step, state=None, **meta):
    store.save(step, {"x": jnp.arange(8.0) + step} if state is None else state, meta)
    assert store.wait() == step


def test_round_trip_is_bitwise(store):
    state = make_state()
    save(store, 3, state, position=48, config={"a": [1, 2.5]}, mesh="dp4,tp2")
    restored = store.restore(3, abstract(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    for new, old in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)
    meta = store.meta(3)
    assert (meta["position"], meta["config"], meta["mesh"]) == (48, {"a": [1, 2.5]}, "dp4,tp2")
    assert meta["versions"]["jax"] == jax.__version__ and meta["saved_at"].endswith("+00:00")
    assert {"python", "flax", "optax", "orbax-checkpoint", "jaxlm"} <= meta["versions"].keys()


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ({"data": 8}, (None, "data", None)),
        ({"fsdp": 2, "model": 2}, (None, "model", "fsdp")),
        ({"model": 8}, (None, None, "model")),
        ({"replica": 2, "data": 2, "model": 2}, ("replica", ("data", "model"), None)),
        ({"one": 1}, ()),
    ],
)
def test_restore_onto_another_mesh(store, sizes, spec):
    state = make_state()
    save(store, 1, state)
    wanted = abstract(state)
    there = jax.NamedSharding(mesh(**sizes), jax.P(*spec))
    everywhere = jax.NamedSharding(mesh(**sizes), jax.P())

    def move(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there if leaf.ndim == 3 else everywhere)

    restored = store.restore(1, jax.tree.map(move, wanted))
    assert bits(restored) == bits(state)
    assert restored["params"]["blocks"]["up"].sharding == there


def test_without_a_sharding_the_first_device_is_used(store):
    save(store, 1)
    restored = store.restore(1, {"x": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert restored["x"].devices() == {jax.devices()[0]}


def test_a_part_of_the_state(store):
    state = make_state()
    save(store, 1, state)
    wanted = {"params": abstract(state)["params"]}
    assert bits(store.restore(1, wanted, partial=True)) == bits(state["params"])
    with pytest.raises(UserError, match=r"has a leaf (optimizer|step|key|mask).*, which this run has not"):
        store.restore(1, wanted)


@pytest.mark.parametrize("shape", [(), (4,), (1024, 256)])
def test_buffers_may_be_donated_at_once(store, shape):
    sharding = jax.NamedSharding(mesh(data=8), jax.P("data") if shape == (1024, 256) else jax.P())

    def make():
        return {"sharded": jax.device_put(jnp.full(shape, 3.0), sharding), "one": jnp.full(shape, 4.0) + 1.0}

    before, state, control = bits(make()), make(), make()
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * -7.0 - 1.0, tree), donate_argnums=0)
    overwrite(control)
    assert all(leaf.is_deleted() for leaf in control.values())  # the function does donate
    store.save(1, state, {})
    for _ in range(5):
        state = overwrite(state)
    jax.block_until_ready(state)
    store.wait()
    assert bits(store.restore(1, abstract(state))) == before


def test_save_returns_before_the_step_counts(store, monkeypatch):
    from threading import Event

    gate = Event()
    commit = manifest.commit
    monkeypatch.setattr(manifest, "commit", lambda *a: gate.wait() and commit(*a))
    store.save(1, {"x": jnp.zeros(3)}, {})
    assert store.poll() is None and store.steps() == []
    gate.set()
    assert store.wait() == 1 and store.steps() == [1]
    assert store.poll() is None and store.wait() is None


@pytest.mark.parametrize(
    ("keep", "keep_every", "left"), [(2, 0, [5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (0, 0, [1, 2, 3, 4, 5, 6])]
)
def test_retention(tmp_path, keep, keep_every, left):
    with closing(Store(tmp_path, keep, keep_every)) as store:
        for step in range(1, 7):
            save(store, step)
        assert store.steps() == left
        assert sorted(int(path.name) for path in tmp_path.iterdir()) == left
        assert store.latest_valid(pytest.fail) == 6


def test_old_steps_go_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
    with closing(Store(tmp_path, keep=1)) as store:
        save(store, 1)
        delete, seen = manifest.delete, []
        monkeypatch.setattr(
            manifest, "delete", lambda folder, step: (seen.append((step, store.steps())), delete(folder, step))
        )
        save(store, 2)
        assert seen == [(1, [1, 2])] and store.steps() == [2]


def test_room_is_made_before_a_save(tmp_path, monkeypatch):
    with closing(Store(tmp_path, keep=3)) as store:
        for step in (1, 2, 3):
            save(store, step)
    (tmp_path / "4" / "save-1").mkdir(parents=True)  # what a kill left
    with closing(Store(tmp_path, keep=1)) as store:
        monkeypatch.setattr(manifest, "commit", fail)
        store.save(5, {"x": jnp.zeros(4)}, {})
        with pytest.raises(SaveFailed):
            store.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3"], "the newest that is kept stays"


def test_only_large_arrays_are_cut_between_the_devices_that_hold_copies(store, monkeypatch):
    """Each cut is a program, which a save would wait for."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    state = {"x": put(np.arange(40.0, dtype=np.float32), mesh(data=8))}
    save(store, 1, state)
    assert compiled == []
    monkeypatch.setattr(stores, "SHARE_BYTES", 4)
    save(store, 2, state)
    assert compiled
    assert bits(store.restore(1, abstract(state))) == bits(store.restore(2, abstract(state))) == bits(state)


def test_a_step_saved_anew_replaces_the_old_one_only_when_committed(tmp_path, monkeypatch):
    with closing(Store(tmp_path)) as store:
        save(store, 1, {"x": jnp.zeros(4)}, run="old")
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "commit", fail)
            store.save(1, {"x": jnp.ones(4)}, {"run": "new"})
            with pytest.raises(SaveFailed):
                store.wait()
        assert store.latest_valid(pytest.fail) == 1 and store.meta(1)["run"] == "old"
        save(store, 1, {"x": jnp.ones(4)}, run="new")
        assert store.latest_valid(pytest.fail) == 1 and store.meta(1)["run"] == "new"
        assert store.restore(1, {"x": jax.ShapeDtypeStruct((4,), jnp.float32)})["x"].tolist() == [1.0] * 4
        assert len(list((tmp_path / "1").glob("save-*"))) == 1


def test_the_wrong_model_is_refused_by_leaf(store):
    state = make_state()
    save(store, 1, state)
    wanted = abstract(state)

    def with_up(shape, dtype):
        blocks = {**wanted["params"]["blocks"], "up": jax.ShapeDtypeStruct(shape, dtype)}
        return {**wanted, "params": {**wanted["params"], "blocks": blocks}}

    shape = r"params\.blocks\.up is float32\[2, 8, 16\] in checkpoint 1 and float32\[2, 8, 32\] in this run; use"
    with pytest.raises(UserError, match=shape):
        store.restore(1, with_up((2, 8, 32), jnp.float32))
    with pytest.raises(UserError, match=r"params\.blocks\.up is float32.* and bfloat16.*"):
        store.restore(1, with_up((2, 8, 16), jnp.bfloat16))
    with pytest.raises(UserError, match=r"no leaf extra, which this run has"):
        store.restore(1, {**wanted, "extra": jax.ShapeDtypeStruct((1,), jnp.float32)})
    with pytest.raises(UserError, match=r"checkpoint 2 of .*; there are: 1"):
        store.restore(2, wanted)


def test_only_plain_arrays_are_saved(store):
    with pytest.raises(TypeError, match=r"leaf a\.0 is a ndarray"):
        store.save(1, {"a": [np.zeros(3)]}, {})
    with pytest.raises(TypeError, match="leaf k is a typed PRNG key"):
        store.save(1, {"k": jax.random.key(0)}, {})
    with pytest.raises(ValueError, match="two leaves have the same path"):
        store.save(1, {"a.b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}}, {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.save(1, {"a": jnp.zeros(1)}, {"x": float("nan")})
    assert store.steps() == [] and store.latest_valid(pytest.fail) is None


def fail(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("stage", [(manifest, "commit"), (stores, "write_atomically")], ids=["manifest", "meta"])
@pytest.mark.parametrize("notice", ["save", "poll", "wait", "close"])
def test_a_failed_save_is_reported_and_harms_nothing(store, monkeypatch, stage, notice):
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr(*stage, fail)
        store.save(2, {"x": jnp.zeros(8)}, {})
        store._pending[1].exception()
    act = {"save": lambda: store.save(3, {"x": jnp.zeros(8)}, {})}.get(notice, lambda: getattr(store, notice)())
    with pytest.raises(SaveFailed, match=r"checkpoint 2 .*No space left on device .*; checkpoints there: 1"):
        act()
    assert store.latest_valid(pytest.fail) == 1
    assert not (store.folder / "2").exists()  # its space is given back


def test_saves_work_after_a_failed_one(store, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "commit", fail)
        store.save(2, {"x": jnp.zeros(8)}, {})
        with pytest.raises(SaveFailed):
            store.wait()
    save(store, 2)
    assert store.latest_valid(pytest.fail) == 2


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with closing(Store(tmp_path / "checkpoints")) as store, pytest.raises(SaveFailed, match="saving checkpoint 1 in"):
        store.save(1, {"x": jnp.zeros(8)}, {})


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "commit", fail)
    with pytest.raises(KeyError), Store(tmp_path) as store:
        store.save(1, {"x": jnp.zeros(8)}, {})
        raise KeyError("mine")


def test_nothing_in_a_checkpoint_is_code(store):
    save(store, 1, make_state())
    for path in (store.folder / "1").rglob("*"):
        assert path.is_dir() or b"optax" not in path.read_bytes().replace(b'"optax": ', b"")
    json.loads((store.folder / "1" / "manifest.json").read_text())


def test_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="checkpoint.keep=-1"):
        Store(tmp_path, keep=-1)
    with pytest.raises(UserError, match="gs://bucket"):
        Store("gs://bucket/run")


def test_the_store_leaves_no_thread_or_file_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Store(tmp_path) as store:
            save(store, 1)
    assert len(os.listdir("/proc/self/fd")) <= before + 8
