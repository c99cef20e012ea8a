"""From the start of the process to the end of the first step: jaxlm's train command beside the hand-written step.

    python benchmarks/startup.py --out=benchmarks/results/startup.json

Each start is a new process; the two take turns. A cold start finds an empty compilation cache, a warm one the cache
that the cold one left. jaxlm's start includes what a run does before it trains: reading the configuration, opening the
corpus (prepared beforehand), the run folder; the hand-written one makes up its tokens.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import report
from step_time import shape_of

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import DataConfig, RunConfig
from jaxlm.data.corpus import open_corpora

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/startup.py: process start to first step, jaxlm beside the hand-written step."""

    out: str | None = None
    """JSON file to write the figures to."""
    meshes: tuple[str, ...] = ("dp1", "dp4+tp2")
    """Meshes to measure; + instead of a comma."""
    starts: int = 5
    """Cold and warm starts of each contender."""


def commands(mesh: str, folder: str) -> dict[str, list[str]]:
    spec = parse(mesh)
    quick = ("--train.steps=1", "--eval.every=0", "--eval.sample-tokens=0", "--checkpoint.every=0", "--resume=never")
    config = RunConfig()
    sizes = json.dumps(asdict(shape_of(config, config.data.vocabulary)))
    dp, tp = (str(spec.sizes[axis]) for axis in ("dp", "tp"))
    return {
        "hand-written": [sys.executable, str(HERE / "handwritten.py"), dp, tp, sizes],
        "jaxlm": [sys.executable, "-m", "jaxlm.train", f"--mesh={mesh}", f"--run={folder}/run", *quick],
    }


def seconds(command: list[str], cache: str) -> tuple[float, float]:
    """Clock and CPU seconds until the command says that its first step is done; then it is killed."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
        said = []
        for line in child.stdout:
            said.append(line)
            if line.startswith("step 1/1"):
                clock = time.perf_counter() - began
                child.kill()
                break
        else:
            raise UserError(f"{' '.join(command)} ended without a step:\n{''.join(said)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(mesh: str, starts: int) -> dict[str, dict[str, float]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as folder:
            for name in commands(mesh, folder):
                for kind in ("cold", "warm"):
                    with tempfile.TemporaryDirectory() as run_folder:
                        command = commands(mesh, run_folder)[name]
                        found.setdefault(f"{name}, {kind}", []).append(seconds(command, f"{folder}/{name}"))
    rows = {}
    for name, pairs in found.items():
        kind = name.split(", ")[1]
        row = {}
        for index, unit in enumerate(("clock", "cpu")):
            own = [pair[index] for pair in pairs]
            row[f"{unit}_seconds"] = round(statistics.median(own), 2)
            for label, other in (("hand_written", f"hand-written, {kind}"), ("cold", f"{name.split(', ')[0]}, cold")):
                ratios = [a / b[index] for a, b in zip(own, found[other], strict=True)]
                row[f"{unit}_over_{label}"] = round(statistics.median(ratios), 3)
        rows[name] = row
    return rows


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    open_corpora(DataConfig())
    figures = {}
    for mesh in options.meshes:
        figures[mesh.replace("+", ",")] = measure(mesh.replace("+", ","), options.starts)
        for name, row in figures[mesh.replace("+", ",")].items():
            print(f"{mesh:8} {name:20} {row}", flush=True)
    report.write(options.out, "startup.py", argv, figures)


if __name__ == "__main__":
    run(main)
