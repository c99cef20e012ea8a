"""Likeness to references: the libraries' own numbers, of greedy text."""

import json

import pytest

pytest.importorskip("sacrebleu", reason="sacrebleu is in the extra scores")
pytest.importorskip("rouge_score", reason="rouge-score is in the extra scores")

import sacrebleu  # noqa: E402
from rouge_score.rouge_scorer import RougeScorer  # noqa: E402

from jaxlm.evaluate.references import read, score  # noqa: E402
from jaxlm.generate.__main__ import main as generate  # noqa: E402

TEXTS = ["the cat sat on the mat today", "a function returns its value", "nothing like it"]
REFERENCES = ["the cat sat on a mat today", "the function returns the value", "quite another text"]


def test_the_numbers_are_the_libraries_own():
    found = score(TEXTS, REFERENCES)
    assert found["bleu"] == sacrebleu.corpus_bleu(TEXTS, [REFERENCES]).score > 10
    assert found["chrf"] == sacrebleu.corpus_chrf(TEXTS, [REFERENCES]).score > 10
    for name in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([name])
        each = [scorer.score(b, a)[name].fmeasure for a, b in zip(TEXTS, REFERENCES, strict=True)]
        assert found[name] == pytest.approx(sum(each) / 3, rel=1e-12) and 0.2 < found[name] < 1
    assert found["rouge2"] < found["rouge1"]
    assert score(REFERENCES, REFERENCES)["bleu"] == pytest.approx(100)
    assert "tok:13a" in found["bleu_signature"]


def test_the_command(run, evaluate, tmp_path, capfd):
    prompts = ["the value", "every other function is returned to its", "kept"]
    lines = [{"prompt": prompt, "reference": "the function", "number": i} for i, prompt in enumerate(prompts)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    options = [f"--references={tmp_path / 'a.jsonl'}", "--max-tokens=6", f"--out={tmp_path / 'out.json'}"]
    code, out, _ = evaluate(*options, "--data.batch-size=2")
    found = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and f"{found['chrf']:.4f}" in out and "ROUGE-L" in out
    assert {key: found[key] for key in ("bleu", "rougeL")} == {
        key: score(found["texts"], ["the function"] * 3)[key] for key in ("bleu", "rougeL")
    }
    for prompt, text in zip(prompts, found["texts"], strict=True):
        generate([f"--run={run}", f"--prompt={prompt}", "--temperature=0", "--max-tokens=6"])
        assert capfd.readouterr().out == f"{prompt}{text}\n"
    whole = found["texts"][0]
    evaluate(*options, "--documents=1", f"--stop={whole[2:4]}")
    (text,) = json.loads((tmp_path / "out.json").read_text())["texts"]
    assert text == whole[: whole.index(whole[2:4])]


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "is empty"),
        ('{"prompt": "a", "reference": "b"}\n{"prompt": "a"}', "line 2"),
        ('{"prompt": "a", "reference": ["b"]}', "line 1"),
        ("[" * 9999, "line 1"),
    ],
)
def test_a_bad_file_is_named(content, words, tmp_path):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        read(tmp_path / "a.jsonl")
    assert "--references=" in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--references=/nowhere.jsonl"], ["--references=/nowhere.jsonl"]),
        (["--references=a", "--tasks=b"], ["--tasks and --references"]),
        (["--references=a", "--batches=2"], ["--batches has no effect on --references"]),
        (["--references=a", "--shots=2"], ["--shots has no effect"]),
        (["--stop=a"], ["--stop has no effect on perplexity"]),
        (["--references=a", "--data.split=all"], ["--data.split has no effect"]),
        (["--references=a", "--data.batch-size=0"], ["--data.batch-size=0"]),
    ],
)
def test_mistakes_end_in_one_line(argv, words, evaluate):
    code, out, err = evaluate(*argv)
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, "") and all(word in line for word in words), line
