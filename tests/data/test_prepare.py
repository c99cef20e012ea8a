"""Preparation is byte-identical whatever the workers, survives a kill, and two at once do not harm each other."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.config.errors import UserError
from jaxlm.data import prepare as module
from jaxlm.data import sources, tokenizer
from jaxlm.data.prepare import prepare
from jaxlm.data.store import TokenFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def big(tmp_path_factory):
    """About 2.5 MB of text in 500 documents: a second of BPE."""
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefgh", k=chance.randint(1, 9))) for _ in range(3000)]
    path = tmp_path_factory.mktemp("big") / "big.jsonl"
    with path.open("w") as file:
        for _ in range(500):
            file.write(json.dumps({"text": " ".join(chance.choices(words, k=chance.randint(1, 1800)))}) + "\n")
    return path


def command(source, output, workers):
    options = [f"--input={source}", f"--output={output}", f"--workers={workers}"]
    options += ["--vocabulary=300", "--shard-characters=100000"]
    return [sys.executable, "-m", "jaxlm.data", "prepare", *options]


def tree(folder):
    """Relative path -> SHA-256 of every file."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def reference(big, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "tokens"
    subprocess.run(command(big, output, 1), cwd=ROOT, check=True, capture_output=True)
    return tree(output)


def test_every_document_is_there_in_order(prepared, texts):
    folder = TokenFolder(prepared)
    assert len(folder.shards) > 3 and folder.documents == len(texts)
    assert folder.source_bytes == sum(len(text.encode()) for text in texts)
    start = 0
    for text, end in zip(texts, folder.document_ends.tolist(), strict=True):
        out = np.empty(end - start, np.int32)
        folder.read(start, end, out)
        assert out[-1] == folder.eos_id and folder.tokenizer.decode(out[:-1].tolist()) == text
        start = end
    assert start == folder.tokens


def test_three_workers_write_the_same_bytes(big, reference, tmp_path):
    done = subprocess.run(command(big, tmp_path / "tokens", 3), cwd=ROOT, check=True, capture_output=True, text=True)
    assert tree(tmp_path / "tokens") == reference
    assert "500 documents" in done.stdout
    assert len([name for name in reference if name.endswith(".tokens")]) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_killed_and_run_again(big, reference, tmp_path):
    staging = tmp_path / "tokens.partial"
    process = subprocess.Popen(
        command(big, tmp_path / "tokens", 2), cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not (staging / "shard-00003.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.with_suffix(".tokens").stat().st_mtime_ns for path in staging.glob("shard-*.json")}
    assert not (tmp_path / "tokens").exists() and 4 <= len(finished) < 20
    deadline = time.monotonic() + 20
    with contextlib.suppress(ProcessLookupError):  # its workers must not outlive it
        while True:
            assert time.monotonic() < deadline
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    (staging / "shard-00019.tokens").write_bytes(b"torn")
    again = subprocess.run(command(big, tmp_path / "tokens", 2), cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"after {len(finished)} finished shards" in again.stderr
    assert tree(tmp_path / "tokens") == reference
    for path, written in finished.items():
        assert (tmp_path / "tokens" / path.with_suffix(".tokens").name).stat().st_mtime_ns == written


def test_two_at_once(big, reference, tmp_path):
    both = [
        subprocess.Popen(command(big, tmp_path / "tokens", 1), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    complaints = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], complaints
    assert any("waiting for another process" in complaint for complaint in complaints)
    assert tree(tmp_path / "tokens") == reference


def test_a_worker_that_dies_is_an_error_not_a_hang(jsonl, tmp_path):
    code = (
        "import sys; from jaxlm.data import prepare, sources, tokenizer\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    tokens = Path(sys.argv[2])\n"
        "    prepare.prepare(sources.find(sys.argv[1]), tokens, tokenizer.Bytes, {}, workers=2)\n"
        "else:\n"
        "    prepare._encode = lambda *_: prepare.os._exit(9)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script, jsonl, tmp_path / "tokens"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "a tokenizing process died" in done.stderr


def test_another_request_starts_afresh_and_does_not_overwrite(jsonl, tmp_path):
    found = sources.find(str(jsonl))
    (tmp_path / "tokens.partial").mkdir()
    (tmp_path / "tokens.partial" / "request.json").write_text("{}")
    (tmp_path / "tokens.partial" / "shard-00000.json").write_text("left by another request")
    made = prepare(found, tmp_path / "tokens", tokenizer.Bytes, {"tokenizer": "bytes"})
    before = tree(made)
    assert prepare(found, tmp_path / "tokens", pytest.fail, {"tokenizer": "bytes"}) == made  # kept: no tokenizer made
    with pytest.raises(UserError, match="was not made by this command"):
        prepare(found, tmp_path / "tokens", tokenizer.Bytes, {"tokenizer": "other"})
    assert tree(made) == before


def test_inputs_without_text_are_named(tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n")
    with pytest.raises(UserError, match="blank.jsonl holds no text"):
        prepare(sources.find(str(tmp_path / "blank.jsonl")), tmp_path / "tokens", tokenizer.Bytes, {})


def test_wide_vocabularies_get_wider_tokens(jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Bytes, "vocabulary_size", 2**16 + 1)
    folder = TokenFolder(prepare(sources.find(str(jsonl)), tmp_path / "tokens", tokenizer.Bytes, {}))
    assert folder.dtype == np.uint32
    monkeypatch.setattr(tokenizer.Bytes, "vocabulary_size", 2**16)
    folder = TokenFolder(prepare(sources.find(str(jsonl)), tmp_path / "small", tokenizer.Bytes, {}))
    assert folder.dtype == np.uint16


def test_bpe_of_a_large_corpus_sees_a_sample(jsonl, monkeypatch):
    found = sources.find(str(jsonl))
    whole = module.train_bpe(found, "text", 300).digest()
    monkeypatch.setattr(module, "BPE_CHARACTERS", jsonl.stat().st_size // 3)
    assert module.train_bpe(found, "text", 300).digest() != whole


def test_workers_import_no_jax():
    code = (
        "import sys, jaxlm.data.prepare, jaxlm.data.__main__; sys.exit('jax' in sys.modules or 'grain' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
