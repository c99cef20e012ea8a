"""What an imported model wants before a text, what ends one, its template: read, honoured, and handed on."""

import json

import pytest
import tokenizers

from jaxlm.checkpoint.__main__ import main
from jaxlm.checkpoint.conventions import read
from jaxlm.config import cli
from jaxlm.config.errors import UserError
from jaxlm.config.load import read_run
from jaxlm.data.tokenizer import Bytes, load
from jaxlm.generate.__main__ import main as generate
from tests.checkpoint.folders import BOS, CHAT, write_model, write_tokenizer
from tests.checkpoint.shapes import config_json


def imported(folder, *, bos=True, config=None, generation=None, **described):
    """The run of a model whose files say so, and its tokenizer."""
    given = config_json("llama", "grouped") | {"num_hidden_layers": 1} | (config or {})
    source = write_tokenizer(write_model(folder / "model", given), bos=bos)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **described}))
    if generation is None:
        (source / "generation_config.json").unlink()
    else:
        (source / "generation_config.json").write_text(json.dumps(generation))
    assert main(["import", f"--from={source}", f"--run={folder / 'run'}"]) == 0
    return folder / "run"


def conventions(run):
    return read(run, read_run(run), load(run / "tokenizer"))


def test_what_stands_before_a_text(tmp_path):
    text = load(write_tokenizer(tmp_path, bos=True))
    number = text.id_of(BOS)
    assert conventions(imported(tmp_path / "a")).prefix == (number,)
    assert conventions(imported(tmp_path / "b", bos=False)).prefix == ()
    found = conventions(imported(tmp_path / "c", bos_token={"content": BOS}))
    assert found.prefix == (number,) and found.begun(text) == number
    assert conventions(tmp_path / "b/run").begun(text) == text.eos_id


def test_what_ends_a_text(tmp_path):
    one = conventions(imported(tmp_path / "a", generation={"eos_token_id": [5, 7, 0]}, config={"eos_token_id": 9}))
    assert one.stops == (load(tmp_path / "a/run/tokenizer").eos_id, 5, 7)
    two = conventions(imported(tmp_path / "b", generation={"temperature": 1.0}, config={"eos_token_id": 9}))
    assert two.stops == one.stops[:1], "as transformers reads the two files"
    three = conventions(imported(tmp_path / "c", config={"eos_token_id": [9, 100_000]}))
    assert three.stops == (one.stops[0], 9)


def test_the_template_and_the_length(tmp_path):
    found = conventions(imported(tmp_path))
    assert found.template == CHAT and found.names == {"bos_token": BOS, "eos_token": "</s>"}
    assert found.max_length == 64
    kept = tmp_path / "run/huggingface"
    (kept / "chat_template.jinja").unlink()
    path = kept / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert conventions(tmp_path / "run").template == "y"
    path.write_text("{}")
    assert conventions(tmp_path / "run").template is None


def test_another_tokenizer_has_none_of_it(tmp_path):
    run = imported(tmp_path, generation={"eos_token_id": [5]})
    found = read(run, read_run(run), Bytes())
    assert (found.prefix, found.stops, found.template) == ((), (256,), None)


def test_names_of_special_tokens_count_in_templates_alone(tmp_path):
    text = load(write_tokenizer(tmp_path, bos=True))
    marked = text.encode_marked(f"{BOS}a</s>")
    assert marked == [text.id_of(BOS), *text.encode("a"), text.eos_id]
    plain = text.encode(f"{BOS}a</s>")
    assert len(plain) > len(marked) and text.eos_id not in plain and text.decode(plain) == f"{BOS}a</s>"


def test_texts_are_made_that_way(tmp_path, capfd):
    """The prefix changes the text; words of --stop end it, and so does any id of generation_config."""
    run = imported(tmp_path)
    argv = [f"--run={run}", "--prompt=return", "--temperature=0", "--max-tokens=12"]

    def text(*more):
        capfd.readouterr()
        generate([*argv, *more])
        return capfd.readouterr().out

    whole = text()
    assert whole != text("--no-bos")
    alone = text(f"--stop={whole[10:13]}")
    assert alone == whole[: whole.index(whole[10:13])] + "\n"
    (run / "huggingface/generation_config.json").write_text(json.dumps({"eos_token_id": list(range(301))}))
    assert text() == "return\n"


def test_ids_of_another_model_are_refused(tmp_path):
    with pytest.raises(UserError, match="eos_token_id=301 is none of the model's 301 ids; they are not of one model"):
        imported(tmp_path, generation={"eos_token_id": [5, 301]})
    assert not (tmp_path / "run").exists()


def test_every_text_file_comes_back(tmp_path):
    source = write_tokenizer(write_model(tmp_path / "model", config_json("llama", "grouped")), bos=True)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    (source / "generation_config.json").write_text('{"eos_token_id":  [5, 7]}')
    run, back = tmp_path / "run", tmp_path / "back"
    assert main(["import", f"--from={source}", f"--run={run}"]) == main(["export", f"--run={run}", f"--to={back}"]) == 0
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert files == {path.relative_to(back) for path in back.rglob("*") if path.is_file()}
    same = [path for path in files if (source / path).read_bytes() == (back / path).read_bytes()]
    assert {path for path in files if path.suffix != ".safetensors"} <= set(same)


def test_a_folder_of_templates_elsewhere_is_not_followed(tmp_path):
    source = write_tokenizer(write_model(tmp_path / "model", config_json("llama", "grouped")))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jinja").write_text("secret")
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link and not followed"):
        main(["import", f"--from={source}", f"--run={tmp_path / 'run'}"])


def test_a_tokenizer_of_another_size_in_the_run(tmp_path, capfd):
    run = imported(tmp_path)
    larger = tokenizers.Tokenizer.from_file(str(run / "tokenizer/tokenizer.json"))
    larger.add_special_tokens([f"<more {i}>" for i in range(9)])
    larger.save(str(run / "tokenizer/tokenizer.json"))
    with pytest.raises(SystemExit) as ended:
        cli.run(generate, [f"--run={run}", "--prompt=a"])
    assert ended.value.code == 2 and "smaller than the tokenizer's" in capfd.readouterr().err


@pytest.mark.parametrize("described", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_ids_are_those_of_transformers(described, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is in the extra hf-test")
    run = imported(tmp_path, **described)
    ours, theirs = load(run / "tokenizer"), transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert [*conventions(run).prefix, *ours.encode_marked("return a</s>")] == theirs.encode("return a</s>")
    talk = [{"role": "user", "content": "return"}]
    assert conventions(run).template == theirs.chat_template
    assert ours.encode_marked(theirs.apply_chat_template(talk, tokenize=False)) == theirs.apply_chat_template(
        talk, return_dict=False
    )
