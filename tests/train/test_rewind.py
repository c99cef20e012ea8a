"""Numbers that stay bad: back to a checkpoint before them, past their data, with a record of what was known."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import Diverged
from jaxlm.data.loader import Loader
from jaxlm.metrics.jsonl import read
from jaxlm.train.watch import SPIKE, WINDOW, BadNumbers, Watch
from tests.processes import two_ranks
from tests.train.running import arguments, losses, train

KEYS = {"checkpoint__every": 2, "eval__every": 0, "train__max_skipped": 2}
BATCH = 8


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss of samples from `start` to `stop` not a number."""
    rows = Loader.rows

    def put(start: int, stop: int) -> None:
        def poisoned(self, position, first, last):
            made = rows(self, position, first, last)
            bad = [start <= position + i < stop for i in range(first, last)]
            made["loss_mask"][bad] = np.nan
            return made

        monkeypatch.setattr(Loader, "rows", poisoned)

    return put


def test_it_goes_back_and_past_the_bad_samples(corpus: Path, tmp_path: Path, poison) -> None:
    poison(6 * BATCH, 8 * BATCH)  # those of steps 7 and 8
    train(corpus, tmp_path, train__steps=10, **KEYS)
    (event,) = [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert (event["kind"], event["step"], event["to"], event["skipped_samples"]) == ("rewind", 8, 6, [48, 64])
    assert list(losses(tmp_path)) == list(range(1, 11)) and all(losses(tmp_path).values())
    assert [line["step"] for line in read(tmp_path / "metrics.superseded.jsonl")] == [7]
    with Store(tmp_path / "checkpoints") as store:
        meta = store.meta(10)
    assert (meta["position"], meta["rewinds"]) == (12 * BATCH, 1)
    known = json.loads((tmp_path / "forensics" / "step-7.json").read_text())
    assert list(known["sample_ids"]) == ["7", "8"] and len(known["sample_ids"]["7"]) == BATCH
    assert known["loss"] == "nan"
    layers = known["gradients"]["blocks.mlp.up.kernel"]
    assert layers["norm"] == ["nan", "nan"] and all(layers["not_finite"])
    assert not any(known["parameters"]["blocks.mlp.up.kernel"]["not_finite"])


RANK = """
import os, sys
rank, port, start, stop = (int(word) for word in sys.argv[1:5])
os.environ |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(rank)}
import numpy as np
from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.data.loader import Loader
from jaxlm.train import loop

rows = Loader.rows

def poisoned(self, position, first, last):
    made = rows(self, position, first, last)
    made["loss_mask"][[start <= position + i < stop for i in range(first, last)]] = np.nan
    return made

Loader.rows = poisoned
loop.run(load(RunConfig, sys.argv[5:])[0])
"""


def test_two_processes_go_back_together(corpus: Path, tmp_path: Path) -> None:
    """The bad rows are one process's alone."""
    keys = KEYS | {"mesh": "dp2", "distributed": True, "train__steps": 10}
    two_ranks(RANK, str(6 * BATCH), str(6 * BATCH + 12), *arguments(corpus, tmp_path, **keys))
    (event,) = [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert (event["kind"], event["step"], event["to"], event["skipped_samples"]) == ("rewind", 8, 6, [48, 64])
    assert list(losses(tmp_path)) == list(range(1, 11)) and all(losses(tmp_path).values())
    known = json.loads((tmp_path / "forensics" / "step-7.json").read_text())
    assert known["gradients"]["blocks.mlp.up.kernel"]["norm"] == ["nan", "nan"]


def test_killed_before_the_next_save_it_does_the_same_again(corpus: Path, tmp_path: Path, poison) -> None:
    poison(6 * BATCH, 8 * BATCH)
    train(corpus, tmp_path / "whole", train__steps=10, **KEYS)
    train(corpus, tmp_path / "killed", train__steps=10, **KEYS)
    for step in ("8", "10"):
        (tmp_path / "killed" / "checkpoints" / step / "manifest.json").unlink(missing_ok=True)
    with Store(tmp_path / "killed" / "checkpoints") as store:
        assert store.steps() == []
    train(corpus, tmp_path / "killed", train__steps=10, **KEYS)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_bad_again_at_once_it_goes_further_back_and_then_stops(corpus: Path, tmp_path: Path, poison) -> None:
    poison(6 * BATCH, 1000)
    with pytest.raises(Diverged, match="went back 2 times") as raised:
        train(corpus, tmp_path, train__steps=20, checkpoint__keep=0, **KEYS)
    assert raised.value.exit_code == 3
    faults = [event for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"]
    assert [(event["kind"], event.get("to")) for event in faults] == [("rewind", 6), ("rewind", 4), ("diverged", None)]


def test_what_counts_as_bad() -> None:
    watch = Watch(limit=3)
    for step in range(WINDOW):
        watch.see(step, 0, 2.0, True)
    for loss, finite in ((float("nan"), False), (SPIKE * 2.0 + 0.1, True), (SPIKE * 2.0 - 0.1, True)):
        watch.see(WINDOW, 0, loss, finite)  # the last ends the row
    watch.see(WINDOW, 0, 4.2, True)
    watch.see(WINDOW + 1, 8, 4.2, True)
    with pytest.raises(BadNumbers, match="3 steps up to step 102 were 3 times over 2 times their median") as raised:
        watch.see(WINDOW + 2, 16, 4.2, True)
    assert (raised.value.first, raised.value.step, raised.value.position) == (WINDOW, WINDOW + 2, 16)


def test_a_run_that_goes_on_judges_as_one_that_was_never_stopped() -> None:
    losses = [2.0 + step % 3 / 10 for step in range(WINDOW + 50)] + [5.0, 5.0]
    whole, until = Watch(limit=3), WINDOW + 51
    for step, loss in enumerate(losses):
        whole.see(step, step, loss, True)
    first, second = Watch(limit=3), Watch(limit=3)
    for step, loss in enumerate(losses[:until]):
        first.see(step, step, loss, True)
    second.recall(json.loads(json.dumps(first.memory())))
    second.see(until, until, losses[until], True)
    assert second.memory() == whole.memory() and second.in_row
    for watch in (whole, second):
        with pytest.raises(BadNumbers, match="3 steps up to step 152 were 3 times over"):
            watch.see(WINDOW + 52, 0, 5.0, True)


def test_a_young_run_has_no_spikes() -> None:
    watch = Watch(limit=1)
    for step in range(WINDOW):
        watch.see(step, 0, 2.0 + 3 * (step % 2), True)


def test_nothing_is_saved_while_numbers_are_bad(corpus: Path, tmp_path: Path, poison) -> None:
    poison(4 * BATCH, 8 * BATCH)
    train(corpus, tmp_path, **(KEYS | {"checkpoint__every": 1, "checkpoint__keep": 1, "train__max_skipped": 4}))
    saved = [event["step"] for event in read(tmp_path / "events.jsonl") if event["event"] == "save"]
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8], "none of the bad steps, and then those after them"
    assert [event["to"] for event in read(tmp_path / "events.jsonl") if event["event"] == "fault"] == [4]
