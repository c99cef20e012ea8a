"""What each kind of parallelism sends in a train step, beside the least that it must.

    python benchmarks/traffic.py --out=benchmarks/results/traffic.json

Measured: the step of one small decoder in float32 is compiled for simulated devices, and its collectives are read from
the program, those in loops as often as they turn. A ring of n devices sends (n - 1) / n of an array to gather it, to
scatter its sum or to exchange its parts, and twice that to sum it whole (`Collective.sent`). A branch counts as taken.

The least, in bytes that a device sends in a step. P are the bytes of its parameters where fsdp did not cut them, D the
width, N its tokens (rows and part of the sequence), L its layers, 4 the bytes of a number, r(n) = (n - 1) / n:

    gradients   2 r(n) P           summed over the n devices of rep, dp, cp (and ep, of what is no expert's); 1 / fsdp
                                   of it where fsdp cuts P. With optimizer.shard=data the same: r P to scatter the sum,
                                   r P to gather what was updated. In a pipeline its first and its last stage hold the
                                   tied table: 2n devices
    fsdp        3 r(n) P           gathered for the forward and again for the backward, gradients scattered
    tp          2 r(n) 4ND (4L + 2)  sums of [N, D]: two of a layer forward and two backward (Shoeybi et al. 2019,
                                   Megatron-LM), the embedding forward, the output layer backward; and 3 of [N] for
                                   the loss: peak, exponentials, target
    pp          2 * 4ND            activations to the next stage and gradients to the one before, of a stage between
                                   two others, all microbatches together
    cp          6 r(n) 4NnKH L     keys and values [N, K, H] of all n parts gathered for the forward and again for the
                                   backward, their gradients scattered, whether around a ring or at once
                ulysses            2 r(n) 4N (2Q + 2K) H L  queries, keys, values and results, forward and backward
    ep          4 r(n) 4NDC L      rows of C experts a token to their experts and back, forward and backward
"""

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import jax
import report

from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import AXES, parse
from jaxlm.config.schema import RunConfig
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.collectives import Collective, collectives
from jaxlm.parallel.rules import axes_of
from jaxlm.train.assemble import Assembly, assemble

MODEL = (
    *("--model.layers=8", "--model.heads=8", "--model.vocabulary=1024", "--model.max-positions=256"),
    *("--data.sequence-length=256", "--data.batch-size=32", "--precision.compute=float32"),
)
EXPERTS = ("--model.experts=8", "--model.mlp=128")
CASES: dict[str, tuple[str, ...]] = {
    "dp8": (),
    "dp4, optimizer.shard=data": ("--optimizer.shard=data",),
    "fsdp8": (),
    "rep2,fsdp4": (),
    "tp4": (),
    "pp4, 1f1b": (),
    "cp4, ring": ("--context.method=ring",),
    "cp4, allgather": ("--context.method=allgather",),
    "cp4, ulysses": ("--context.method=ulysses",),
    "ep4": EXPERTS,
    "ep4, model.capacity-factor=1": (*EXPERTS, "--model.capacity-factor=1"),
    "dp4,tp2": (),
    "dp2,fsdp2,tp2": (),
    "pp4,dp2": (),
    "dp2,cp2,tp2": (),
    "dp2,ep4": EXPERTS,
}
"""A mesh, with words on what else is set -> the options."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/traffic.py: bytes that each kind of parallelism sends, beside the least."""

    out: str | None = None
    """JSON file to write the figures to."""
    only: str = ""
    """Only cases with this in their name."""


def assembled(case: str) -> Assembly:
    mesh = case.partition(", ")[0]
    spec = parse(mesh)
    config = load(RunConfig, [f"--mesh={mesh}", *MODEL, *CASES[case]])[0]
    return assemble(config, meshes.from_devices(spec, jax.devices()[: spec.device_count]), None)


def ring(devices: int) -> float:
    """r(n)."""
    return (devices - 1) / devices


def least(assembly: Assembly) -> dict[str, float]:
    """Bytes that a device must send in a step, by the formulas above."""
    config, layout, m = assembly.config, assembly.runtime.layout, assembly.config.model
    n = {axis: layout.mesh.shape[name] for axis, name in AXES.items()}
    tokens = config.data.batch_size * config.data.sequence_length // layout.axis_size("batch", "sequence")
    layers, activations = m.layers // n["pp"], 4 * tokens * m.embed
    sums = 2 * ring(n["tp"])
    found = weights(assembly, n) | {
        "tp": sums * (activations * (4 * layers + (2 if n["pp"] == 1 else 1)) + 3 * 4 * tokens),
        "cp": 0.0,
        "ep": 4 * ring(n["ep"]) * activations * m.experts_per_token * layers,
        "pp": 0.0,
    }
    if n["cp"] > 1 and config.context.method == "ulysses":
        heads = (2 * m.heads + 2 * m.key_value_heads) // n["tp"]
        found["cp"] = 2 * ring(n["cp"]) * 4 * tokens * heads * m.head_width * layers
    elif n["cp"] > 1:
        found["cp"] = 6 * ring(n["cp"]) * 4 * tokens * n["cp"] * m.key_value_heads // n["tp"] * m.head_width * layers
    if n["pp"] > 1:
        found["pp"] = activations * (2 if n["pp"] > 2 else 1)
    return {name: size for name, size in found.items() if size}


def weights(assembly: Assembly, n: dict[str, int]) -> dict[str, float]:
    """What sums of gradients and copies of parameters need at the least."""
    found = {"gradients": 0.0, "fsdp": 0.0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(assembly.plan.abstract["params"]):
        spec = leaf.sharding.spec
        cut = {axis for dim in range(len(spec)) for axis in axes_of(spec, dim)}
        size = 4 * math.prod(leaf.sharding.shard_shape(leaf.shape)) * (n["fsdp"] if "fsdp" in cut else 1)
        over = [axis for axis in ("rep", "dp", "fsdp", "ep", "cp") if AXES[axis] not in cut]
        holders = 2 if n["pp"] > 1 and assembly.model.config.tied and "tokens" in jax.tree_util.keystr(path) else 1
        whole = size // n["fsdp"] if "fsdp" in cut else size
        found["gradients"] += 2 * ring(holders * math.prod(n[axis] for axis in over)) * whole
        found["fsdp"] += 3 * ring(n["fsdp"]) * size if "fsdp" in cut else 0
    return found


def measured(assembly: Assembly) -> list[Collective]:
    """The collectives of the compiled step."""
    return collectives(assembly.compile().as_text() or "", assembly.runtime.layout.mesh)


def compared(case: str) -> dict[str, Any]:
    """One case: the collectives, what they send, and the least."""
    assembly = assembled(case)
    rows, mesh, terms = measured(assembly), assembly.runtime.layout.mesh, least(assembly)
    sent = sum(row.sent(mesh) for row in rows)
    minimum = sum(terms.values())
    return {
        "sent_bytes": round(sent),
        "least_bytes": round(minimum),
        "ratio": round(sent / minimum, 3),
        "least_by_axis": {name: round(size) for name, size in terms.items()},
        "collectives": [
            {"kind": row.kind, "axes": row.axes, "count": row.count, "sent_bytes": round(row.sent(mesh))}
            for row in rows
        ],
    }


def table(cases: dict[str, dict[str, Any]]) -> str:
    """As docs/parallelism.md shows it."""
    lines = ["| mesh | sent, MB | least, MB | ratio |", "|---|---|---|---|"]
    for case, row in cases.items():
        mesh, comma, words = case.partition(", ")
        sizes = " | ".join(f"{row[key] / 1e6:.2f}" for key in ("sent_bytes", "least_bytes"))
        lines.append(f"| `{mesh}`{comma}{words} | {sizes} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    options, _ = load(Options, argv)
    meshes.build(parse("dp8"))
    cases = {}
    for case in (case for case in CASES if options.only in case):
        cases[case] = compared(case)
        print(f"{case}: {json.dumps(cases[case])}", file=sys.stderr, flush=True)
    print(table(cases))
    report.write(options.out, "traffic.py", argv, {"model": list(MODEL), "experts": list(EXPERTS), "cases": cases})


if __name__ == "__main__":
    run(main)
