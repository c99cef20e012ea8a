import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from jaxlm.config import load as loading
from jaxlm.config.errors import UserError
from jaxlm.config.load import check_run_folder, differences, dump, load, read_file
from jaxlm.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig

ROOT = Path(__file__).parents[2]


def run_config(*argv):
    return load(RunConfig, argv)[0]


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return f"--config={path}"


def complaint(*argv, cls=RunConfig):
    with pytest.raises(UserError) as caught:
        load(cls, argv, ("print-config",))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_need_nothing():
    assert load(RunConfig, []) == (RunConfig(), frozenset())


@pytest.mark.parametrize(
    "argv, key, value",
    [
        (["--data.batch-size=32"], "data.batch_size", 32),
        (["--data.batch_size", "1_000"], "data.batch_size", 1000),
        (["--data.batch_size=32", "--data.batch-size=8"], "data.batch_size", 8),
        (["--optimizer.learning-rate=3e-4"], "optimizer.learning_rate", 3e-4),
        (["--optimizer.learning-rate", "-1"], "optimizer.learning_rate", -1.0),
        (["--model.gated"], "model.gated", True),
        (["--model.gated", "yes"], "model.gated", True),
        (["--model.no-tied"], "model.tied", False),
        (["--no-model.tied"], "model.tied", False),
        (["--model.tied=false"], "model.tied", False),
        (["--no-simulate"], "simulate", False),
        (["--model.kv-heads=2"], "model.kv_heads", 2),
        (["--metrics.wandb=none"], "metrics.wandb", None),
        (["--model.windows=4096,0"], "model.windows", (4096, 0)),
        (["--model.windows="], "model.windows", ()),
        (["--model.biases=qkv, mlp"], "model.biases", ("qkv", "mlp")),
        (["--model.biases="], "model.biases", ()),
        (["--data.path=a, b"], "data.path", ("a", "b")),
        (["--eval.prompt=a=b"], "eval.prompt", "a=b"),
        (["--eval.prompt="], "eval.prompt", ""),
        (["--profile.steps=10:13"], "profile.steps", "10:13"),
    ],
)
def test_overrides(argv, key, value):
    assert {k: b for k, _, b in differences(RunConfig(), run_config(*argv))}.get(key, ...) in (value, ...)
    assert dict(loading.items(run_config(*argv)))[key] == value
    assert type(dict(loading.items(run_config(*argv)))[key]) is type(value)


def test_a_recipe_means_the_same_as_the_command_line(tmp_path):
    text = """
    run: 2026
    mesh: dp4,tp2
    remat: none
    model: {kv-heads: 2, windows: [4096, 0], biases: []}
    data:
      path: stdlib
      batch_size: 1_000
    optimizer.learning_rate: 3e-4
    profile: {steps: 10:13}
    metrics: {wandb: null}
    eval:
    """
    expected = RunConfig(
        run="2026",
        mesh="dp4,tp2",
        model=ModelConfig(kv_heads=2, windows=(4096, 0), biases=()),
        data=DataConfig(batch_size=1000),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        profile=run_config("--profile.steps=10:13").profile,
    )
    assert run_config(recipe(tmp_path, text)) == expected


def test_precedence(tmp_path):
    config = recipe(tmp_path, "train: {steps: 7, log_every: 3}")
    assert run_config("--train.steps=9", config).train.steps == 9
    assert run_config("--train.steps=9", config).train.log_every == 3


def test_an_empty_recipe_is_the_defaults(tmp_path):
    assert run_config(recipe(tmp_path, "# nothing\n")) == RunConfig()


def test_flags_are_not_configuration():
    config, flags = load(RunConfig, ["--dry_run", "--print-config"], ("print-config", "dry-run"))
    assert config == RunConfig()
    assert flags == {"print-config", "dry-run"}


def test_round_trip(tmp_path):
    config = run_config("--data.path=a,b", "--data.weights=1,2e-9", "--eval.prompt=x: [é\n'", "--metrics.wandb=no")
    (tmp_path / "config.yaml").write_text(dump(config))
    assert read_file(RunConfig, tmp_path / "config.yaml") == config
    assert yaml.safe_load(dump(config))["data"]["weights"] == [1.0, 2e-9]  # any YAML reader agrees


@pytest.mark.parametrize(
    "argument, parts",
    [
        ("--optimizer.learningrate=1", ["--optimizer.learningrate", "--optimizer.learning-rate"]),
        ("--learning-rate=1", ["--learning-rate", "--optimizer.learning-rate"]),
        ("--seed=1", ["--data.seed", "--train.seed"]),
        ("--data.batchsize=1", ["--data.batch-size"]),
        ("--print-confg", ["--print-config"]),
        ("--model=gpt2", ["--model is a section", "--model.architecture"]),
        ("--no-run", ["--no-run"]),
        ("--train.steps=ten", ["--train.steps='ten'", "whole number"]),
        ("--train.steps=1e6", ["--train.steps='1e6'", "whole number"]),
        ("--train.steps=1.0", ["whole number"]),
        ("--train.steps", ["--train.steps", "needs a value"]),
        ("--train.steps=", ["whole number"]),
        ("--optimizer.learning-rate=fast", ["--optimizer.learning-rate='fast'", "3e-4"]),
        ("--optimizer.learning-rate=nan", ["nan", "finite"]),
        ("--optimizer.learning-rate=1e999", ["finite"]),
        ("--model.gated=maybe", ["--model.gated='maybe'", "true or false"]),
        ("--optimizer.name=adamww", ["--optimizer.name='adamww'", "nearest is adamw", "lion"]),
        ("--model.windows=1,,2", ["--model.windows", "empty item"]),
        ("--model.windows=1,x", ["--model.windows='x'"]),
        ("--print-config=yes", ["--print-config", "no value"]),
        ("--no-simulate=1", ["--no-simulate", "no value"]),
        ("train", ["unexpected argument 'train'"]),
        ("-m", ["unexpected argument '-m'"]),
        ("--", ["unexpected argument '--'"]),
        ("--config=configs", ["no such recipe"]),
        ("--config=tiny_dp4tp2_gpu", ["no such recipe", "tiny_dp4tp2_cpu"]),
        ("--config=" + "x" * 5000, ["no such recipe"]),
        ("--config=a\0b", ["no such recipe"]),
        ("--run=a\0b", ["NUL"]),
        ("--" + "x" * 5000, ["unknown key"]),
        ("--eval.every=" + "x" * 5000, ["whole number"]),
    ],
)
def test_mistakes_on_the_command_line(argument, parts):
    message = complaint(argument)
    assert all(part in message for part in parts), message
    assert len(message) < 400


@pytest.mark.parametrize(
    "text, parts",
    [
        ("modle: {layers: 2}", ["modle.layers", "--model.layers"]),
        ("model: {layer: 2}", ["'model.layer'", "--model.layers"]),
        ("model: 3", ["section"]),
        ("run: {a: b}", ["run=", "not text"]),
        ("train: {steps: [1]}", ["train.steps", "whole number"]),
        ("train: {steps: null}", ["train.steps", "whole number"]),
        ("train: {steps: 1, steps: 2}", ["'steps' stands twice", "line 1"]),
        ("train: {log-every: 1, log_every: 2}", ["train.log_every stands twice"]),
        ("train.steps: 1\ntrain: {steps: 2}", ["train.steps stands twice"]),
        ("- a", ["key: value"]),
        ("just text", ["key: value"]),
        ("a: [", ["line 1"]),
        ("a: &x 1\nb: *x", ["aliases"]),
        ("? [a]\n: b", ["key is not text"]),
        ("<<: {run: x}", ["unknown key"]),
        ("run: a\n---\nrun: b", ["not a recipe"]),
        ("[" * 20000, ["nested too deep"]),
        ('run: "\\UFFFFFFFF"', ["not a recipe"]),
        ("run: \x07", ["not a recipe"]),
        ("a: 1\n" * 300_000, ["bytes"]),
        ("run: !!python/object/apply:os.system [echo]", ["run=", "not text"]),
    ],
)
def test_mistakes_in_a_recipe(tmp_path, text, parts):
    message = complaint(recipe(tmp_path, text))
    assert "recipe.yaml" in message
    assert all(part in message for part in parts), message
    assert len(message) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("call", ["apply:os.mkdir [{}]", "new:os.mkdir [{}]"])
def test_a_recipe_runs_nothing(tmp_path, call):
    canary = tmp_path / "canary"
    complaint(recipe(tmp_path, f"run: !!python/object/{call.format(canary)}"))
    assert not canary.exists()


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in complaint(f"--config={tmp_path / 'x.yaml'}")


def test_a_field_without_a_default_must_be_given():
    @dataclass(frozen=True, kw_only=True)
    class Verb:
        """A verb."""

        run: str
        """The run."""

    assert load(Verb, ["--run=x"])[0].run == "x"
    assert "--run must be given" in complaint(cls=Verb)


def test_a_recipe_by_its_bare_name_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run_config("--config=tiny_dp4tp2_cpu").mesh == "dp4,tp2"


def hold(folder, config=None):
    """A run folder that holds `config`."""
    config = config or RunConfig()
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(replace(config, run=str(folder))))
    return f"--run={folder}"


def test_run_folder_is_made(tmp_path):
    folder = tmp_path / "a" / "b"
    assert check_run_folder(run_config(f"--run={folder}")) == folder
    assert folder.is_dir()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        "--mesh=dp2",
        "--train.steps=9",
        "--data.batch-size=8",
        "--optimizer.shard=data",
        "--eval.every=0",
        "--remat=full",
    ],
)
def test_a_run_continues_under_what_may_change(tmp_path, change):
    check_run_folder(run_config(hold(tmp_path / "r"), change))


@pytest.mark.parametrize(
    "change", ["--optimizer.weight-decay=1", "--model.gated", "--data.path=x", "--train.seed=1", "--data.seed=1"]
)
def test_a_different_run_is_refused(tmp_path, change):
    with pytest.raises(UserError) as caught:
        check_run_folder(run_config(hold(tmp_path / "r"), change))
    key, _, value = change.removeprefix("--").partition("=")
    for part in (key.replace("-", "_"), value, f"--{key}=", "another --run"):
        assert part in str(caught.value)


def test_the_cure_it_names_cures(tmp_path):
    held = hold(tmp_path / "r", run_config("--data.path=a,b c", "--optimizer.weight-decay=0.5"))
    with pytest.raises(UserError, match="data.path"):
        check_run_folder(run_config(held, "--optimizer.weight-decay=0.5"))
    with pytest.raises(UserError, match=r"--optimizer.weight-decay=0\.5 "):
        check_run_folder(run_config(held, "--data.path=a,b c"))


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for run in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing", "x" * 300):
        with pytest.raises(UserError, match="cannot be written"):
            check_run_folder(run_config(f"--run={run}"))


def test_run_folder_with_a_foreign_config(tmp_path):
    (tmp_path / "config.yaml").write_text("layers: 3\n")
    with pytest.raises(UserError, match=r"cannot be continued.*another --run"):
        check_run_folder(run_config(f"--run={tmp_path}"))


def test_what_may_change_names_real_keys():
    keys = loading.kinds(RunConfig)
    for name in loading.MAY_CHANGE:
        assert any(key.startswith(name) if name.endswith(".") else key == name for key in keys), name


def test_help_says_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        load(RunConfig, ["--help"], tuple(loading.FLAGS))
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for key in loading.kinds(RunConfig):
        assert f"\n  --{key.replace('_', '-')}" in text
    for part in (
        "{adamw,adafactor,lion,muon,sgd}",
        "(default: 0.004)",
        "Tokens of a sequence.",
        "--dry-run",
        "--config",
    ):
        assert part in text


def test_help_on_a_word(capsys):
    with pytest.raises(SystemExit):
        load(RunConfig, ["--help=batch-size"])
    assert capsys.readouterr().out.count("\n  --") == 1
    assert "no key has that" in complaint("--help=zebra")


def test_reading_a_configuration_is_quick():
    code = (
        "import time; started = time.process_time()\n"
        "from jaxlm.config import load, schema\n"
        "load.load(schema.RunConfig, ['--config=tiny_dp4tp2_cpu', '--train.steps=3'])\n"
        "print(time.process_time() - started)"
    )
    command = [sys.executable, "-c", code]
    bare = {"PATH": os.environ["PATH"]}  # no coverage in the child
    seconds = min(float(subprocess.check_output(command, cwd=ROOT, env=bare)) for _ in range(5))
    assert seconds < 0.3
