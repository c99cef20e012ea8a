"""Folders made to harm: each is refused with exit code 2 and one line, and what lies outside is left alone."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.__main__ import main
from jaxlm.config import cli
from jaxlm.config.errors import UserError
from tests.checkpoint.folders import tensors, write_model, write_tokenizer
from tests.checkpoint.shapes import FIRST, config_json

INDEX = safetensors.INDEX


@pytest.fixture
def model(tmp_path):
    """A sound model in two files or more, and beside its folder a canary: a sound file of the same tensors."""
    folder = write_tokenizer(write_model(tmp_path / "model", config_json(*FIRST[1]), largest=100_000))
    assert (folder / INDEX).exists()
    canary = tmp_path / "canary.safetensors"
    shutil.copy(folder / first(folder), canary)
    os.utime(canary, (1, 1))  # reading it would show in the time of its last access
    return folder


def first(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))[0]


def refused(folder, capsys, words):
    run = folder.parent / "run"
    with pytest.raises(SystemExit) as stop:
        cli.run(main, ["import", f"--from={folder}", f"--run={run}"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and words in error
    assert not (run / "config.yaml").exists() and not list(run.glob("checkpoints/*/manifest.json"))
    canary = folder.parent / "canary.safetensors"
    assert canary.stat().st_atime == canary.stat().st_mtime == 1
    assert not (folder.parent / "harm").exists()


def rename(folder, name):
    """Let the index say that the tensors of its first file are in `name`."""
    index = json.loads((folder / INDEX).read_text())
    old = first(folder)
    index["weight_map"] = {key: name if file == old else file for key, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_sound_folder_is_taken(model):
    assert main(["import", f"--from={model}", f"--run={model.parent / 'run'}"]) == 0


@pytest.mark.parametrize("name", ["../canary.safetensors", "model/../../canary.safetensors", "..", "", "a\0b", "..\\x"])
def test_a_path_out_of_the_folder(model, capsys, name):
    rename(model, name)
    refused(model, capsys, "names a file outside of it")


def test_an_absolute_path(model, capsys):
    rename(model, str(model.parent / "canary.safetensors"))
    refused(model, capsys, "names a file outside of it")


def test_a_link_out_of_the_folder(model, capsys):
    old = model / first(model)
    old.unlink()
    old.symlink_to(model.parent / "canary.safetensors")
    refused(model, capsys, "leads out of its folder")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
def test_a_text_file_that_is_a_link(model, capsys, name):
    (model.parent / "elsewhere").write_bytes((model / name).read_bytes())
    (model / name).unlink()
    (model / name).symlink_to(model.parent / "elsewhere")
    refused(model, capsys, "leads out of its folder")


def test_the_links_of_the_cache_are_followed(model, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(model.iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert main(["import", f"--from={snapshot}", f"--run={tmp_path / 'run'}"]) == 0


def test_a_named_pipe_is_not_waited_for(model, capsys):
    (model / first(model)).unlink()
    os.mkfifo(model / sorted(json.loads((model / INDEX).read_text())["weight_map"].values())[0])
    refused(model, capsys, "is missing or is no file")


def test_code_of_the_model_is_not_run(model, capsys):
    given = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**given, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text(f"open({str(model.parent / 'harm')!r}, 'w')")
    refused(model, capsys, "which is never loaded")


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_not_read(model, capsys):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(model.parent / "harm")))
    refused(model, capsys, "safe_serialization=True")


@pytest.mark.parametrize(
    "index", ["[]", "{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}, "weight_map": {}}']
)
def test_an_index_that_is_none(model, capsys, index):
    (model / INDEX).write_text(index)
    refused(model, capsys, INDEX)


def test_an_index_that_says_elsewhere(model, capsys):
    index = json.loads((model / INDEX).read_text())
    index["weight_map"].pop("model.norm.weight")
    (model / INDEX).write_text(json.dumps(index))
    refused(model, capsys, "does not say where 'model.norm.weight' is")


def write(path, header, data=b"\0" * 64):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(first, last, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


HEADERS = {
    "overlapping": ({"a": entry(0, 40), "b": entry(24, 64)}, "overlaps another tensor"),
    "the same bytes twice": ({"a": entry(0, 64), "b": entry(0, 64)}, "overlaps another tensor"),
    "a hole": ({"a": entry(0, 16), "b": entry(32, 64)}, "bytes of none stand before it"),
    "bytes at the end": ({"a": entry(0, 32)}, "its tensors end at"),
    "beyond the end": ({"a": entry(0, 128)}, "says nothing sound of 'a'"),
    "backwards": ({"a": entry(64, 0, [0])}, "says nothing sound of 'a'"),
    "negative": ({"a": entry(-64, 0)}, "says nothing sound of 'a'"),
    "a shape of other size": ({"a": entry(0, 64, [3, 5])}, "has 64 bytes and its shape 60"),
    "a huge shape": ({"a": entry(0, 64, [2**62, 4])}, "says nothing sound of 'a'"),
    "a shape that overflows": ({"a": entry(0, 64, [64] * 14)}, "has 64 bytes and its shape"),
    "a shape that is none": ({"a": entry(0, 64, "16")}, "says nothing sound of 'a'"),
    "a dtype that is none": ({"a": entry(0, 64, dtype="F8_E4M3")}, "is of dtype 'F8_E4M3'; we read F32 BF16 F16"),
    "a name twice": (b'{"a": {}, "a": {}}', "is not (or does not begin with) a sound JSON object"),
    "a list": (b"[]", "is not (or does not begin with) a sound JSON object"),
    "nested without end": (b"[" * 100_000, "is not (or does not begin with) a sound JSON object"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_that_does_not_describe_its_file(model, capsys, kind):
    (model / INDEX).unlink()
    header, words = HEADERS[kind]
    write(model / safetensors.SINGLE, header)
    refused(model, capsys, words)


@pytest.mark.parametrize("length", [2**63, 10**8 + 1, 1000])
def test_a_header_longer_than_its_file(model, capsys, length):
    (model / INDEX).unlink()
    (model / safetensors.SINGLE).write_bytes(length.to_bytes(8, "little") + b"{}")
    refused(model, capsys, "its header would have")


def test_an_empty_file(model, capsys):
    (model / INDEX).unlink()
    (model / safetensors.SINGLE).write_bytes(b"")
    refused(model, capsys, "its header would have")


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 40))
def test_a_damaged_file_is_a_line(changes, cut):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, safetensors.SINGLE)
        write(path, {"a": entry(0, 16, [2, 2]), "b": entry(16, 64, [12])})
        content = bytearray(path.read_bytes())
        for place, byte in changes:
            content[place % len(content)] = byte
        path.write_bytes(content[: len(content) - cut])
        try:
            held = safetensors.open_folder(Path(folder))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert sum(safetensors._bytes(tensor) for tensor in held.values()) <= 64


def rewritten(model, change):
    """The tensors of `model` in one file, changed."""
    held = change(tensors(model))
    for path in model.glob("*.safetensors*"):
        path.unlink()
    writer = safetensors.Writer(model, {name: shape for name, (_, shape, _) in held.items()}, "F32")
    for name, (_, shape, content) in held.items():
        writer.write(name, 0, np.frombuffer(content, np.float32).reshape(shape))


def test_a_tensor_too_many(model, capsys):
    rewritten(model, lambda held: held | {"model.layers.0.extra": held["model.norm.weight"]})
    refused(model, capsys, "tensor 'model.layers.0.extra' of the files is none of llama")


def test_a_tensor_too_few(model, capsys):
    rewritten(model, lambda held: {name: value for name, value in held.items() if name != "model.norm.weight"})
    refused(model, capsys, "the files have no tensor model.norm.weight, which config.json asks for")


def test_a_tensor_of_another_shape(model, capsys):
    rewritten(model, lambda held: held | {"model.norm.weight": held["model.layers.0.mlp.gate_proj.weight"]})
    refused(model, capsys, "tensor model.norm.weight is F32[52, 48]; config.json asks for [48]")


def test_an_output_layer_that_config_says_is_the_embedding(model, capsys):
    given = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**given, "tie_word_embeddings": True}))
    refused(model, capsys, "lm_head.weight is not the embedding")
    rewritten(model, lambda held: held | {"lm_head.weight": held["model.embed_tokens.weight"]})
    assert main(["import", f"--from={model}", f"--run={model.parent / 'run'}"]) == 0


def test_no_weights(model, capsys):
    for path in model.glob("*.safetensors*"):
        path.unlink()
    refused(model, capsys, "holds no model.safetensors")


def test_a_config_larger_than_memory(model, capsys):
    (model / "config.json").write_text("x" * (2**24 + 1))
    refused(model, capsys, "is over")


def test_rows_are_read_and_written_where_they_lie(tmp_path):
    writer = safetensors.Writer(tmp_path, {"a": (5, 3), "b": (), "c": (0, 2)}, "F32")
    whole = np.arange(15, dtype=np.float32).reshape(5, 3)
    writer.write("a", 3, whole[3:])
    writer.write("a", 0, whole[:3])
    writer.write("b", 0, np.float32([7.0]))
    stored = safetensors.open_folder(tmp_path)
    assert (stored["a"].read(1, 4) == whole[1:4]).all() and stored["c"].shape == (0, 2)
    library = pytest.importorskip("safetensors.numpy", reason="safetensors is in the extra hf-test")
    read = library.load_file(tmp_path / safetensors.SINGLE)
    assert (read["a"] == whole).all() and read["b"] == 7.0 and read["c"].shape == (0, 2)
