"""Models of Hugging Face in and out, without transformers: the same bits, the same text files, a run that runs."""

import json
import shutil

import jax
import numpy as np
import pytest

from jaxlm.checkpoint import convert
from jaxlm.checkpoint.__main__ import main
from jaxlm.checkpoint.store import Store
from jaxlm.config import mesh_spec
from jaxlm.config.errors import NoValidCheckpoint, UserError
from jaxlm.config.load import load, read_file
from jaxlm.config.schema import ModelConfig, RunConfig
from jaxlm.generate.__main__ import main as generate
from jaxlm.models import families
from jaxlm.models.families.family import unlike
from jaxlm.parallel import mesh as meshes
from jaxlm.train import loop, resume
from jaxlm.train.assemble import assemble
from tests.checkpoint.folders import tensors, write_model, write_tokenizer
from tests.checkpoint.shapes import EVERY, FIRST, config_json


def there(folder, *options):
    return main(["import", f"--from={folder}", f"--run={folder.parent / 'run'}", *options])


def back(folder, *options):
    run, to = folder.parent / "run", folder.parent / "back"
    assert main(["export", f"--run={run}", f"--to={to}", *options]) == 0
    return to


@pytest.mark.parametrize("family, shape", EVERY)
def test_config_is_read_and_written(family, shape):
    given = config_json(family, shape)
    model = families.FAMILIES[family].read(given)
    written = families.FAMILIES[family].write(model)
    assert not unlike(model, families.of_config(written).read(written))
    first = families.of_model(model)  # that can say it: of Mistral without a window, Llama
    assert not unlike(model, first.read(first.write(model)))


@pytest.mark.parametrize("family, shape", EVERY)
def test_every_bit_comes_back(family, shape, tmp_path):
    folder = write_model(tmp_path / "model", config_json(family, shape), "BF16" if "tied" in shape else "F32")
    assert there(folder) == 0
    to = back(folder)
    assert tensors(to) == tensors(folder)
    assert (to / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert sorted(path.name for path in to.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype, stored", [("BF16", "bfloat16"), ("F16", "float32"), ("F32", "float32")])
def test_each_dtype_comes_back(dtype, stored, tmp_path):
    folder = write_model(tmp_path / "model", config_json(*FIRST[0]), dtype, largest=50_000)
    there(folder)
    assert read_file(RunConfig, tmp_path / "run" / "config.yaml").precision.params == stored
    assert tensors(back(folder)) == tensors(folder)


def test_stored_wider_and_written_as_it_came(tmp_path):
    folder = write_model(tmp_path / "model", config_json(*FIRST[1]), "BF16")
    there(folder, "--params=float32")
    assert tensors(back(folder, "--dtype=bfloat16")) == tensors(folder)


def test_rounding_is_said(tmp_path, capsys):
    folder = write_model(tmp_path / "model", config_json(*FIRST[1]))
    there(folder, "--params=bfloat16")
    assert "F32" not in (out := capsys.readouterr().out) and "float32 are rounded to bfloat16 (--params)" in out
    back(folder, "--dtype=float16")
    assert "rounded from bfloat16 to float16 (--dtype)" in capsys.readouterr().out


def test_pieces_smaller_than_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxlm.checkpoint.matching.PIECE_BYTES", 2000)
    for family, shape in (FIRST[0], FIRST[1]):
        folder = write_model(tmp_path / family / "model", config_json(family, shape))
        there(folder)
        assert tensors(back(folder)) == tensors(folder)


def test_a_model_without_its_output_layer(tmp_path):
    """As the published files of GPT-2 are: no prefix, and masks among the tensors."""
    folder = write_model(tmp_path / "model", config_json("gpt2", "as published"))
    whole = tensors(folder)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    bare = {name.removeprefix("transformer."): entry for name, entry in header.items()}
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    bare["h.0.attn.bias"] = {"dtype": "U8", "shape": [1, 1, 4], "data_offsets": [end, end + 4]}
    text = json.dumps(bare).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :] + b"\1\0\1\1")
    there(folder)
    assert tensors(back(folder)) == whole


def test_texts_come_back_as_they_were(tmp_path):
    folder = write_tokenizer(write_model(tmp_path / "model", config_json(*FIRST[1])))
    there(folder)
    to = back(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in to.iterdir()} and "chat_template.jinja" in names
    for name in names:
        assert (to / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_tokenizer_of_another_model(tmp_path):
    folder = write_tokenizer(write_model(tmp_path / "model", config_json(*FIRST[1])), 310)
    with pytest.raises(UserError, match="ids up to 309 and the model rows for 301; they are not of one model"):
        there(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("tokenizer.json", "{}", "it has no model"),
        ("tokenizer.json", '{"model": {}}', "is no tokenizer.json that tokenizers reads"),
        ("tokenizer_config.json", '{"eos_token": "<none>"}', "has no token '<none>'"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
    ],
)
def test_a_tokenizer_that_is_none(name, content, message, tmp_path):
    folder = write_tokenizer(write_model(tmp_path / "model", config_json(*FIRST[1])))
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        there(folder)
    assert not (tmp_path / "run").exists()


def test_an_import_generates_and_trains_on_a_mesh(tmp_path, capsys):
    folder = write_tokenizer(write_model(tmp_path / "model", config_json("llama", "grouped"), "BF16"))
    there(folder)
    run = tmp_path / "run"
    generate([f"--run={run}", "--prompt=def f", "--max-tokens=4", "--temperature=0"])
    assert "\ndef f" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("the value of the other function, and so on\n\n" * 300)
    options = [f"--config={run / 'config.yaml'}", f"--data.path={tmp_path / 'text.txt'}", f"--data.cache={tmp_path}"]
    options += ["--mesh=fsdp2,tp2", "--train.steps=2", "--data.sequence-length=32", "--eval.every=0"]
    options += ["--eval.sample-tokens=0", "--precision.params=float32", "--optimizer.learning-rate=1e-5"]
    config = load(RunConfig, options)[0]
    assert config.run == str(run)
    (run / "events.jsonl").touch()  # as an attempt leaves it that failed before its first step
    loop.run(config)
    assert "beginning with the weights imported from llama, in bfloat16" in capsys.readouterr().out
    with Store(run / "checkpoints") as store:
        assert store.steps() == [0, 2] and store.meta(2)["position"] == 32
        leaf = {"params": {"tokens": {"embedding": jax.ShapeDtypeStruct((384, 48), "float32")}}}
        trained = np.asarray(store.restore(2, leaf, partial=True)["params"]["tokens"]["embedding"])
    table = np.frombuffer(tensors(folder)["model.embed_tokens.weight"][2], "bfloat16").reshape(301, 48)
    moved = np.abs(trained[:301] - table.astype(np.float32)).max()
    assert 0 < moved < 1e-4  # it began with the weights that came, unrounded
    loop.run(load(RunConfig, [*options, "--train.steps=3", "--mesh=dp2"])[0])  # and is a run like any other
    with pytest.raises(UserError, match="holds a run with data.seed=0"):
        loop.run(load(RunConfig, [*options, "--data.seed=1"])[0])
    assert tensors(back(folder, "--step=3"))["lm_head.weight"][0] == "F32"


def test_each_device_reads_its_part(tmp_path):
    folder = write_model(tmp_path / "model", config_json("llama", "grouped"))
    there(folder)
    options = [f"--config={tmp_path / 'run' / 'config.yaml'}", "--mesh=fsdp2,tp2", "--data.sequence-length=32"]
    config = load(RunConfig, options)[0]
    assembly = assemble(config, meshes.build(mesh_spec.parse(config.mesh))[0], None)
    with Store(tmp_path / "run" / "checkpoints") as store:
        start = resume.begin(assembly, store, resume.choose(store, "must", print))
    assert (start.step, start.position) == (0, 0) and int(start.state["step"]) == 0
    kernel = start.state["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert [shard.data.nbytes * 4 for shard in kernel.addressable_shards] == [kernel.nbytes] * 4
    theirs = np.frombuffer(tensors(folder)["model.layers.1.mlp.up_proj.weight"][2], np.float32).reshape(52, 48)
    assert (np.asarray(kernel[1]) == theirs.T).all()


def test_an_imported_model_is_not_changed_by_a_key(tmp_path):
    folder = write_model(tmp_path / "model", config_json(*FIRST[1]))
    there(folder)
    config = load(RunConfig, [f"--config={tmp_path / 'run' / 'config.yaml'}", "--model.rope-theta=5000"])[0]
    with pytest.raises(UserError, match="holds a run with model.rope_theta=10000.0, this one has 5000.0"):
        loop.run(config)


def test_an_imported_run_does_not_begin_with_other_weights(tmp_path):
    there(write_model(tmp_path / "model", config_json(*FIRST[1])))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0")
    with Store(tmp_path / "run" / "checkpoints") as store, pytest.raises(NoValidCheckpoint, match="imported model"):
        resume.choose(store, "auto", print)


def test_a_run_of_our_own_becomes_a_model(tmp_path, capsys):
    options = ["--model.layers=1", "--model.embed=32", "--model.heads=2", "--model.mlp=40", "--data.vocabulary=300"]
    options += [f"--run={tmp_path / 'run'}", "--train.steps=1", f"--data.cache={tmp_path}", "--eval.every=0"]
    (tmp_path / "text.txt").write_text("the value of the other function, and so on\n\n" * 300)
    loop.run(load(RunConfig, [*options, f"--data.path={tmp_path / 'text.txt'}", "--eval.sample-tokens=0"])[0])
    to = back(tmp_path / "x")
    given = json.loads((to / "config.json").read_text())
    assert given["model_type"] == "gpt2" and given["n_embd"] == 32
    assert given["vocab_size"] == tensors(to)["transformer.wte.weight"][1][0] < 384
    assert json.loads((to / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    main(["import", f"--from={to}", f"--run={tmp_path / 'again'}"])
    assert tensors(to) == tensors(back_of(tmp_path / "again"))


def back_of(run):
    main(["export", f"--run={run}", f"--to={run}-back"])
    return run.with_name(f"{run.name}-back")


REFUSED = [
    ({"model_type": "xlnet"}, "model_type='xlnet' is not one of gpt2 llama"),
    ({"model_type": None}, "model_type=None is not one of"),
    ({"hidden_size": None}, "hidden_size=None is not a whole number"),
    ({"hidden_size": "40"}, "hidden_size='40' is not a whole number"),
    ({"num_hidden_layers": 0}, "--model.layers=0: must be 1 or more"),
    ({"clip_qkv": 8.0}, "clip_qkv=8.0 is not known of llama"),
    ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not known of llama"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not what we compute"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "is of kind 'dynamic'; we have default linear llama3 yarn"),
    ({"rope_scaling": {"type": "linear"}}, "lacks a number factor"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "holds 'mscale'=1.0"),
    ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not one of silu"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "is not LlamaForCausalLM"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not what we compute"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map: the model runs code of its own, which is never loaded"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_what_we_cannot_compute_is_refused(change, message, tmp_path):
    folder = write_model(tmp_path / "model", config_json("llama", "grouped"))
    (folder / "config.json").write_text(json.dumps(config_json("llama", "grouped") | change))
    with pytest.raises(UserError, match=message):
        there(folder)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "rms", "positions": "rotary"}, "--model.gated=False has no place in llama, where it is True"),
        ({"router": "sigmoid", "experts": 4, "positions": "rotary"}, "no family of Hugging Face has all of this model"),
    ],
)
def test_what_no_family_has_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        families.of_model(ModelConfig(vocabulary=300, **options))


def test_nothing_is_overwritten(tmp_path):
    folder = write_model(tmp_path / "model", config_json(*FIRST[1]))
    there(folder)
    with pytest.raises(UserError, match="holds a run already; use another --run"):
        there(folder)
    back(folder)
    with pytest.raises(UserError, match="holds something already; name a new folder"):
        back(folder)
    with pytest.raises(UserError, match="--run='/proc/run' cannot be made: No such file"):
        there(folder, "--run=/proc/run")
    with pytest.raises(UserError, match="--to='/proc/x/y' cannot be made: No such file"):
        main(["export", f"--run={tmp_path / 'run'}", "--to=/proc/x/y"])
    with pytest.raises(UserError, match="no such folder; download the model first"):
        there(tmp_path / "nowhere")


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "model", config_json(*FIRST[1]))
    there(folder)
    monkeypatch.setattr(convert.safetensors.Writer, "flush", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        back(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


@pytest.mark.parametrize(("start", "refused"), [(1, False), (None, False), (7, True)])
def test_what_answers_begin_behind(start, refused, tmp_path):
    """T5's <pad>, which the tokenizer has as token 1."""
    given = config_json("t5", "v1.0") | {"decoder_start_token_id": start}
    folder = write_tokenizer(write_model(tmp_path / "model", given))
    if refused:
        with pytest.raises(UserError, match="decoder_start_token_id=7 is not 1"):
            there(folder)
    else:
        there(folder)
