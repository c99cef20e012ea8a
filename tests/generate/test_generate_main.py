"""The generate command, on a run folder made by hand: what it prints, and how it refuses."""

import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxlm.checkpoint.store import Store
from jaxlm.config import cli
from jaxlm.config.load import dump
from jaxlm.config.schema import EvalConfig, RunConfig
from jaxlm.data.tokenizer import Bytes
from jaxlm.generate.__main__ import main
from tests.generate.tiny import GPT, make

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run at steps 1 and 2, whose parameters differ, with optimizer state that generation must not need."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    _, params, _ = make(replace(GPT, layers=1), "dp4,tp2", vocabulary=257)
    with Store(folder / "checkpoints") as store:
        for step in (1, 2):
            params = jax.tree.map(lambda leaf: leaf * 1.5, params)
            store.save(step, {"params": params, "optimizer": {"mu": jnp.ones(3)}, "step": jnp.int32(step)}, {})
    config = RunConfig(model=replace(GPT, layers=1), eval=EvalConfig(prompt="def "))
    (folder / "config.yaml").write_text(dump(config))
    Bytes().save(folder / "tokenizer")
    return folder


def generate(capfd, folder, *argv):
    """Exit code, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.run(main, [f"--run={folder}", "--max-tokens=8", *argv])
    out, err = capfd.readouterr()
    return ended.value.code, out, err


def test_the_text_is_on_stdout_and_the_speed_on_stderr(folder, capfd):
    code, out, err = generate(capfd, folder, "--prompt=ab", "--top-p=1")
    assert code == 0
    assert out.startswith("ab") and out.endswith("\n") and len(out) > 4
    assert "step 2 on 1 x cpu, float32, attention xla" in err
    assert "prefill 2 tokens in" in err and "decode 7 tokens in" in err and "tokens/s" in err


def test_samples_differ_meshes_do_not(folder, capfd):
    code, out, _ = generate(capfd, folder, "--samples=2", "--top-p=1")
    assert code == 0
    head, one, two = out.replace("--- 2 of 2", "--- 1 of 2").split("--- 1 of 2 ---\n")
    assert head == "" and one.startswith("def ") and two.startswith("def ") and one != two
    _, same, err = generate(capfd, folder, "--samples=2", "--top-p=1", "--mesh=dp2,tp2")
    assert same == out and "on 4 x simulated cpu" in err
    assert generate(capfd, folder, "--samples=2", "--top-p=1", "--seed=1")[1] != out


def test_a_search(folder, capfd):
    argv = ("--prompt=Zq", "--temperature=0")
    code, out, err = generate(capfd, folder, *argv, "--beams=3")
    assert code == 0 and out.startswith("Zq") and out.endswith("\n")
    assert "prefill 2 tokens in" in err and "decode 7 tokens in" in err
    assert generate(capfd, folder, *argv)[1] != out
    assert "b" in out, "a stop that never comes proves little"
    assert generate(capfd, folder, *argv, "--beams=3", "--stop=b")[1] == out[: out.index("b")] + "\n"


def test_a_person_types(folder, capfd, monkeypatch):
    """Each line gets the text that --prompt gets, with the seed of its turn."""
    expected = [generate(capfd, folder, f"--prompt={text}", f"--seed={i}")[1] for i, text in enumerate(("ab", "cd"))]
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n\n" + "x" * 60 + "\ncd\n"))
    code, out, err = generate(capfd, folder, "--interactive")
    assert code == 0 and out == expected[0][2:] + expected[1][2:]
    assert "each message is a text to continue" in err and "Ctrl-D ends" in err
    assert [line for line in err.splitlines() if "64 learned positions" in line], "one that is too long ends nothing"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_terminal(folder):
    """Ctrl-C at the prompt drops the line, Ctrl-D ends."""
    command = [sys.executable, "-m", "jaxlm.generate", f"--run={folder}", "--interactive", "--max-tokens=8"]
    # What a shell starts in the background ignores Ctrl-C, and so do its children.
    spawn = "signal.signal(signal.SIGINT, signal.SIG_DFL); sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    terminal = [sys.executable, "-c", f"import pty, signal, sys; {spawn}", *command]
    with subprocess.Popen(terminal, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        shown = ""

        def until(text):
            nonlocal shown
            while text not in shown:
                piece = os.read(process.stdout.fileno(), 4096).decode(errors="replace")
                assert piece, shown
                shown += piece
            shown = shown.partition(text)[2]

        until("> ")
        for sent, seen in ((b"lost\x03", ["> "]), (b"ab\n", ["ab", "> "]), (b"\x04", [])):
            process.stdin.write(sent)
            process.stdin.flush()
            for text in seen:
                until(text)
        assert process.wait(60) == 0


def test_an_older_checkpoint_and_a_prompt_file(folder, capfd, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("ab\ncd\n")
    _, old, err = generate(capfd, folder, f"--prompt-file={file}", "--step=1")
    assert "step 1 on" in err and "\ncd" in old
    assert generate(capfd, folder, f"--prompt-file={file}")[1] != old


@pytest.mark.parametrize(
    "argv, code, words",
    [
        (["--run={0}x"], 2, ["no run there", "nearest is --run={0}"]),
        (["--run=/nowhere/at/all"], 2, ["no run there", "python -m jaxlm.train"]),
        (["--step=7"], 4, ["--step=7", "there are: 1 2"]),
        (["--mesh=tp3"], 2, ["tp3", "another --mesh"]),
        (["--mesh=xx2"], 2, ["no axis 'xx'"]),
        (["--max-tokens=61"], 2, ["64 learned positions"]),
        (["--temperature=-1"], 2, ["--temperature=-1"]),
        (["--samples=0"], 2, ["--samples=0"]),
        (["--samples=2", "--temperature=0"], 2, ["all be the same"]),
        (["--prompt=a", "--prompt-file=b"], 2, ["both"]),
        (["--interactive", "--prompt=a"], 2, ["--interactive reads prompts as you type"]),
        (["--beams=0"], 2, ["--beams=0", "1 (no search)"]),
        (["--beams=4"], 2, ["--temperature=0.8", "use --temperature=0,"]),
        (["--beams=4", "--temperature=0", "--samples=2"], 2, ["--samples=2", "all be the same"]),
        (["--beams=4", "--temperature=0", "--interactive"], 2, ["--interactive", "--beams=4", "leave one out"]),
        (["--length-penalty=2"], 2, ["--length-penalty=2", "--beams=4"]),
        (["--max-token=3"], 2, ["--max-tokens"]),
    ],
)
def test_mistakes_end_in_one_line(folder, capfd, argv, code, words):
    result, out, err = generate(capfd, folder, *(a.format(folder) for a in argv))
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (result, out) == (code, ""), err
    assert all(word.format(folder) in line for word in words), line


def test_damage_is_found_before_it_speaks(folder, capfd, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.rglob("*"):
        target = copy / path.relative_to(folder)
        target.mkdir(parents=True, exist_ok=True) if path.is_dir() else target.write_bytes(path.read_bytes())
    (next((copy / "checkpoints/2").rglob("meta.json"))).write_text("{}")
    code, _, err = generate(capfd, copy, "--step=2")
    assert code == 4 and "damaged" in err
    code, _, err = generate(capfd, copy)
    assert code == 0 and "checkpoint 2 is damaged" in err and "step 1 on" in err
    (next((copy / "checkpoints/1").rglob("meta.json"))).unlink()
    code, out, err = generate(capfd, copy)
    assert (code, out) == (4, "") and "none of the checkpoints 1 2 is valid" in err


def test_a_run_without_checkpoints_or_tokenizer(folder, capfd, tmp_path):
    (tmp_path / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    code, _, err = generate(capfd, tmp_path)
    assert code == 2 and "no tokenizer" in err
    Bytes().save(tmp_path / "tokenizer")
    code, _, err = generate(capfd, tmp_path)
    assert code == 4 and "no checkpoint" in err
