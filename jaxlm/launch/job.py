"""Which processes an attempt has, on which mesh, and what each of them is told."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxlm.config import checks
from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import MeshSpec, parse
from jaxlm.config.schema import RunConfig
from jaxlm.launch.options import Options
from jaxlm.metrics import heartbeat

SHRINKING = ("rep", "dp", "fsdp")
"""Axes that give up devices when processes are gone, in this order: they cut the batch and keep the model whole."""

OF_A_CLUSTER = ("SLURM_", "OMPI_", "PMI_")
"""What jax would take the number of processes from, which is ours to say."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One attempt, as node 0 tells it to all."""

    attempt: int
    slots: tuple[int, ...]
    """Place of each rank: slot s is process s % processes of node s // processes."""
    mesh: str
    devices: int
    """Of each process."""
    address: str = ""
    """Where rank 0's coordinator is, host:port."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def load(text: str) -> "Plan":
        values = json.loads(text)
        return Plan(**values | {"slots": tuple(values["slots"])})


def choose(config: RunConfig, options: Options, slots: Sequence[int]) -> Plan:
    """The largest plan that `slots` allow: attempt 0, without an address.

    With fewer slots than the job began with, an inferred axis of the mesh shrinks, or else the first of SHRINKING that
    can, so that every process keeps the number of its devices. The batch stays whole: its rows are dealt out anew.

    Raises:
        UserError: not even --min-processes of them can form a mesh.
    """
    asked, total = parse(config.mesh), options.processes * options.nodes
    devices = options.devices or _share(asked, total)
    reason = ""
    for count in range(len(slots), (options.min_processes or total) - 1, -1):
        try:
            mesh = _shrunk(asked, count, total).resolve(count * devices)
            checks.check(replace(config, mesh=str(mesh)), mesh)
        except UserError as error:
            reason = reason or str(error)
            continue
        return Plan(attempt=0, slots=tuple(slots[:count]), mesh=str(mesh), devices=devices)
    raise UserError(reason or f"{len(slots)} of {total} processes are left; --min-processes allows no fewer than "
                    f"{options.min_processes or total}")  # fmt: skip


def command(arguments: Sequence[str], plan: Plan) -> list[str]:
    """What each process runs; of an option that stands twice the last counts."""
    return [sys.executable, "-m", "jaxlm.train", *arguments, "--distributed", f"--mesh={plan.mesh}"]


def environment(plan: Plan, rank: int, options: Options, beat: Path) -> dict[str, str]:
    """The environment of a rank, whose heartbeat is the file `beat`."""
    port = plan.address.rpartition(":")[2]
    own = {
        "JAX_COORDINATOR_ADDRESS": plan.address,
        # Said always: jax would listen on every address of the host.
        "JAX_COORDINATOR_BIND_ADDRESS": f"{options.coordinator_bind or options.coordinator}:{port}",
        "JAX_NUM_PROCESSES": str(len(plan.slots)),
        "JAX_PROCESS_ID": str(rank),
        heartbeat.VARIABLE: str(beat),
        "PYTHONUNBUFFERED": "1",
    }
    if options.simulate:
        own["JAX_PLATFORMS"] = "cpu"
        own["JAX_NUM_CPU_DEVICES"] = str(plan.devices)
        own["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        if options.nodes == 1:
            own["JAXLM_LISTEN"] = options.coordinator
    else:
        first = plan.slots[rank] % options.processes * plan.devices
        own["JAX_LOCAL_DEVICE_IDS"] = ",".join(str(first + i) for i in range(plan.devices))
    return {**_without_cluster(os.environ), **own}


def _share(mesh: MeshSpec, processes: int) -> int:
    if mesh.inferred:
        raise UserError(f"mesh {mesh} does not say how many devices there are; add --devices=N, those of a process")
    if mesh.device_count % processes:
        raise UserError(
            f"mesh {mesh}: {mesh.device_count} devices do not divide by {processes} processes; "
            "choose another --processes or --mesh"
        )
    return mesh.device_count // processes


def _shrunk(mesh: MeshSpec, count: int, total: int) -> MeshSpec:
    """`mesh` on `count` of the `total` processes it was asked for; itself where no axis can shrink so far."""
    if mesh.inferred:
        return mesh
    for axis in SHRINKING:
        size, rest = divmod(mesh.sizes[axis] * count, total)
        if size and not rest:
            return MeshSpec(sizes=mesh.sizes | {axis: size})
    return mesh


def _without_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith(OF_A_CLUSTER)}
