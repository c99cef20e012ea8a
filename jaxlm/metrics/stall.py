"""A process that stands still on demand, so that tests and drills can see it found."""

import os
import time
from pathlib import Path

VARIABLE = "JAXLM_STALL"
"""Environment variable: phase:step:rank:seconds, such as save:20:1:3600. Needs a heartbeat; happens once in a run."""


def stall(phase: str, step: int) -> None:
    """Sleep here if the environment says so and no process of this run has before."""
    if VARIABLE not in os.environ or "JAXLM_HEARTBEAT" not in os.environ:
        return
    in_phase, at_step, rank, seconds = os.environ[VARIABLE].split(":")
    if (phase, step, os.environ.get("JAX_PROCESS_ID")) != (in_phase, int(at_step), rank):
        return
    try:
        (Path(os.environ["JAXLM_HEARTBEAT"]).parents[1] / "stalled").touch(exist_ok=False)
    except FileExistsError:
        return
    time.sleep(float(seconds))
