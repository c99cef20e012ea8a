"""Who is at fault, by the heartbeats alone."""

import json
import time
from pathlib import Path

from jaxlm.config.load import load
from jaxlm.config.schema import RunConfig
from jaxlm.launch import job
from jaxlm.launch.options import Limits, Options
from jaxlm.launch.watch import Watch
from jaxlm.metrics import heartbeat

LIMITS = Limits(start=0.3, step=0.1, data=0.1, save=60.0)


def beat(path: Path, entered: int, phase: str, step: int = 1) -> None:
    path.write_text(json.dumps({"pid": 1, "entered": entered, "phase": phase, "step": step, "time": 0.0}))


def test_the_last_rank_is_at_fault_and_its_limit_counts(tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    watch = Watch(files, LIMITS)
    beat(files[0], 9, "step", 5)
    beat(files[1], 8, "save", 4)
    assert watch.look([]) is None
    time.sleep(0.2)
    assert watch.look([]) is None, "rank 0 waits for rank 1, which may take a minute to save"
    beat(files[1], 10, "data", 5)
    assert watch.look([]) is None, "rank 0 has waited long, but is the last only since now"
    time.sleep(0.2)
    stall = watch.look([])
    assert stall and stall.ranks == [0] and stall.beat.phase == "step"
    assert watch.look([0]) is None, "one that has ended is no longer waited for"


def test_a_disk_that_fails_for_a_moment_is_no_rank_that_stands_still(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "beats" / "0"
    file = heartbeat._File(path)
    monkeypatch.setattr(heartbeat, "_beat", heartbeat.Beat(1, 7, "step", 3, 0.0))
    file.write()  # there is no such folder yet
    path.parent.mkdir()
    file.write()
    assert heartbeat.read(path).entered == 7
    watch = Watch([path], LIMITS)
    watch.look([])
    path.unlink()
    path.mkdir()  # what cannot be read
    watch.look([])
    assert watch.beats[0].entered == 7


def test_a_rank_without_a_heartbeat_has_not_started(tmp_path: Path) -> None:
    watch = Watch([tmp_path / "0", tmp_path / "1"], LIMITS)
    beat(tmp_path / "0", 1, "init", 0)
    assert watch.look([]) is None
    time.sleep(0.4)
    stall = watch.look([])
    assert stall and stall.ranks == [1] and stall.beat.phase == "start"


def choose(mesh: str, slots: int, *own: str, batch: int = 24) -> tuple[str, int]:
    config, _ = load(RunConfig, [f"--mesh={mesh}", f"--data.batch-size={batch}"])
    options, _ = load(Options, ["--processes=4", "--min-processes=1", *own])
    plan = job.choose(config, options, range(slots))
    return plan.mesh, len(plan.slots)


def test_a_mesh_shrinks_where_the_batch_is_cut() -> None:
    assert choose("dp4,tp2", 4) == ("dp4,tp2", 4)
    assert choose("dp4,tp2", 3) == ("dp3,tp2", 3)
    assert choose("dp4,tp2", 3, batch=16) == ("dp2,tp2", 2), "16 rows do not divide by 3"
    assert choose("rep4,dp2", 2) == ("rep2,dp2", 2)
    assert choose("fsdp4,tp2", 2) == ("fsdp2,tp2", 2)
    assert choose("dp-1,tp2", 3, "--devices=2") == ("dp3,tp2", 3)
    assert choose("dp2,pp2", 3) == ("pp2", 2)
