"""One train step of the default model: jaxlm beside the hand-written step, and PyTorch where it is installed.

    python benchmarks/step_time.py --out=benchmarks/results/step_time.json

Before anything is timed, both must compute the same loss and gradients from the same parameters and batch. Then they
take turns in one process per mesh, a few steps each, and the median of the ratios of neighbouring turns counts. CPU
time (of all threads) is the figure to quote where others use the machine too; the clock is given beside it.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import handwritten
import jax
import numpy as np
import report
from beside import Turn, random_batch, sizes, torch_turn

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.train import step as steps
from jaxlm.train.assemble import Assembly, assemble

TOLERANCE = 1e-5
"""Largest relative difference of loss and of each gradient leaf."""

WARM_UP = 3
"""Turns that do not count: the process's heap still grows in them."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/step_time.py: jaxlm's train step beside a hand-written one."""

    out: str | None = None
    """JSON file to write the figures to."""
    meshes: tuple[str, ...] = ("dp1", "dp4+tp2")
    """Meshes to measure, each in a process of its own; + instead of a comma."""
    turns: int = 15
    """Turns of each contender."""
    steps: int = 2
    """Steps of a turn."""
    torch: str = sys.executable
    """The Python that runs the PyTorch step; left out where that has no torch."""
    child: bool = False
    """Measure the one mesh in this process (what the others are started with)."""


def shape_of(config: RunConfig, vocabulary: int) -> handwritten.Shape:
    """The hand-written model of the same sizes."""
    names = [field.name for field in fields(handwritten.Shape)]
    return handwritten.Shape(**{name: x for name, x in sizes(config, vocabulary).items() if name in names})


def by_hand(params: dict[str, Any]) -> dict[str, Any]:
    """jaxlm's parameters (or gradients), on the host, as the hand-written step has them."""
    blocks = jax.tree.map(np.asarray, params["blocks"])
    layers, embed = blocks["mlp_norm"]["scale"].shape
    heads = [blocks["attention"][name] for name in ("query", "key", "value")]
    return {
        "tokens": np.asarray(params["tokens"]["embedding"]),
        "positions": np.asarray(params["positions"]["embedding"]),
        "final_norm": jax.tree.map(np.asarray, params["final_norm"]),
        "blocks": {
            "attention_norm": blocks["attention_norm"],
            "qkv": {
                "kernel": np.stack([h["kernel"].reshape(layers, embed, embed) for h in heads], 2),
                "bias": np.stack([h["bias"].reshape(layers, embed) for h in heads], 1),
            },
            "output": {
                "kernel": blocks["attention"]["output"]["kernel"].reshape(layers, embed, embed),
                "bias": blocks["attention"]["output"]["bias"],
            },
            "mlp_norm": blocks["mlp_norm"],
            "up": blocks["mlp"]["up"],
            "down": blocks["mlp"]["down"],
        },
    }


def check(assembly: Assembly, params: Any, batch: dict[str, np.ndarray], shape: handwritten.Shape, mesh: Any) -> float:
    """The largest relative difference of loss and gradients between the two.

    Raises:
        UserError: it is above TOLERANCE.
    """
    theirs = partial(
        steps.gradients, assembly.model, runtime=assembly.runtime, config=assembly.config,
        shardings=assembly.plan.gradients,
    )  # fmt: skip
    placed = {name: jax.device_put(x, assembly.batch[name].sharding) for name, x in batch.items()}
    grads, total, count, _ = jax.jit(lambda params, batch: theirs(params, batch))(params, placed)
    cut = handwritten.place(by_hand(params), mesh, handwritten.specs())
    ours = jax.value_and_grad(partial(handwritten.loss, shape=shape, mesh=mesh))
    value, wanted = jax.jit(ours)(cut, handwritten.place_batch(batch, mesh))
    pairs = zip(jax.tree.leaves(by_hand(grads)), jax.tree.leaves(jax.device_get(wanted)), strict=True)
    worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    worst = max(worst, abs(float(total) / float(count) / float(value) - 1))
    if worst > TOLERANCE:
        raise UserError(f"jaxlm and the hand-written step differ by {worst:.1e} of the gradient, more than {TOLERANCE}")
    return worst


def turn_of(compiled: jax.stages.Compiled, state: Any, batch: Any, count: int) -> Turn:
    """Steps that go on from where the last turn stopped."""
    kept = [compiled(state, batch)[0]]

    def turn() -> tuple[float, float]:
        cpu, clock = time.process_time(), time.perf_counter()
        for _ in range(count):
            kept[0], metrics = compiled(kept[0], batch)
        jax.block_until_ready((kept[0], metrics))
        return (time.process_time() - cpu) / count * 1e3, (time.perf_counter() - clock) / count * 1e3

    return turn


def measure(options: Options) -> dict[str, Any]:
    """All contenders on one mesh."""
    spec = parse(options.meshes[0].replace("+", ","))
    built, _ = meshes.build(spec)
    config = load(RunConfig, [f"--mesh={spec}"])[0]
    vocabulary = config.data.vocabulary
    config = replace(config, model=replace(config.model, vocabulary=vocabulary))
    batch = random_batch(config, vocabulary)
    assembly = assemble(config, built, vocabulary)
    state = assembly.init()
    mesh = handwritten.make_mesh(spec.sizes["dp"], spec.sizes["tp"])
    written_out = shape_of(config, vocabulary)
    worst = check(assembly, state["params"], batch, written_out, mesh)
    own = handwritten.place_batch(batch, mesh)
    params = by_hand(state["params"])
    turns: dict[str, Turn] = {}
    memory: dict[str, float] = {}
    for name, shape in {
        "hand-written": written_out,
        "hand-written, loop over layers": replace(written_out, unroll=1),
    }.items():
        fresh = handwritten.start(params, mesh)
        compiled = handwritten.compile_step(fresh, own, shape, mesh)
        memory[name] = compiled.memory_analysis().temp_size_in_bytes / 1e6
        turns[name] = turn_of(compiled, fresh, own, options.steps)
    compiled = assembly.compile()
    memory["jaxlm"] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    placed = {name: jax.device_put(x, assembly.batch[name].sharding) for name, x in batch.items()}
    turns["jaxlm"] = turn_of(compiled, state, placed, options.steps)
    with contextlib.ExitStack() as processes:
        if spec.device_count == 1:
            turn = torch_turn(options.torch, sizes(config, vocabulary), options.steps, processes)
            turns |= {"torch.compile": turn} if turn else {}
        found = {name: [] for name in turns}
        for count in range(WARM_UP + options.turns):
            for name, turn in turns.items():
                pair = turn()
                if count >= WARM_UP:
                    found[name].append(pair)
    return {
        "largest_difference": worst,
        "steps": {name: summary(pairs, found["hand-written"]) for name, pairs in found.items()},
        "temporary_megabytes": memory,
    }


def summary(pairs: list[tuple[float, float]], base: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, and the median over the turns of the ratio to `base`'s."""
    result = {}
    for index, kind in enumerate(("cpu", "clock")):
        own, other = [p[index] for p in pairs], [p[index] for p in base]
        result[f"{kind}_milliseconds"] = round(statistics.median(own), 2)
        result[f"{kind}_ratio"] = round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)
    return result


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    if options.child:
        print(json.dumps(measure(options)))
        return
    found = {}
    for mesh in options.meshes:
        command = [sys.executable, __file__, *argv, f"--meshes={mesh}", "--child=true"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        found[mesh.replace("+", ",")] = json.loads(child.stdout.splitlines()[-1])
        for name, row in found[mesh.replace("+", ",")]["steps"].items():
            print(f"{mesh:8} {name:32} {json.dumps(row)}", flush=True)
    report.write(options.out, "step_time.py", argv, found)


if __name__ == "__main__":
    run(main)
