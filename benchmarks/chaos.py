"""Half an hour of everything that goes wrong, drawn from a seed, and nothing lost: bit for bit the undisturbed run.

    python benchmarks/chaos.py --out=benchmarks/results/chaos.json

A small run trains in several processes under `jaxlm.launch`. Processes are killed and stopped, the job is told to end
or killed with its supervisor, disks fill up during saves, files of checkpoints are damaged between two starts, the
loader stands still; after what ended the job, the same command starts it again. After `--minutes` it is told to end,
and an undisturbed run of as many steps follows. All logged numbers, and the bits of the last checkpoint, must be equal.

How lost steps are counted: those that were logged and then done again. A restart must begin at the newest checkpoint
that is committed and undamaged, so at most `--every` steps are lost after the last save that was due; a save in between
that does not count must have failed, been damaged by us, or been under way when the fault came. Anything else is
"unexplained", and makes the exit code 1.
"""

import contextlib
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report
from supervised import Job, growth, running, wait, watched
from undisturbed import differences, write_corpus

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.provenance import git_revision
from jaxlm.config.cli import run
from jaxlm.config.load import load
from jaxlm.metrics import goodput
from jaxlm.metrics.jsonl import read

DOCUMENTS = 200
WARM_SECONDS = 180
"""Until a rank has compiled, evaluated and saved a few times, and grows no more by that."""

AT_RANKS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
AT_JOB = {"term": signal.SIGTERM, "crash": signal.SIGKILL, "flip": signal.SIGKILL, "cut": signal.SIGTERM}
ARMED = ("save", "stall", "long stall")
FAULTS = {
    "kill": "SIGKILL at a rank",
    "stop": "SIGSTOP at a rank, until the supervisor finds it",
    "term": "SIGTERM at the job, which saves; then the same command",
    "crash": "SIGKILL at the supervisor, with which all end; then the same command",
    "flip": "the same, and a flipped bit in a file of the newest checkpoint",
    "cut": "SIGTERM at the job, and a file of its checkpoint cut short",
    "save": "no space, or a failing disk, at some stage of a save",
    "stall": "the loader of a rank stands still for three seconds",
    "long stall": "the loader of a rank stands still, until the supervisor finds it",
}
"""Kind -> what it is."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/chaos.py: a run in a bad half hour."""

    out: str | None = None
    """JSON file to write the figures to."""
    minutes: float = 30.0
    """How long faults are made; the undisturbed run takes as long again, without its interruptions."""
    endurance: float = 10.0
    """Minutes of one more undisturbed run, of which the growth of the ranks is told; 0 for none."""
    faults: int = 10**6
    """End sooner, after so many faults at processes."""
    processes: int = 2
    """Processes of the job."""
    mesh: str = "dp2"
    """Its mesh."""
    every: int = 40
    """Steps from one save to the next."""
    pause: float = 25.0
    """Most seconds of training between two faults; drawn evenly from a tenth of it."""
    seed: int = 0
    """Seed of the faults."""


class Chaos:
    """Makes the faults, one after the other, and says what each cost."""

    def __init__(self, job: Job, options: Options) -> None:
        self.job, self.options = job, options
        self.source = random.Random(f"chaos {options.seed}")
        self.deck: list[str] = []
        self.armed: list[str] = []
        self.waiting = ""
        self.stalled: Counter[str] = Counter()
        self.begins, self.aside = 1, 0
        """How often training has begun, and how many steps it did again, as far as the rows tell."""
        self.damaged: set[int] = set()
        self.rows: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    def go(self) -> None:
        """Faults until the time is over; then a last SIGTERM."""
        until = time.monotonic() + 60 * self.options.minutes
        self._start()
        self.job.stepping(0)
        while time.monotonic() < until and len(self.rows) < self.options.faults:
            pause = self.source.uniform(self.options.pause / 10, self.options.pause)
            time.sleep(max(min(pause, until - time.monotonic()), 0))
            if self.job.over():
                self._wrong(f"the job ended by itself with {self.job.end()}")
                self._start()
                self.job.stepping(self.job.begins())
            else:
                self.job.stepping(0)
                self._restarted()
                self._fault(self._draw())
        self._end("the last SIGTERM", signal.SIGTERM)
        self.note_stall()

    def _restarted(self) -> None:
        """Note the restarts that the supervisor made by itself, because the loader stood still."""
        for event in self.job.events("start", "resume")[self.begins :]:
            lost = self._lost()
            self.rows.append({"kind": "long stall", "resumed": event["step"], "lost_steps": lost, "missed_saves": {}})
            if lost > self.options.every:
                self._wrong(f"a stall lost {lost} steps")
        self.begins = self.job.begins()

    def _lost(self) -> int:
        """Steps that were logged, and set aside to be done again, since the last call."""
        before, self.aside = self.aside, len(read(self.job.run / "metrics.superseded.jsonl"))
        return self.aside - before

    def _draw(self) -> str:
        if not self.deck:
            self.deck = [*AT_RANKS, *AT_JOB]
            self.source.shuffle(self.deck)
        return self.deck.pop()

    def _fault(self, kind: str) -> None:
        job, began, begins, attempts = self.job, time.monotonic(), self.begins, len(self.job.attempts("start"))
        if kind in AT_RANKS:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.source.choice(job.pids()), AT_RANKS[kind])
            wait(lambda: len(job.attempts("start")) > attempts or job.over(), 300, "no restart")
        else:
            self._end(kind, AT_JOB[kind])
            if kind in ("flip", "cut"):
                self._damage(kind)
        logged, sound = job.logged(), max(self.sound(), default=0)
        if kind in AT_JOB:
            self._start()
        job.stepping(begins)
        if job.begins() == begins:
            self._wrong(f"{kind}: the job ended with {job.end()} instead of going on")
            return
        resumed = job.events("start", "resume")[begins]["step"]
        if resumed != sound:
            self._wrong(f"{kind}: it went on from {resumed}, and {sound} was the newest sound checkpoint")
        missed = {step: self._reason(step) for step in range(resumed + 1, logged) if step % self.options.every == 0}
        self.wrong += [f"{kind}: save {step} does not count" for step, why in missed.items() if why == "unexplained"]
        row = {"kind": kind, "at_step": logged, "resumed": resumed, "lost_steps": self._lost(), "missed_saves": missed}
        row["seconds"] = round(time.monotonic() - began, 1)
        self.rows.append(row)
        self.begins = job.begins()
        print(row, flush=True)

    def _end(self, why: str, number: signal.Signals) -> None:
        code, asked = self.job.end(number), number == signal.SIGTERM
        # What waits for it on the way may come at that moment: a rank that stands still, or a disk that is full.
        unsaved = asked and code == 1 and self.waiting in ("long stall", "save")
        if code != (75 if asked else -number) and not unsaved:
            self._wrong(f"{why} ended the job with {code}")

    def _start(self) -> None:
        """Start the job, with something that waits for it on the way."""
        if not self.armed:
            self.armed = [*ARMED]
            self.source.shuffle(self.armed)
        self.note_stall()
        self.waiting = kind = self.armed.pop()
        step = self.job.logged() + self.source.randint(10, 2 * self.options.every)
        if kind == "save":
            point = self.source.choice(["array-write", "data-state", "before-commit", "after-commit"])
            error = self.source.choice(["enospc", "eio"])
            self.job.start(JAXLM_FAULTS=f"{point}:{self.source.randint(1, 3)}:{error}")
        else:
            rank, seconds = self.source.randrange(self.options.processes), 3 if kind == "stall" else 3600
            self.job.start(JAXLM_STALL=f"data:{step}:{rank}:{seconds}")

    def note_stall(self) -> None:
        """Count the stall that the last start brought with it, if it came to that."""
        if self.waiting in ("stall", "long stall") and (self.job.run / "launch" / "stalled").exists():
            self.stalled[self.waiting] += 1

    def sound(self) -> list[int]:
        """Committed steps that were not damaged, or saved anew since."""
        return [step for step in manifest.steps(self.job.run / "checkpoints") if step not in self._still_damaged()]

    def _still_damaged(self) -> set[int]:
        folder = self.job.run / "checkpoints"
        for step in list(self.damaged):
            with contextlib.suppress(manifest.Damaged, OSError):
                manifest.verify(folder, step)
                self.damaged.discard(step)
        return self.damaged

    def _damage(self, kind: str) -> None:
        """Flip a bit in a file of the newest checkpoint, or cut the file; not if it is the only sound one."""
        sound = self.sound()
        if len(sound) < 2:
            return
        folder = self.job.run / "checkpoints"
        save = manifest.save_folder(folder, sound[-1], manifest.attempt(folder, sound[-1]))
        path = self.source.choice(sorted(path for path in save.rglob("*") if path.is_file() and path.stat().st_size))
        content = bytearray(path.read_bytes())
        at = self.source.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << self.source.randrange(8)
        path.write_bytes(content if kind == "flip" else content[:at])
        self.damaged.add(sound[-1])

    def _reason(self, step: int) -> str:
        """Why the save of `step` does not count."""
        failed = [e["message"] for e in self.job.events("fault") if e["kind"] == "save failed"]
        if step in self.damaged:
            return "damaged"
        if any(f"saving checkpoint {step} in " in message for message in failed):
            return "failed"
        last = max((event["step"] for event in self.job.events("save")), default=0)
        return "under way" if step == last else "unexplained"

    def _wrong(self, what: str) -> None:
        self.wrong.append(what)
        print(f"wrong: {what}", flush=True)


def main(argv: list[str]) -> int:
    """Exit code 1 where anything was lost, or differs."""
    options, _ = load(Options, argv)
    figures: dict[str, Any] = {"git_revision": git_revision(), "seed": options.seed, "minutes": options.minutes}
    with tempfile.TemporaryDirectory(prefix="jaxlm-chaos-") as name:
        folder = Path(name)
        write_corpus(folder / "corpus", DOCUMENTS)
        keys = {"mesh": options.mesh, "checkpoint.every": options.every, "eval.every": 10 * options.every}
        keys |= {"train.steps": 10**7}  # more than there is time for
        job = Job(folder, folder / "disturbed", {"processes": options.processes}, keys)
        chaos = Chaos(job, options)
        with watched(job):
            chaos.go()
        last = max(chaos.sound())
        job.keys = keys | {"train.steps": last}
        whole = Job(folder, folder / "undisturbed", job.own, job.keys)
        for other in (job, whole):  # of the first only the end is left: the evaluation and the sample
            with watched(other):
                other.start()
                if code := other.end():
                    chaos._wrong(f"{other.run.name} ended with {code}")
        long = Job(folder, folder / "endurance", job.own, keys)
        if options.endurance:
            with watched(long):
                long.start()
                long.stepping(0)
                time.sleep(60 * options.endurance)
                if (code := long.end(signal.SIGTERM)) != 75:
                    chaos._wrong(f"{long.run.name} ended with {code}")
        figures |= outcome(chaos, whole, long, last)
        if figures["wrong"] or figures["differences"]:
            print((folder / "disturbed.log").read_text()[-4000:])
    for key, value in figures.items():
        print(f"{key}: {value}")
    report.write(options.out, "chaos.py", argv, figures)
    return int(bool(figures["wrong"] or figures["differences"]))


def outcome(chaos: Chaos, whole: Job, long: Job, last: int) -> dict[str, Any]:
    """What the run has been through, and what is left of it."""
    job, rows = chaos.job, chaos.rows
    failed = [event for event in job.events("fault") if event["kind"] == "save failed"]
    seen = Counter(row["kind"] for row in rows if row["kind"] not in ARMED) + chaos.stalled + Counter(save=len(failed))
    lost = {kind: [row["lost_steps"] for row in rows if row["kind"] == kind] for kind in FAULTS}
    plain = [row["lost_steps"] for row in rows if not row["missed_saves"]]
    spent = goodput.of_run(read(job.run / "events.jsonl"))
    return {
        "processes": chaos.options.processes,
        "mesh": chaos.options.mesh,
        "save_every_steps": chaos.options.every,
        "steps": last,
        "faults": {kind: {"what": FAULTS[kind], "times": seen[kind]} for kind in FAULTS},
        "starts_of_processes": len(job.attempts("start")),
        "stalls_found": len(job.attempts("stall")),
        "lost_steps": {kind: {"most": max(n), "mean": round(sum(n) / len(n), 1)} for kind, n in lost.items() if n},
        "most_lost_steps_where_each_save_counted": max(plain, default=0),
        "saves_that_did_not_count": dict(Counter(why for row in rows for why in row["missed_saves"].values())),
        "seconds_until_steps_again": {
            kind: round(float(np.median([row["seconds"] for row in rows if row["kind"] == kind])), 1)
            for kind in (*AT_RANKS, *AT_JOB)
            if any(row["kind"] == kind for row in rows)
        },
        "goodput": round(spent["step"] / sum(spent.values()), 4),
        "seconds": {name: round(seconds, 1) for name, seconds in spent.items()},
        "growth": {
            "supervisor, disturbed": growth(job.samples, "supervisor"),
            "supervisor, undisturbed": growth(long.samples, "supervisor"),
            "rank, undisturbed": growth(long.samples, "rank", skip_seconds=WARM_SECONDS),
        },
        "endurance": {"minutes": chaos.options.endurance, "steps": long.logged(), "saves": len(long.events("save"))},
        "left_over": leftovers(job, last),
        "logged_steps_compared": len(read(whole.run / "metrics.jsonl")),
        "differences": differences(whole.run, job.run, last)[:50],
        "wrong": chaos.wrong,
        "rows": rows,
    }


def leftovers(job: Job, last: int) -> list[str]:
    """What should not be there: processes, incomplete saves, temporary folders, lost files."""
    folder = job.run / "checkpoints"
    found = [f"process {pid}" for event in job.attempts("start") for pid in event["pids"].values() if running(pid)]
    found += [f"incomplete save {step}" for step in manifest.incomplete(folder)]
    return found + [str(path.relative_to(folder)) for path in folder.rglob("*orbax-checkpoint-tmp*")]


if __name__ == "__main__":
    run(main)
