"""What the supervisor may be told."""

from dataclasses import dataclass, field, fields

from jaxlm.config.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Most seconds that the process which the others wait for may stand in a phase."""

    start: float = 300.0
    """Python and its imports."""
    init: float = 600.0
    """Finding the other processes, preparing data, checking the checkpoint's files."""
    compile: float = 1800.0
    """Compiling the step, making or restoring the state."""
    data: float = 300.0
    """Waiting for a batch."""
    step: float = 300.0
    """One step."""
    save: float = 900.0
    """Copying the state, and waiting for the save before."""
    eval: float = 900.0
    """One evaluation."""
    end: float = 600.0
    """The sample, the last save, leaving."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m jaxlm.launch local|node [--key=value ...] -- TRAINING OPTIONS: run and watch the processes of a run."""

    processes: int = 2
    """Processes on this node."""
    devices: int | None = None
    """Devices of each process (default: those of the mesh, divided by all processes)."""
    simulate: bool = True
    """Devices are simulated on the CPU; else each process takes its share of the accelerators of its node, in order."""
    max_restarts: int = 10
    """Restarts in a row without a new checkpoint; then the job is given up."""
    backoff: float = 1.0
    """Seconds before the first restart; each further one in a row waits twice as long, up to 60."""
    grace: float = 60.0
    """Seconds that processes have to save and end after a signal; then they are killed."""
    min_processes: int | None = None
    """Fewest processes to go on with where others are gone for good (default: all of them)."""
    nodes: int = 1
    """Nodes of the job (verb node); each runs this command with its own --node-rank."""
    node_rank: int = 0
    """Number of this node, from 0; node 0 decides for all."""
    coordinator: str = "127.0.0.1"
    """Address of node 0, as the others reach it; the port is free on node 0, and new with each attempt."""
    coordinator_bind: str | None = None
    """Address at which node 0 listens for the other processes (default: that of --coordinator)."""
    limits: Limits = field(default_factory=Limits)


def check(options: Options, verb: str) -> None:
    """Raise UserError for the first option that cannot work."""
    at_least = {"processes": 1, "max_restarts": 0, "nodes": 1, "node_rank": 0, "backoff": 0, "grace": 0}
    numbers = {name: getattr(options, name) for name in at_least}
    at_least |= {"devices": 1, "min_processes": 1}
    numbers |= {"devices": options.devices or 1, "min_processes": options.min_processes or 1}
    for name, least in at_least.items():
        if numbers[name] < least:
            raise UserError(f"--{name.replace('_', '-')}={numbers[name]:g} must be {least} or more")
    for f in fields(options.limits):
        if getattr(options.limits, f.name) <= 0:
            raise UserError(f"--limits.{f.name}={getattr(options.limits, f.name):g} must be more than 0 seconds")
    total = options.processes * options.nodes
    if (options.min_processes or total) > total:
        raise UserError(f"--min-processes={options.min_processes} is more than the {total} processes of the job")
    if options.node_rank >= options.nodes:
        raise UserError(f"--node-rank={options.node_rank} must be below --nodes={options.nodes}")
    if verb == "local" and options.nodes > 1:
        raise UserError(f"--nodes={options.nodes} is more than this host; write python -m jaxlm.launch node")
