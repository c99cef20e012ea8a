"""`make kills`: kill a run at every point where it can hurt, many times, and show that nothing was lost.

A chain is one small run that is killed by SIGKILL at a named point (`jaxlm.config.faultpoints`), started again by the
same command and killed again, until it ends by itself. Then it must be, bit for bit, the run that nobody disturbed:
losses, learning rates, gradient norms, held-out losses, sample, positions in the data and every array of the last
checkpoint. Where the kill falls is drawn from a seed, in equal shares over the visits of a point and over time.
"""

import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.undisturbed import differences, write_corpus
from jaxlm.checkpoint.provenance import git_revision
from jaxlm.config.cli import run
from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.faultpoints import POINTS, VARIABLE
from jaxlm.config.files import write_atomically
from jaxlm.config.load import load

ROOT = Path(__file__).parents[2]

STEPS, EVERY, DOCUMENTS = 40, 2, 60

VISITS = {"step": 6, "tokenization": 8}
"""Point -> the latest visit at which a process is killed there."""

LATEST_VISIT = 3

DELAYS = {"step": 0.03, "array-write": 0.06, "data-state": 0.01, "before-commit": 0.01, "tokenization": 0.002}
"""Point -> seconds within which the kill falls after the process came there; at other points it falls at once."""

STRATA = 5
"""Parts into which that time is cut; kills fall into each in turn."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m tests.train.kills: kill runs at every point, and compare them with one that nobody disturbed."""

    out: str | None = None
    """JSON file of the results."""
    kills: int = 50
    """Kills at each point."""
    points: tuple[str, ...] = tuple(POINTS)
    """The points."""
    seed: int = 0
    """Seed of where the kills fall."""
    jobs: int = 1
    """Runs at a time."""


def main(argv: list[str]) -> int:
    """Write the results. Exit code 1 where a run was not the undisturbed one."""
    options, _ = load(Options, argv)
    if unknown := set(options.points) - set(POINTS):
        raise UserError(f"no point {', '.join(sorted(unknown))}; the points are {' '.join(POINTS)} (--points)")
    about = {"command": f"python -m tests.train.kills {' '.join(argv)}", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    about |= {"git_revision": git_revision(), "python": platform.python_version(), "seed": options.seed}
    about |= {name: version(name) for name in ("jax", "orbax-checkpoint")}
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="jaxlm-kills-") as name, ThreadPoolExecutor(options.jobs) as pool:
        folder = Path(name)
        write_corpus(folder / "corpus", DOCUMENTS)
        whole = folder / "whole"
        finish(folder, whole)
        work = {pool.submit(campaign, folder, whole, point, options.kills, options.seed) for point in options.points}
        for done in as_completed(work):
            row = done.result()
            rows[row["point"]] = row
            print(
                f"{row['point']:14} {row['kills']:3} kills in {row['runs']} runs, {row['different']} different",
                flush=True,
            )
            if options.out:
                ordered = [rows[point] for point in POINTS if point in rows]
                write_atomically(Path(options.out), json.dumps(about | {"points": ordered}, indent=1) + "\n")
    return int(any(row["different"] for row in rows.values()))


def campaign(folder: Path, whole: Path, point: str, kills: int, seed: int) -> dict[str, Any]:
    """Chains of kills at `point` until there are enough."""
    falls: list[dict[str, Any]] = []
    different: list[str] = []
    for number in count():
        left = kills - len(falls)
        if left <= 0:
            break
        chosen = draw(point, random.Random(f"{seed} {point} {number}"))
        run_folder = folder / f"{point}-{number}"
        falls += chain(folder, run_folder, chosen, left)
        different += [f"{run_folder.name}: {what}" for what in differences(whole, run_folder, STEPS)]
        shutil.rmtree(run_folder)
        shutil.rmtree(cache(folder, run_folder), ignore_errors=True)
    return {
        "point": point,
        "kills": len(falls),
        "runs": number,
        "different": len(different),
        "differences": different[:20],
        "visits": sorted({fall["visit"] for fall in falls}),
        "latest_delay_seconds": max(fall["delay_seconds"] for fall in falls),
        "resumed_from": sorted({fall["resumed_from"] for fall in falls if fall["resumed_from"] is not None}),
    }


def draw(point: str, source: random.Random) -> Iterator[tuple[int, float]]:
    """(visit, seconds after it) of one kill after the other."""
    latest = VISITS.get(point, LATEST_VISIT)
    for number in count():
        stratum = (number + source.random()) % STRATA / STRATA
        # The first visit in every process would let a run get nowhere.
        yield 1 + (number + source.randrange(2)) % latest, round(DELAYS.get(point, 0.0) * stratum, 6)


def chain(folder: Path, run_folder: Path, draws: Iterator[tuple[int, float]], most: int) -> list[dict[str, Any]]:
    """Kill and restart one run until it ends by itself, or was killed `most` times and then left alone."""
    point = run_folder.name.rpartition("-")[0]
    falls: list[dict[str, Any]] = []
    while len(falls) < most:
        visit, delay = next(draws)
        before = last_step(run_folder)
        code, output = start(folder, run_folder, f"{point}:{visit}:kill" + (f"+{delay:.6f}" if delay else ""))
        if code == 0:
            return falls
        if code != -signal.SIGKILL:
            raise CommandError(f"{run_folder.name} ended with {code} instead of being killed: {output[-500:]}")
        falls.append({"visit": visit, "delay_seconds": delay, "resumed_from": before})
    finish(folder, run_folder)
    return falls


def finish(folder: Path, run_folder: Path) -> None:
    code, output = start(folder, run_folder, None)
    if code:
        raise CommandError(f"{run_folder.name} ended with {code}: {output[-500:]}")


def start(folder: Path, run_folder: Path, faults: str | None) -> tuple[int, str]:
    """Exit code and output of the training command."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    environment.pop(VARIABLE, None)
    if faults:
        environment[VARIABLE] = faults
    keys = {
        "mesh": "dp2",
        "run": run_folder,
        "data.path": folder / "corpus",
        "data.cache": cache(folder, run_folder),
        "data.tokenizer": "bytes",
        "data.sequence-length": 16,
        "data.batch-size": 4,
        "model.layers": 1,
        "model.embed": 16,
        "model.heads": 2,
        "model.mlp": 32,
        "model.dropout": 0.1,
        "train.steps": STEPS,
        "train.log-every": 1,
        "checkpoint.every": EVERY,
        "eval.every": 10,
        "eval.batches": 1,
        "eval.sample-tokens": 8,
        "optimizer.warmup-steps": 2,
    }
    command = [sys.executable, "-m", "jaxlm.train", *(f"--{key}={value}" for key, value in keys.items())]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return done.returncode, done.stdout


def cache(folder: Path, run_folder: Path) -> Path:
    """Where a run's tokens are: with others', or its own where their making is what is killed."""
    return folder / (f"cache-{run_folder.name}" if run_folder.name.startswith("tokenization") else "cache")


def last_step(run_folder: Path) -> int | None:
    """The newest committed step."""
    found = [int(path.parent.name) for path in (run_folder / "checkpoints").glob("*/manifest.json")]
    return max(found, default=None)


if __name__ == "__main__":
    run(main)
