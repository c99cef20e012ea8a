"""What a device needs for a longer sequence on more devices: context and sequence parallelism.

    python benchmarks/sequence_memory.py --out=benchmarks/results/sequence_memory.json

Context: temporaries of one compiled train step, on simulated devices, of sequences that grow as `cp` does, so that a
device always has as many tokens. Sequence: the same of one sequence length on `tp`, without and with sequence
parallelism, by rematerialisation policy. All is read from the compiled program; nothing is timed.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

import report

from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import assemble

MODEL = (
    *("--model.vocabulary=512", "--model.positions=rotary", "--model.norm=rms", "--model.gated=true"),
    *("--model.heads=8", "--model.layers=4", "--data.batch-size=2"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/sequence_memory.py: memory of a device by length of the sequence, context and tensor axes."""

    out: str | None = None
    """JSON file to write the figures to."""
    methods: tuple[str, ...] = ("ring", "allgather", "ulysses")
    """Ways of attention over cp."""
    sizes: tuple[int, ...] = (2, 4, 8)
    """Sizes of cp; the last is compared with the first."""
    tokens: int = 256
    """Tokens of a sequence on each device."""


def temporary_bytes(mesh: str, length: int, *flags: str) -> int:
    """Of a device, in one compiled train step."""
    config = load(RunConfig, [f"--mesh={mesh}", *MODEL, f"--data.sequence-length={length}", *flags])[0]
    spec, devices = parse(mesh), meshes.build(parse("dp8"))[0].devices.flat
    compiled = assemble(config, meshes.from_devices(spec, list(devices)[: spec.device_count]), None).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def say(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def context(options: Options) -> dict[str, Any]:
    """Bytes by method and size of cp, and the last size's over the first's."""
    found = {}
    for method in options.methods:
        row: dict[str, Any] = {}
        for size in options.sizes:
            length = size * options.tokens
            row[f"cp{size}, {length} tokens"] = temporary_bytes(f"cp{size}", length, f"--context.method={method}")
        sizes = list(row.values())
        found[method] = say(row | {"ratio": round(sizes[-1] / sizes[0], 4)})
    return found


def sequence(options: Options) -> dict[str, Any]:
    """Bytes on tp4 by policy, without and with sequence parallelism."""
    found = {}
    for remat in ("none", "selective", "full"):
        row: dict[str, Any] = {
            asked: temporary_bytes("tp4", 1024, f"--context.sequence-parallel={asked}", f"--remat={remat}")
            for asked in ("off", "on")
        }
        found[f"tp4, 1024 tokens, remat {remat}"] = say(row | {"ratio": round(row["on"] / row["off"], 4)})
    return found


def main(argv: list[str]) -> None:
    options = load(Options, argv)[0]
    figures = {"context": context(options), "sequence_parallel": sequence(options)}
    report.write(options.out, "sequence_memory.py", argv, figures)


if __name__ == "__main__":
    run(main)
