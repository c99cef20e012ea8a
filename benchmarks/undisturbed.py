"""Whether a run that was disturbed is the undisturbed one, bit for bit; and the text that both read."""

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import Store
from jaxlm.metrics.jsonl import read

TIMED = ("step_seconds", "data_wait_seconds", "tokens_per_second", "tflops_per_device", "mfu")
"""What metrics.jsonl says of the clock."""


def differences(whole: Path, other: Path, last: int) -> list[str]:
    """What is not the same in two run folders: logged and held-out numbers, the sample, and of checkpoint `last` the
    positions and arrays."""
    found = []
    for name in ("metrics.jsonl", "eval.jsonl"):
        sides = [_lines(at / name) for at in (whole, other)]
        if [line["step"] for line in sides[0]] != [line["step"] for line in sides[1]]:
            found.append(f"steps of {name}")
        else:
            found += [f"{name} step {a['step']}" for a, b in zip(*sides, strict=True) if a != b]
    samples = [(at / "samples.txt").read_text().strip().splitlines()[-1] for at in (whole, other)]
    found += ["samples.txt"] * (samples[0] != samples[1])
    states = [_checkpoint(at / "checkpoints", last) for at in (whole, other)]
    names = sorted(states[0].keys() | states[1].keys())
    return found + [name for name in names if states[0].get(name) != states[1].get(name)]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMED} for line in read(path)]


def _checkpoint(folder: Path, step: int) -> dict[str, Any]:
    """Positions, what is known of the losses before, and the bytes of arrays, by name."""
    with Store(folder) as store:
        meta, leaves = store.meta(step), manifest.read_meta(folder, step)["leaves"]
        wanted = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
        arrays = {name: np.asarray(leaf).tobytes() for name, leaf in store.restore(step, wanted).items()}
    return arrays | {name: meta[name] for name in ("position", "seen_tokens", "watch")}


def write_corpus(folder: Path, size: int) -> None:
    """`size` documents of as many words."""
    folder.mkdir()
    source = random.Random(0)
    for number in range(size):
        text = " ".join(source.choice(["alpha(1)", "beta(2)", "gamma(3)", "delta(4)"]) for _ in range(size))
        (folder / f"{number}.txt").write_text(text)
