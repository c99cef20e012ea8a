"""Places where a run can be made to fail, by name: how tests prove that it survives. The switch is `JAXLM_FAULTS`.

    JAXLM_FAULTS=before-commit:2:kill   the process dies, as from kill -9, when it comes there for the second time
    JAXLM_FAULTS=array-write:1:kill+0.02   ... 0.02 seconds later, while it goes on
    JAXLM_FAULTS=array-write:1:enospc,step:30:kill   the disk is full the first time, and the process dies at step 30

Actions are `kill` and errors of the system by name: `enospc` (no space), `eio` (a failing disk), `erofs` (read-only).
"""

import errno
import os
import re
import signal
import threading
from collections import Counter
from typing import NamedTuple

from jaxlm.config.errors import UserError

VARIABLE = "JAXLM_FAULTS"

POINTS = {
    "step": "a step is under way",
    "array-write": "the arrays of a checkpoint are being written",
    "data-state": "before the position in the data is written, with what else resuming needs",
    "before-commit": "everything is written, and not committed yet",
    "after-commit": "the checkpoint counts, and what it replaces is still there",
    "retention": "an older checkpoint no longer counts, and its files are still there",
    "tokenization": "a shard of tokens is being written",
}
"""Name -> when a run comes there."""

ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}

_FAULT = re.compile(r"([a-z-]+):([1-9][0-9]{0,5}):([a-z]+)(?:\+([0-9]{1,3}(?:\.[0-9]{1,6})?))?")
_visits: Counter[str] = Counter()


class Fault(NamedTuple):
    """What happens at a point, the `visit`-th time that this process comes there."""

    point: str
    visit: int
    action: str
    delay_seconds: float


def parse(text: str) -> list[Fault]:
    """The faults that the value of the variable asks for.

    Raises:
        UserError: it asks for something else.
    """
    faults = []
    for part in filter(None, text.split(",")):
        found = _FAULT.fullmatch(part)
        if not found or found[1] not in POINTS or found[3] not in ("kill", *ERRORS):
            raise UserError(
                f"{VARIABLE}={part}: not POINT:VISIT:ACTION, such as before-commit:2:kill; points are "
                f"{' '.join(POINTS)}, actions kill {' '.join(ERRORS)}"
            )
        faults.append(Fault(found[1], int(found[2]), found[3], float(found[4] or 0)))
    return faults


def point(name: str) -> None:
    """The run is at point `name`: nothing happens there unless the environment asks for it. Raises OSError if so."""
    if VARIABLE not in os.environ:
        return
    assert name in POINTS, name
    _visits[name] += 1
    for fault in parse(os.environ[VARIABLE]):
        if (fault.point, fault.visit) == (name, _visits[name]):
            _act(fault)


def _act(fault: Fault) -> None:
    if fault.action in ERRORS:
        number = ERRORS[fault.action]
        raise OSError(number, os.strerror(number), f"fault {fault.point}")
    if fault.delay_seconds:
        timer = threading.Timer(fault.delay_seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
