"""Whatever happens to the files of a checkpoint is noticed, and the run falls back to the newest step that is whole."""

import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import pytest

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import Store


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Steps 10, 20 and 30 of one small state."""
    folder = tmp_path_factory.mktemp("original") / "checkpoints"
    sharding = jax.NamedSharding(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4]), jax.P("data"))
    with closing(Store(folder, keep=0)) as store:
        for step in (10, 20, 30):
            state = {"w": jax.device_put(jnp.arange(64.0) + step, sharding), "b": jnp.full((3,), float(step))}
            store.save(step, state, {"position": step})
        store.wait()
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoints")


def files(folder, step=30):
    return sorted(path for path in (folder / str(step)).rglob("*") if path.is_file())


def choose(folder):
    lines = []
    with closing(Store(folder)) as store:
        return store.latest_valid(lines.append), lines


def test_an_undamaged_one_is_chosen_in_silence(folder):
    assert choose(folder) == (30, [])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def extend(path):
    path.write_bytes(path.read_bytes() + b"\n")


def link_away(path):
    elsewhere = path.parents[3] / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("harm", [flip, truncate, extend, link_away, lambda path: path.unlink()])
def test_damage_to_any_file_is_detected(original, tmp_path, harm):
    for number, victim in enumerate(files(original)):
        folder = shutil.copytree(original, tmp_path / str(number) / "checkpoints")
        path = folder / victim.relative_to(original)
        if not path.stat().st_size and harm in (flip, truncate):
            continue
        harm(path)
        chosen, lines = choose(folder)
        assert chosen == 20, path
        assert len(lines) == 2 and "continuing from it" in lines[1] and "checkpoint 20" in lines[1]
        expected = "checkpoint 30 is " + (
            "incomplete" if not path.exists() and path.name == "manifest.json" else "damaged"
        )
        assert lines[0].startswith(expected) and "\n" not in lines[0]
        if path.name != "manifest.json":
            assert path.name in lines[0]


def test_every_byte_of_the_manifest_counts(folder):
    path = folder / "30" / "manifest.json"
    text = path.read_bytes()
    for position in range(0, len(text), 3):
        path.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        with pytest.raises(manifest.Damaged):
            manifest.verify(folder, 30)
    path.write_bytes(text)
    manifest.verify(folder, 30)


def test_files_swapped_between_steps_are_detected(original, tmp_path):
    for number, victim in enumerate(files(original)):
        folder = shutil.copytree(original, tmp_path / str(number) / "checkpoints")
        name = victim.relative_to(original / "30")
        if (folder / "20" / name).exists() and (folder / "20" / name).read_bytes() != victim.read_bytes():
            shutil.copy(folder / "20" / name, folder / "30" / name)
            assert choose(folder)[0] == 20, name


def test_whole_steps_swapped_are_detected(folder):
    (folder / "20").rename(folder / "x")
    (folder / "30").rename(folder / "20")
    (folder / "x").rename(folder / "30")
    chosen, lines = choose(folder)
    assert chosen == 10 and "that of step 20" in lines[0] and "that of step 30" in lines[1]


def test_a_file_that_does_not_belong_is_detected(folder):
    next((folder / "30").glob("save-1/arrays/**/d")).joinpath("smuggled").write_bytes(b"?")
    assert choose(folder)[0] == 20


def test_none_valid(folder):
    for step in (10, 20, 30):
        flip(files(folder, step)[-1])
    chosen, lines = choose(folder)
    assert chosen is None and [line.split()[1] for line in lines] == ["30", "20", "10"]


def test_incomplete_saves_are_never_chosen_and_never_in_the_way(folder):
    (folder / "40" / "save-1" / "arrays.orbax-checkpoint-tmp").mkdir(parents=True)
    (folder / "50").mkdir()
    (folder / "60").write_text("a file")
    (folder / "070").mkdir()
    (folder / "notes").mkdir()
    chosen, lines = choose(folder)
    assert chosen == 30 and [line.split()[1:4] for line in lines[:2]] == [
        ["40", "is", "incomplete"],
        ["50", "is", "incomplete"],
    ]
    with closing(Store(folder, keep=2)) as store:
        store.save(40, {"w": jnp.zeros(2)}, {})
        store.wait()
        assert store.steps() == [30, 40] and store.latest_valid(pytest.fail) == 40
    assert sorted(path.name for path in folder.iterdir()) == ["070", "30", "40", "60", "notes"]


def test_a_damaged_step_does_not_count_as_kept_and_can_be_saved_again(folder):
    flip(files(folder)[-1])
    with closing(Store(folder, keep=2)) as store:
        assert store.latest_valid(lambda _: None) == 20
        store.save(25, {"w": jnp.zeros(2)}, {})
        store.wait()
        assert store.steps() == [20, 25, 30]  # 30 is kept for whoever wants to know what happened
        store.save(30, {"w": jnp.ones(2)}, {})
        store.wait()
        assert store.steps() == [25, 30] and store.latest_valid(pytest.fail) == 30


@pytest.mark.parametrize(
    "change",
    [
        {"save": "../20/save-1"},
        {"save": "/etc"},
        {"files": {"../../../canary": {"bytes": 6, "sha256": "0" * 64}}},
        {"files": []},
        {"files": {"meta.json": {"bytes": "many", "sha256": None}}},
        {"format": 2},
        {"step": "30"},
    ],
)
def test_a_hostile_manifest_leads_nowhere(folder, change):
    (folder.parent / "canary").write_text("secret")
    path = folder / "30" / "manifest.json"
    body = json.loads(path.read_text())
    files_ = (
        body["files"] | change["files"] if isinstance(change.get("files"), dict) else change.get("files", body["files"])
    )
    path.write_text(json.dumps(body | change | {"files": files_}, indent=1, sort_keys=True) + "\n")
    chosen, lines = choose(folder)
    assert chosen == 20 and "secret" not in "".join(lines)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"[" * 100_000, b"\xff\xfe", b'{"a": 1e999}'])
def test_a_manifest_of_nonsense(folder, text):
    (folder / "30" / "manifest.json").write_bytes(text)
    assert choose(folder)[0] == 20


def test_a_step_that_is_a_link_is_not_a_step(folder):
    (folder / "99").symlink_to(folder / "30")
    assert manifest.steps(folder) == [10, 20, 30]
    (folder / "20" / "save-1").rename(folder / "moved")
    (folder / "20" / "save-1").symlink_to(folder / "moved")
    with pytest.raises(manifest.Damaged, match="link"):
        manifest.verify(folder, 20)
