"""What follows where saves fail in the background, and are heard of only at the next one."""

import pytest

from jaxlm.checkpoint.store import SaveFailed, Store
from jaxlm.metrics.events import Events
from jaxlm.train import saving
from jaxlm.train.replicas import Replicas
from jaxlm.train.saving import Saver


class Disk(Store):
    """A store whose saves fail, or not, as `fails` says; heard of when waited for."""

    def __init__(self, *fails: bool):
        self.fails, self.saved, self.pending = list(fails), [], None

    def save(self, step, state, meta):
        self.wait()
        self.pending = step

    def wait(self):
        step, self.pending = self.pending, None
        if step is None:
            return None
        if self.fails.pop(0):
            raise SaveFailed(f"saving checkpoint {step} failed")
        self.saved.append(step)
        return step


class Log(Events):
    def __init__(self):
        self.said = []

    def record(self, event, **fields):
        self.said.append((event, fields["step"]))

    def faults(self):
        return [step for event, step in self.said if event == "fault"]


class Agreeing(Replicas):
    def __init__(self):
        pass

    def differing(self, state):
        return []


def saver(disk: Disk, waits: bool = False) -> tuple[Saver, Log]:
    log = Log()
    return Saver(disk, Agreeing(), log, lambda line: None, waits), log


def test_one_failure_is_forgotten_once_a_save_works() -> None:
    disk = Disk(True, False, True, False)
    made, log = saver(disk)
    for step in (1, 2, 3, 4):
        with made.survived(step):
            made.begin(step, {}, {})
    made.end(4)
    assert disk.saved == [2, 4] and log.faults() == [2, 4]


def test_two_in_a_row_end_the_run_and_each_is_recorded_once() -> None:
    made, log = saver(Disk(True, True))
    for step in (1, 2):
        with made.survived(step):
            made.begin(step, {}, {})
    with pytest.raises(SaveFailed, match="checkpoint 2"), made.survived(3):
        made.begin(3, {}, {})
    assert log.faults() == [2, 3]


def test_a_stop_saves_whatever_failed_before() -> None:
    disk = Disk(True, True, False)
    made, _ = saver(disk)
    for step in (1, 2):
        with made.survived(step):
            made.begin(step, {}, {})
    made.whole(3, {}, {})
    assert disk.saved == [3] and not made.must


def test_it_stands_still_until_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    disk = Disk(True, True, True, False)
    made, log = saver(disk, waits=True)
    made.begin(1, {}, {})
    made.settle(2)
    assert made.must
    made.whole(2, {}, {})
    assert disk.saved == [2] and not made.must
    assert len(log.faults()) == 3


def test_the_last_one_is_not_survived() -> None:
    made, log = saver(Disk(True))
    made.begin(1, {}, {})
    with pytest.raises(SaveFailed):
        made.end(1)
    assert log.faults() == [1]
