"""What the compiler for TPU makes of the train step, without a TPU: its memory and its collectives, by mesh.

    pip install -e '.[tpu-compile]'
    python benchmarks/tpu_compile.py --out=benchmarks/results/tpu_compile.json

Recipes in full (Llama 3 8B, Mixtral 8x7B) on other meshes than their own, for slices of 64 TPU v5p chips and more: the
program, the compiler and its options are those of a run, only the devices are not there. A program that does not fit
into the memory of a chip is an error of the compiler. Each case has a process of its own.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import jax
import report
from jax.experimental import topologies

from jaxlm.config.checks import check
from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.collectives import axes_in_branches, collectives
from jaxlm.train.assemble import assemble

LLAMA, MIXTRAL = "llama3_8b_fsdp32tp2_h100", "mixtral_8x7b_fsdp8ep8_h100"
CUBE, LARGE = "v5:4x4x4", "v5:4x8x8"
"""Slices of v5p: 64 and 256 chips."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run to compile: a recipe with changes, and the chips it is for."""

    recipe: str = LLAMA
    topology: str = CUBE
    mesh: str
    changes: tuple[str, ...] = ()
    """Options, as on the command line."""


def piped(microbatches: int) -> Case:
    size = (f"--data.batch-size={4 * microbatches}", "--train.microbatches=1")
    return Case(mesh="pp8,fsdp4,tp2", changes=(*size, f"--pipeline.microbatches={microbatches}"))


def long(mesh: str, length: int, method: str, topology: str = CUBE) -> Case:
    changes = ("--data.batch-size=8", "--train.microbatches=1", f"--data.sequence-length={length}")
    return Case(mesh=mesh, topology=topology, changes=(*changes, f"--context.method={method}"))


CASES: dict[str, Case] = {
    "fsdp-tp": Case(mesh="fsdp32,tp2"),
    "pp-fsdp-tp-16": piped(16),
    "pp-fsdp-tp-32": piped(32),
    "cp-ring": long("fsdp8,cp8", 65536, "ring"),
    "cp-ring-larger": long("fsdp8,cp32", 262144, "ring", LARGE),
    "cp-ulysses": long("fsdp8,cp8", 65536, "ulysses"),
    "ep-fsdp": Case(recipe=MIXTRAL, mesh="fsdp8,ep8"),
    "pp-cp-tp": Case(
        mesh="pp4,dp2,cp4,tp2",
        changes=("--data.batch-size=32", "--train.microbatches=1", "--data.sequence-length=16384"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/tpu_compile.py: memory and collectives of train steps compiled for TPU."""

    out: str | None = None
    """JSON file to write the figures to."""
    cases: tuple[str, ...] = tuple(CASES)
    """Cases to compile."""
    case: str | None = None
    """Compile one case in this process and print its figures (what the others are started with)."""


def chips(topology: str) -> list[jax.Device]:
    """Devices to compile for; no platform but CPU is started."""
    # Read by libtpu as it is loaded, which else one process at a time may do.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # these programs are never loaded
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(case: Case) -> dict[str, Any]:
    """What the compiler says of a case."""
    spec = parse(case.mesh)
    config, _ = load(RunConfig, [f"--config={case.recipe}", f"--mesh={case.mesh}", *case.changes])
    check(config, spec)
    said: list[str] = []
    assembly = assemble(config, meshes.from_devices(spec, chips(case.topology)), None, said.append)
    began = time.perf_counter()
    program = assembly.compile(said.append)
    seconds = time.perf_counter() - began
    memory, text, mesh = program.memory_analysis(), program.as_text() or "", assembly.runtime.layout.mesh
    return dataclasses.asdict(case) | {
        "choices": said,
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "collectives": [dataclasses.asdict(row) for row in collectives(text, mesh)],
        "axes_in_branches": sorted(axes_in_branches(text, mesh)),
    }


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    if unknown := {options.case or options.cases[0], *options.cases} - CASES.keys():
        raise UserError(f"no case {', '.join(sorted(unknown))}; the cases are {' '.join(CASES)} (--cases)")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu is not installed: pip install -e '.[tpu-compile]'")
    if options.case:
        print(json.dumps(compiled(CASES[options.case])))
        return
    figures: dict[str, Any] = {}
    for name in options.cases:
        command = [sys.executable, __file__, f"--case={name}"]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = figures[name] = json.loads(child.stdout.splitlines()[-1])
        print(f"{name}: {row['topology']}, {row['mesh']}, compiled in {row['compile_seconds']:.0f} s", flush=True)
        for part in ("argument", "temporary"):
            print(f"    {row[f'{part}_bytes'] / 1e9:.2f} GB of {part} bytes a chip", flush=True)
        for moved in row["collectives"]:
            counts = f"{moved['count']:,} times, {moved['overlapped']:,} of them hidden"
            print(f"    {moved['kind']} over {moved['axes']}: {counts}, {moved['bytes'] / 1e9:.3f} GB", flush=True)
    report.write(options.out, "tpu_compile.py", argv, {"libtpu": version("libtpu"), "cases": figures})


if __name__ == "__main__":
    run(main)
