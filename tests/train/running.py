"""Runs of the loop that are small enough for tests."""

from pathlib import Path

from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.metrics.jsonl import read
from jaxlm.train import loop

ROOT = Path(__file__).parents[2]


def arguments(corpus: Path, run: Path, **keys: object) -> list[str]:
    base = {
        "data.path": corpus,
        "data.cache": corpus.parent / "cache",
        "data.tokenizer": "bytes",
        "data.sequence-length": 32,
        "data.batch-size": 8,
        "model.layers": 2,
        "model.embed": 32,
        "model.heads": 2,
        "model.mlp": 64,
        "train.steps": 8,
        "train.log-every": 1,
        "checkpoint.every": 4,
        "eval.every": 4,
        "eval.batches": 2,
        "eval.sample-tokens": 8,
        "optimizer.warmup-steps": 2,
        "run": run,
    }
    keys = {key.replace("__", ".").replace("_", "-"): value for key, value in keys.items()}
    return [f"--{key}={value}" for key, value in (base | keys).items()]


def train(corpus: Path, run: Path, **keys: object) -> None:
    loop.run(load(RunConfig, arguments(corpus, run, **keys))[0])


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read(run / "metrics.jsonl")}
