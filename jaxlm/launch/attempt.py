"""One attempt: start the ranks of this node, watch them until they end or one is at fault, and kill the rest."""

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from jaxlm.config.errors import Diverged, NoValidCheckpoint, Preempted, UserError
from jaxlm.launch import job
from jaxlm.launch.board import Board, Ending
from jaxlm.launch.options import Options
from jaxlm.launch.rank import Rank, ending
from jaxlm.launch.watch import Stall, Watch

LOOK_SECONDS = 0.1
SETTLE_SECONDS = 3.0
"""For the other ranks to end by themselves after one has ended in a way that all of them share."""
DUMP_SECONDS = 2.0
"""At most, for the ranks to write their stacks."""

FINAL = (UserError.exit_code, Diverged.exit_code, NoValidCheckpoint.exit_code)
"""Exit codes that would be the same after a restart."""
SHARED = (*FINAL, Preempted.exit_code)
UNSAVED = ("data", "step", "save", "eval", "end")
"""Phases in which something would be lost."""

Tell = Callable[..., None]
"""Writes an event and its line: tell(event, line, **fields)."""


class Asked:
    """Notes SIGTERM and Ctrl-C at the supervisor; `twice` is a second Ctrl-C."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.twice = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.twice = self.signal is not None and number == signal.SIGINT
        self.signal = signal.Signals(number)


class Attempt:
    """The ranks of `plan` that live on this node."""

    def __init__(self, plan: job.Plan, options: Options, board: Board, asked: Asked, tell: Tell) -> None:
        self.plan, self.options, self.board, self.asked, self.tell = plan, options, board, asked, tell
        folder = board.attempt(plan.attempt)
        folder.mkdir(parents=True, exist_ok=True)
        ranks = [Rank(number, folder) for number in range(len(plan.slots))]
        self.watch = Watch([rank.beat for rank in ranks], options.limits)
        self.ranks = [rank for rank in ranks if plan.slots[rank.number] // options.processes == options.node_rank]
        self._forwarded: float | None = None
        self._first_failure: float | None = None

    def run(self, arguments: Sequence[str]) -> Ending:
        """Start the ranks and return how they ended; none of them is left."""
        try:
            for rank in self.ranks:
                rank.start(
                    job.command(arguments, self.plan),
                    job.environment(self.plan, rank.number, self.options, rank.beat),
                )
            plan, pids = self.plan, {str(rank.number): rank.pid for rank in self.ranks}
            self.tell("start", "", attempt=plan.attempt, mesh=plan.mesh, address=plan.address, slots=list(plan.slots),
                      pids=pids)  # fmt: skip
            while (found := self._look()) is None:
                time.sleep(LOOK_SECONDS)
        finally:
            for rank in self.ranks:
                rank.end()
            self._show()
        self.board.report(self.plan.attempt, found)
        return found

    def _look(self) -> Ending | None:
        self._show()
        self.board.keep_alive()
        codes = {rank.number: code for rank in self.ranks if (code := rank.code) is not None}
        stall = self.watch.look(list(codes))
        if self.asked.signal:
            return self._stop(codes)
        elsewhere = self.board.failure_elsewhere(self.plan.attempt)
        if any(codes.values()) or elsewhere:
            return self._fail(codes, elsewhere)
        if len(codes) == len(self.ranks):
            return Ending(0)
        if self.board.lost():
            return Ending(1, "node 0 has not been heard of for a minute")
        return self._stalled(stall) if stall and self.options.node_rank == 0 else None

    def _stop(self, codes: Mapping[int, int]) -> Ending | None:
        """Pass the signal on; the end that all ranks come to, or that we make."""
        if self._forwarded is None:
            self._forwarded = time.monotonic()
            assert self.asked.signal
            name, grace = self.asked.signal.name, self.options.grace
            self.tell("signal", f"{name}: the processes save and end (at most {grace:g} s)", signal=name)
            for rank in self.ranks:
                rank.signal(signal.SIGTERM)
        if self.asked.twice:
            return Ending(130, "interrupted again: the processes were killed; the last checkpoint counts")
        done = len(codes) == len(self.ranks)
        lost = any(code not in (0, Preempted.exit_code) for code in codes.values())  # then the others cannot save
        if not done and time.monotonic() - self._forwarded < (SETTLE_SECONDS if lost else self.options.grace):
            return None
        if done and not any(codes.values()):
            return Ending(0)
        if done and all(code in (0, Preempted.exit_code) for code in codes.values()):
            return Ending(Preempted.exit_code, "saved; the same command continues")
        if not any(beat.phase in UNSAVED for beat in self.watch.beats):
            return Ending(Preempted.exit_code, "stopped before the first step; the same command continues")
        why = (
            "not all processes could save"
            if done or lost
            else f"the processes had not saved after {self.options.grace:g} s"
        )
        return Ending(1, f"{why}; the same command continues from the last checkpoint")

    def _fail(self, codes: Mapping[int, int], elsewhere: Ending | None) -> Ending | None:
        """The end that a failure here or on another node makes; None while ranks may still end by themselves."""
        self._first_failure = self._first_failure or time.monotonic()
        if elsewhere and elsewhere.stalled:
            self._dump()
        shared = elsewhere.code is not None if elsewhere else all(code in (0, *SHARED) for code in codes.values())
        complete = len(codes) == len(self.ranks) and (self.options.nodes == 1 or elsewhere is not None)
        if shared and not complete and time.monotonic() - self._first_failure < SETTLE_SECONDS:
            return None
        return elsewhere or self._failed(codes)

    def _failed(self, codes: Mapping[int, int]) -> Ending:
        """Which rank failed first is not known for sure: one that was killed is at fault before one that gave up."""

        def fault(number: int) -> tuple[int, int]:
            code = codes[number]
            killed = code < 0 and code != -signal.SIGABRT  # with SIGABRT jax ends those that lose another
            return (0 if killed else 1 if code in SHARED else 2), self.watch.beats[number].entered

        number = min((n for n, code in codes.items() if code), key=fault)
        code, beat = codes[number], self.watch.beats[number]
        rank = next(rank for rank in self.ranks if rank.number == number)
        last = "" if code < 0 else f": {rank.last_line()}"
        why = f"rank {number} {ending(code)} in {_where(beat)}{last}"
        self.tell("death", why, attempt=self.plan.attempt, rank=number, code=code, phase=beat.phase, step=beat.step)
        return Ending(code if code in FINAL else None, why, self.plan.slots[number])

    def _stalled(self, stall: Stall) -> Ending:
        """Name who stands still, and write where every thread of every rank is."""
        suspects = [rank for rank in self.ranks if rank.number in stall.ranks]
        stopped = [rank.number for rank in suspects if rank.stopped()]
        self._dump()
        busy = [rank.number for rank in suspects if not rank.waits()]
        culprits = stopped or busy or stall.ranks
        who = f"rank {culprits[0]}" if len(culprits) == 1 else f"ranks {', '.join(map(str, culprits))} together"
        how = " (stopped by a signal)" if stopped else ""
        why = f"{who} stood still{how} in {_where(stall.beat)} for {stall.seconds:.0f} s, over {stall.limit:g}"
        where = self.board.attempt(self.plan.attempt) / "rank-*.stacks"
        self.tell("stall", f"{why}; stacks of all ranks are in {where}", attempt=self.plan.attempt, ranks=culprits,
                  phase=stall.beat.phase, step=stall.beat.step, seconds=round(stall.seconds, 1))  # fmt: skip
        return Ending(None, why, self.plan.slots[culprits[0]] if len(culprits) == 1 else None, stalled=True)

    def _dump(self) -> None:
        """Have the ranks write their stacks; one that is stopped goes on for that, and is killed a moment later."""
        # One that has not come as far as its first phase would only die of the signal.
        asked = [rank for rank in self.ranks if self.watch.beats[rank.number].entered and rank.code is None]
        for rank in asked:
            rank.signal(signal.SIGUSR1)
            rank.signal(signal.SIGCONT)
        until = time.monotonic() + DUMP_SECONDS
        while time.monotonic() < until and not all(rank.main_thread() for rank in asked):
            time.sleep(LOOK_SECONDS)
        time.sleep(LOOK_SECONDS)  # for the last lines of the last one

    def _show(self) -> None:
        """Rank 0 speaks for all; that nobody can hear it is no reason to end a run."""
        for rank in self.ranks:
            if rank.number == 0:
                with suppress(OSError):
                    sys.stdout.write(rank.new_output())
                    sys.stdout.flush()


def _where(beat: Any) -> str:
    return f"{beat.phase} {beat.step}" if beat.step else str(beat.phase)
