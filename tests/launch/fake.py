"""Stands in for `python -m jaxlm.train --distributed`: takes the phases of its loop, in step with the other ranks, and
imports no jax. A rank waits for the others as in a collective: for ever, if one of them does not come.

FAKE_EXIT=step:rank:code ends a rank (-1: all) there, with that code (negative: by that signal), each time that it comes
there.
"""

import os
import signal
import sys
import time
from pathlib import Path

from jaxlm.checkpoint import manifest
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.metrics import heartbeat

rank, ranks = int(os.environ["JAX_PROCESS_ID"]), int(os.environ["JAX_NUM_PROCESSES"])
config = load(RunConfig, sys.argv[1:])[0]
run = Path(config.run)
mine = Path(os.environ[heartbeat.VARIABLE])
stop = mine.parent / "stop"


def leave(step: int) -> None:
    at, who, code = map(int, os.environ.get("FAKE_EXIT", "-1:0:0").split(":"))
    if step == at and who in (rank, -1):
        print("error: as asked")
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)


def meet(step: int) -> None:
    """Wait until all ranks have come to `step`."""
    others = [mine.with_name(f"rank-{i}.beat") for i in range(ranks) if i != rank]
    while any(heartbeat.read(other).step < step for other in others):
        if stop.exists():
            sys.exit(75)
        time.sleep(0.02)


heartbeat.begin()
heartbeat.phase("init")
leave(0)
signal.signal(signal.SIGTERM, lambda *_: stop.touch())
heartbeat.phase("compile")
begin = max(manifest.steps(run / "checkpoints"), default=0)
print(f"from step {begin} on mesh {config.mesh}, resume {config.resume}", flush=True)
for step in range(begin + 1, config.train.steps + 1):
    heartbeat.phase("data", step)
    heartbeat.phase("step", step)
    leave(step)
    time.sleep(0.05)
    meet(step - 1 if step > begin + 1 else step)
    print(f"step {step}", flush=True)
    if step % config.checkpoint.every == 0:
        heartbeat.phase("save", step)
        meet(step)
        if rank == 0:
            (run / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / str(step) / "manifest.json").touch()
    if stop.exists():
        sys.exit(75)
