"""`python -m jaxlm.data`: what it prints, and one line and exit code 2 for a mistake."""

import re

import pytest

from jaxlm.config.errors import UserError
from jaxlm.data.__main__ import main


def test_prepare_show_verify(jsonl, tmp_path, capsys, texts):
    output = tmp_path / "tokens"
    arguments = ["prepare", f"--input={jsonl}", f"--output={output}", "--tokenizer=bytes", "--workers=1"]
    main(arguments)
    made = capsys.readouterr().out
    assert f"{len(texts)} documents" in made and "vocabulary 257, stored as uint16" in made
    main(arguments)  # again: nothing to do
    assert capsys.readouterr().out == made
    main(["verify", str(output)])
    assert capsys.readouterr().out.endswith("whole\n")
    main(["show", str(output), "--documents=3", "--characters=30"])
    shown = capsys.readouterr().out
    nats, bits = map(float, re.search(r"entropy: ([\d.]+) nats/token = ([\d.]+) bits/byte", shown).groups())
    assert 2 < nats < 5.5 and bits > nats / 0.6931 * 1.0  # a token is a byte, and ends of documents are tokens too
    assert shown.count("--- document") == 3 and texts[2][:20] in shown


def test_verify_names_the_damaged_file(damaged, capsys):
    path = damaged / "shard-00000.tokens"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    with pytest.raises(UserError, match=str(path)):
        main(["verify", str(damaged)])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prepair"], "unknown command 'prepair'"),
        (["prepare", "--output=x"], "--input must be given"),
        (["prepare", "--input=no/such", "--output=x"], "'no/such' does not exist"),
        (["prepare", "--input={jsonl}", "--output={tmp}/x", "--workers=-1"], "--workers=-1"),
        (["prepare", "--input={jsonl}", "--output={tmp}/x", "--tokenizer=gpt9"], "gpt9"),
        (["prepare", "--input={jsonl}", "--output={tmp}/x", "--text-key=body"], "it has: text"),
        (["prepare", "--input={jsonl}", "--output={tmp}", "--tokenizer=bytes"], "exists and was not made"),
        (["prepare", "--input={jsonl}", "--output={jsonl}/x", "--tokenizer=bytes"], "is not a folder"),
        (["prepare", "--inptu=x"], "nearest is --input"),
        (["verify"], "name the token folder"),
        (["verify", "{tmp}"], "index.json cannot be read"),
        (["show", "{tmp}/none"], "index.json cannot be read"),
    ],
)
def test_mistakes(arguments, complaint, jsonl, tmp_path):
    with pytest.raises(UserError, match=complaint):
        main([argument.format(jsonl=jsonl, tmp=tmp_path) for argument in arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "--help"], ["show", "--help"], ["verify", "--help"]])
def test_help(arguments, capsys):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == 0
    assert "python -m jaxlm.data" in capsys.readouterr().out
