"""Tasks of lm-eval by a run, and by lm-eval's Hugging Face backend of the same model: the same numbers."""

import json

import pytest

torch = pytest.importorskip("torch", reason="torch is in the extra hf-test")
pytest.importorskip("accelerate", reason="accelerate is in the extra hf-test")
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is in the extra hf-test")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jaxlm.checkpoint.__main__ import main as checkpoint  # noqa: E402
from jaxlm.config import cli  # noqa: E402
from jaxlm.evaluate.__main__ import main  # noqa: E402
from tests.checkpoint.folders import write_model, write_tokenizer  # noqa: E402
from tests.checkpoint.shapes import config_json  # noqa: E402

LIKELIHOOD = 1e-4
"""Promised: nats of each continuation, and of each text."""

QUESTIONS = [
    {"text": f"{first} the value of {second}", "choices": [" function", " other", " return the value"], "answer": i % 3}
    for i, (first, second) in enumerate([("return", "a"), ("def", "self"), ("keep", "every other"), ("the", "caller")])
]
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
num_fewshot: 1
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text * 4}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "words": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: " function"
generation_kwargs: {until: ["\\n", "e "], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, and the questions they ask; no network."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    for name, text in TASKS.items():
        head = f"task: local_{name}\ndataset_path: json\ndataset_name: null\ntest_split: test\n"
        files = (
            f"dataset_kwargs: {{data_files: {{test: {folder / 'questions.json'}}}, cache_dir: {folder / 'cache'}}}\n"
        )
        (folder / f"{name}.yaml").write_text(head + files + text.strip() + "\n")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run that was imported, whose texts begin with an id of their own."""
    folder = tmp_path_factory.mktemp("imported")
    given = config_json("llama", "grouped") | {"num_hidden_layers": 1}
    write_tokenizer(write_model(folder / "theirs", given), bos=True)
    assert checkpoint(["import", f"--from={folder / 'theirs'}", f"--run={folder / 'run'}"]) == 0
    return folder / "run"


def theirs(run, tasks, folder, **options):
    assert checkpoint(["export", f"--run={run}", f"--to={folder / 'model'}"]) == 0
    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=3)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[f"local_{name}" for name in TASKS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


@pytest.fixture
def ours(tasks, tmp_path, monkeypatch):
    """The command's result, and the answers it was made of."""

    def call(run, *argv):
        said = {}
        evaluate = lm_eval.simple_evaluate

        def watched(**keywords):
            found = evaluate(**{**keywords, "log_samples": True})
            said.update(found["samples"])
            return found

        monkeypatch.setattr(lm_eval, "simple_evaluate", watched)
        options = [f"--run={run}", "--tasks=local_*", f"--include={tasks}", f"--out={tmp_path / 'out.json'}", *argv]
        with pytest.raises(SystemExit) as ended:
            cli.run(main, options)
        assert not ended.value.code
        return json.loads((tmp_path / "out.json").read_text()), said

    return call


@pytest.mark.parametrize("kind", [pytest.param("run", marks=pytest.mark.slow), "imported"])
def test_the_numbers_of_the_hugging_face_backend(kind, request, tasks, tmp_path, ours, capfd):
    run = request.getfixturevalue(kind)
    expected = theirs(run, tasks, tmp_path)
    found, answers = ours(run, "--data.batch-size=3", "--mesh=dp2,tp2")
    assert "local_choice" in capfd.readouterr().out
    for name in TASKS:
        pairs = zip(answers[f"local_{name}"], expected["samples"][f"local_{name}"], strict=True)
        for ours_, theirs_ in pairs:
            assert ours_["arguments"] == theirs_["arguments"]
            if name == "words":
                assert ours_["resps"] == theirs_["resps"]
                continue
            for a, b in zip(ours_["resps"], theirs_["resps"], strict=True):
                (one,), (other,) = a, b
                if name == "choice":
                    assert one[1] == other[1]
                    one, other = one[0], other[0]
                assert one == pytest.approx(other, abs=LIKELIHOOD)
        for metric, value in expected["results"][f"local_{name}"].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found["results"][f"local_{name}"][metric] == pytest.approx(value, rel=1e-4), metric
    texts = [sample["resps"][0][0] for sample in answers["local_words"]]
    assert len(set(texts)) > 1 and not any("e " in text for text in texts)


def test_a_chat_template(imported, tasks, tmp_path, ours):
    expected = theirs(imported, tasks, tmp_path, apply_chat_template=True)
    _, answers = ours(imported, "--chat")
    for name in TASKS:
        pairs = zip(answers[f"local_{name}"], expected["samples"][f"local_{name}"], strict=True)
        assert all(a["arguments"] == b["arguments"] for a, b in pairs)
    words = [[sample["resps"] for sample in each["local_words"]] for each in (answers, expected["samples"])]
    assert words[0] == words[1]


@pytest.mark.parametrize(
    "argv, words",
    [
        pytest.param(
            ["--tasks=local_chioce", "--include={0}"],
            ["--tasks=local_chioce", "nearest is local_choice"],
            marks=pytest.mark.slow,  # all of lm-eval's own tasks are read to find it
        ),
        (["--tasks=local_broken", "--include={0}"], ["lm-eval cannot load them", "nowhere.json"]),
        (["--tasks=local_choice", "--include={0}", "--chat"], ["no chat template"]),
        (["--tasks=local_choice", "--include=/nowhere"], ["--include=/nowhere"]),
    ],
)
def test_mistakes_end_in_one_line(argv, words, run, tasks, evaluate):
    head = "task: local_broken\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
    head += "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list: [{metric: word_perplexity}]\n"
    (tasks / "broken.yaml").write_text(head + "dataset_kwargs: {data_files: {test: /nowhere.json}}\n")
    code, out, err = evaluate(*(word.format(tasks) for word in argv))
    (tasks / "broken.yaml").unlink()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and all(word in line for word in words), line
