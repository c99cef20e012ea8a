"""Tokens a second and MFU of a recipe on one GPU, beside PyTorch (torch.compile and its flash attention).

    python benchmarks/gpu.py --recipe=gpt2_124m_dp1_h200 --batch-size=64 --out=benchmarks/results/gpu_gpt2_124m.json
    python benchmarks/gpu.py --recipe=llama3_1b_fsdp8_h100 --batch-size=4 --out=benchmarks/results/gpu_llama3_1b.json

The recipe's model and sequence length on mesh dp1, one microbatch of --batch-size rows of random tokens, one document a
row. MFU counts causal attention half and neither recomputation nor padding (`jaxlm.metrics.flops`). The two run one
after the other, because each wants the whole memory of the GPU.
"""

import contextlib
import json
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import jax
import report
from beside import random_batch, sizes, torch_turn

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RematPolicy, RunConfig
from jaxlm.metrics import flops
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import assemble


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/gpu.py: tokens a second and MFU of a recipe on one GPU."""

    out: str | None = None
    """JSON file to write the figures to."""
    recipe: str = "gpt2_124m_dp1_h200"
    """The recipe whose model and sequence length are measured."""
    batch_size: int = 64
    """Sequences of a step."""
    remat: RematPolicy = "none"
    """What the backward pass recomputes."""
    turns: int = 5
    """Turns, whose median counts."""
    steps: int = 10
    """Steps of a turn."""
    torch: str = sys.executable
    """The Python that runs the PyTorch step; left out where that has no torch."""
    platform: str = "gpu"
    """Platform that must be there; cpu is for trying the script with a small recipe."""


def ours(config: RunConfig, vocabulary: int, options: Options) -> dict[str, Any]:
    """Median milliseconds of a step, and what the run says of itself."""
    mesh, _ = meshes.build(parse(config.mesh))
    said: list[str] = []
    assembly = assemble(config, mesh, vocabulary, said.append)
    state, compiled = assembly.init(), assembly.compile()
    arrays = random_batch(config, vocabulary, documents=1)
    batch = {name: jax.device_put(x, assembly.batch[name].sharding) for name, x in arrays.items()}
    found = []
    for turn in range(options.turns + 1):
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(options.steps):
            state, metrics = compiled(state, batch)
        jax.block_until_ready((state, metrics))
        if turn:  # the first one warms up
            found.append((time.perf_counter() - began) / options.steps * 1e3)
    memory = compiled.memory_analysis()
    return {
        "milliseconds": statistics.median(found),
        "choices": said,
        "dtype": str(assembly.runtime.dtype),
        "temporary_gigabytes": round(memory.temp_size_in_bytes / 1e9, 2) if memory else None,
        "loss": float(metrics["loss"]),
    }


def theirs(config: RunConfig, vocabulary: int, options: Options) -> dict[str, Any] | None:
    """The same of PyTorch; None where it is not installed."""
    device = "cuda" if options.platform == "gpu" else options.platform
    shape = sizes(config, vocabulary) | {"documents": 1, "device": device}
    with contextlib.ExitStack() as processes:
        turn = torch_turn(options.torch, shape, options.steps, processes)
        if turn is None:
            return None
        return {"milliseconds": statistics.median(turn()[1] for _ in range(options.turns))}


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    flags = ["--mesh=dp1", f"--data.batch-size={options.batch_size}", "--train.microbatches=1"]
    config = load(RunConfig, [f"--config={options.recipe}", *flags, f"--remat={options.remat}"])[0]
    vocabulary = config.model.vocabulary or config.data.vocabulary
    beside = theirs(config, vocabulary, options)  # first: JAX keeps the GPU until the process ends
    device = jax.devices()[0]
    if device.platform != options.platform:
        raise UserError(f"this host has {device.platform} devices, not {options.platform} (--platform)")
    mine = ours(config, vocabulary, options)
    length = config.data.sequence_length
    work = flops.flops_per_token(config.model, vocabulary, length)
    peak = flops.peak_flops(device.device_kind, mine["dtype"])
    rows = {"jaxlm": mine} | ({"torch.compile": beside} if beside else {})
    for name, row in rows.items():
        row["tokens_per_second"] = round(options.batch_size * length / row["milliseconds"] * 1e3)
        row["mfu"] = flops.mfu(work, row["tokens_per_second"], 1, peak)
        print(f"{name:14} {json.dumps(row)}", flush=True)
    about = {"device": device.device_kind, "recipe": options.recipe}
    formula = flops.explain(config.model, vocabulary, length, device.device_kind, mine["dtype"])
    report.write(options.out, "gpu.py", argv, about | {"formula": formula, "figures": rows})


if __name__ == "__main__":
    run(main)
