"""Attempt after attempt, until the job is done or cannot be: node 0 decides, the other nodes follow."""

import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import manifest
from jaxlm.config.errors import Preempted, UserError
from jaxlm.config.schema import RunConfig
from jaxlm.launch import job
from jaxlm.launch.attempt import LOOK_SECONDS, Asked, Attempt
from jaxlm.launch.board import Board, Ending
from jaxlm.launch.options import Options
from jaxlm.metrics.events import now
from jaxlm.metrics.jsonl import JsonLines, repair

LONGEST_BACKOFF_SECONDS = 60.0
GONE_AFTER = 2
"""Failures of one process in a row, without a new checkpoint between them, after which it counts as gone for good."""


class Supervisor:
    """Runs the job of `config` whose processes get the command line `arguments`."""

    def __init__(self, config: RunConfig, arguments: Sequence[str], options: Options) -> None:
        self.config, self.arguments, self.options = config, arguments, options
        self.run_folder = Path(config.run).expanduser()
        folder = self.run_folder / "launch"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run folder {config.run} cannot be written: {error.strerror}; use another --run") from None
        self.board = Board(folder, options.node_rank, options.nodes)
        self.asked = Asked()
        path = folder / ("events.jsonl" if options.node_rank == 0 else f"events-{options.node_rank}.jsonl")
        repair(path)
        self._events = JsonLines(path)

    def run(self) -> int:
        """The exit code of the job."""
        try:
            ending = self._follow() if self.options.node_rank else self._lead()
        finally:
            self._events.close()
        return ending.code or 0

    def _lead(self) -> Ending:
        number = max(self.board.attempts(), default=0)
        restarts, in_a_row, culprit = 0, 0, None
        while True:
            plan = self._plan(number := number + 1)
            if isinstance(plan, Ending):
                return self._final(plan)
            saved = self._newest()
            self.board.publish(plan)
            ending = self._attempt(plan)
            if ending.code is not None:
                return self._final(ending)
            if self._newest() > saved:
                restarts, culprit = 0, None
            in_a_row = in_a_row + 1 if ending.slot == culprit and culprit is not None else 1
            restarts, culprit = restarts + 1, ending.slot
            if in_a_row >= GONE_AFTER and culprit is not None and self._spare(plan):
                self._lose(culprit)
            if restarts > self.options.max_restarts:
                why = f"given up after {self.options.max_restarts} restarts without a new checkpoint; the last: "
                return self._final(Ending(1, why + ending.why))
            if stopped := self._wait(restarts):
                return self._final(stopped)

    def _follow(self) -> Ending:
        """Do what node 0 says until it names the exit code."""
        done = 0
        while True:
            plan, final = self.board.published()
            if final is not None:
                return Ending(final)
            if self.board.lost():
                return Ending(1, "node 0 has not been heard of for a minute")
            if plan and plan.attempt > done:
                done = plan.attempt
                ending = self._attempt(plan)
                self._tell("end", "", attempt=done, code=ending.code, why=ending.why)
            elif self.asked.signal:
                return Ending(Preempted.exit_code)
            time.sleep(LOOK_SECONDS)

    def _attempt(self, plan: job.Plan) -> Ending:
        ending = Attempt(plan, self.options, self.board, self.asked, self._tell).run(self.arguments)
        if self.config.resume == "never":  # that was said of the beginning: what this job has saved, it continues
            self.arguments = [*self.arguments, "--resume=auto"]
        return ending

    def _plan(self, number: int) -> job.Plan | Ending:
        """The next attempt, on the processes that are not gone."""
        total = self.options.processes * self.options.nodes
        slots = [slot for slot in range(total) if not self.board.gone(slot).exists()]
        try:
            plan = job.choose(self.config, self.options, slots)
        except UserError as error:
            if len(slots) == total:
                raise
            return Ending(1, f"{total - len(slots)} of {total} processes are gone (see gone-* in {self.board.folder}) "
                             f"and the rest cannot go on: {error}")  # fmt: skip
        if plan.slots[0] >= self.options.processes:
            return Ending(1, "all processes of node 0, where the coordinator is, are gone")
        address = f"{self.options.coordinator}:{self._free_port()}"
        count, without = len(plan.slots), sorted(set(range(total)) - set(plan.slots))
        lost = f", without {', '.join(map(str, without))}: same batch, same samples" if without else ""
        self._tell("plan", f"attempt {number}: {count} processes x {plan.devices} devices, mesh {plan.mesh}{lost}; "
                           f"logs in {self.board.attempt(number)}", attempt=number, mesh=plan.mesh)  # fmt: skip
        return replace(plan, attempt=number, address=address)

    def _spare(self, plan: job.Plan) -> bool:
        total = self.options.processes * self.options.nodes
        return len(plan.slots) > (self.options.min_processes or total)

    def _lose(self, slot: int) -> None:
        """Go on without a process that fails again and again."""
        path = self.board.gone(slot)
        path.touch()
        self._tell("gone", f"process {slot} failed {GONE_AFTER} times in a row and counts as gone; "
                           f"delete {path} when it is back", slot=slot)  # fmt: skip

    def _wait(self, restarts: int) -> Ending | None:
        """Back off; an ending, if a signal says so."""
        seconds = min(self.options.backoff * 2 ** (restarts - 1), LONGEST_BACKOFF_SECONDS)
        step = self._newest()
        where = f"checkpoint {step}" if step >= 0 else "the beginning"
        self._tell("restart", f"restart {restarts} of at most {self.options.max_restarts} in {seconds:g} s, "
                              f"from {where}", restart=restarts, seconds=seconds, step=max(step, 0))  # fmt: skip
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.asked.signal:
            self.board.keep_alive()
            time.sleep(min(LOOK_SECONDS, seconds))
        if self.asked.signal:
            return Ending(Preempted.exit_code, "stopped between two attempts; the same command continues")
        return None

    def _final(self, ending: Ending) -> Ending:
        self.board.publish(None, ending.code)
        failed = ending.code not in (0, Preempted.exit_code)
        line = f"{'error: ' if failed else ''}{ending.why}" if ending.why else ""
        self._tell("give up" if failed else "end", line, code=ending.code, why=ending.why)
        return ending

    def _newest(self) -> int:
        """The newest committed checkpoint; -1: none."""
        return max(manifest.steps(self.run_folder / "checkpoints"), default=-1)

    def _free_port(self) -> int:
        with socket.socket() as free:
            free.bind((self.options.coordinator_bind or self.options.coordinator, 0))
            return free.getsockname()[1]

    def _tell(self, event: str, line: str, **fields: Any) -> None:
        """Append an event, and say its line where there is one, and somebody who can hear it."""
        self._events.append({"time": now(), "event": event, **fields})
        if line:
            with suppress(OSError):
                print(f"launch: {line}", file=sys.stderr, flush=True)
