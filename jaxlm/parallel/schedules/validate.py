"""Proof that a table is right: it is run with names in place of numbers."""

from collections.abc import Iterator

import numpy as np

from jaxlm.parallel.schedules.table import ROWS, Action, Table

KINDS = {"gpipe": "fb", "1f1b": "fb", "interleaved": "fb", "zb": "fbw", "forward": "f"}
"""Schedule -> what it does for every microbatch on every virtual stage: f forward, b backward, w weight gradients."""

NAMES = {"f": "forward", "b": "backward", "w": "weight gradients"}
BUFFERS = ("activation", "cotangent")

Value = tuple[int, int]
"""Microbatch, virtual stage that reads it."""


def validate(table: Table) -> None:
    """Raise ValueError, naming tick, stage and microbatch, unless `table` computes every gradient exactly once.

    Checked: every microbatch goes forward once (and backward once, and to its weight gradients once, where the schedule
    has them) on every virtual stage, in the order of what needs what, with one tick for a value to reach the next
    stage; a slot that is read holds the value that is meant, written in an earlier tick and not overwritten since; what
    is sent is received, and nothing else is; idle entries are -1, and no slot is left over.
    """
    _check_form(table)
    run = _Run(table)
    for tick, actions in enumerate(table.actions()):
        for action in actions:
            run.act(tick, action)
        run.exchange(tick)
    run.finish()


def _check_form(table: Table) -> None:
    if table.name not in KINDS:
        raise ValueError(f"schedule {table.name!r} is none of {', '.join(KINDS)}")
    if min(table.stages, table.chunks, table.microbatches) < 1:
        raise ValueError(
            f"{table.stages} stages, {table.chunks} chunks, {table.microbatches} microbatches: 1 or more each"
        )
    shape = (table.ticks, table.stages)
    limits = {
        "chunk": table.chunks,
        "microbatch": table.microbatches,
        "cotangent_slot": table.cotangent_slots,
        "slot": table.activation_slots,
    }
    for name in ROWS:
        rows = getattr(table, name)
        if rows.shape != shape or rows.dtype != np.int32:
            raise ValueError(f"{name} is {rows.dtype}{list(rows.shape)}, not int32{list(shape)}")
        limit = next(limit for part, limit in limits.items() if name.endswith(part))
        _refuse(table, (rows < -1) | (rows >= limit), name, f"is not from -1 to {limit - 1}")
        kind = name[0] if name[1] == "_" else None
        if kind is not None:
            busy = getattr(table, f"{kind}_microbatch") >= 0
            _refuse(table, ~busy & (rows >= 0), name, f"belongs to no {kind.upper()}")
            if name.endswith("chunk"):
                _refuse(table, busy & (rows < 0), name, f"is no chunk, but {kind.upper()} needs one")
    for part, limit in (("activation_slot", table.activation_slots), ("cotangent_slot", table.cotangent_slots)):
        used = int(getattr(table, f"receive_{part}").max(initial=-1)) + 1
        if used != limit:
            raise ValueError(f"{part}s is {limit}, but {used} are used")


def _refuse(table: Table, wrong: np.ndarray, name: str, why: str) -> None:
    for tick, stage in np.argwhere(wrong)[:1].tolist():
        raise ValueError(f"tick {tick} stage {stage}: {name}={getattr(table, name)[tick, stage]} {why}")


class _Run:
    """A table as it runs: what each slot holds, what is done, what is on its way."""

    def __init__(self, table: Table):
        self.table = table
        self.last = table.virtual - 1
        self.slots: dict[tuple[str, int, int], Value] = {}
        """(buffer, stage, slot) -> what is there."""
        self.done: dict[str, set[Value]] = {"f": set(), "b": set(), "w": set()}
        self.sent: dict[tuple[str, int], Value] = {}
        """(buffer, receiving stage) -> what arrives at the end of this tick."""

    def act(self, tick: int, action: Action) -> None:
        table, (stage, kind, microbatch, virtual, slot, cotangent_slot) = self.table, action
        where = f"tick {tick} stage {stage}: {NAMES[kind]} of microbatch {microbatch} on virtual stage {virtual}"
        value = (microbatch, virtual)
        if kind not in KINDS[table.name]:
            raise ValueError(f"{where}: {table.name} has none")
        if value in self.done[kind]:
            raise ValueError(f"{where}: was done before")
        for first in {"f": "", "b": "f", "w": "b"}[kind]:
            if value not in self.done[first]:
                raise ValueError(f"{where}: before its {NAMES[first]}")
        self.done[kind].add(value)
        self._read(where, "activation", stage, slot, value, needed=virtual > 0)
        if kind != "f":
            self._read(where, "cotangent", stage, cotangent_slot, value, needed=virtual < self.last)
        if kind == "f" and virtual < self.last:
            self.sent["activation", (stage + 1) % table.stages] = (microbatch, virtual + 1)
        if kind == "b" and virtual > 0:
            self.sent["cotangent", (stage - 1) % table.stages] = (microbatch, virtual - 1)

    def _read(self, where: str, buffer: str, stage: int, slot: int, value: Value, *, needed: bool) -> None:
        if not needed:
            if slot >= 0:
                raise ValueError(f"{where}: reads {buffer} slot {slot}, but has no {buffer} to read")
        elif slot < 0:
            raise ValueError(f"{where}: reads no {buffer} slot")
        else:
            held = self.slots.get((buffer, stage, slot))
            if held != value:
                raise ValueError(f"{where}: {buffer} slot {slot} {_holds(held)}")

    def exchange(self, tick: int) -> None:
        """The end of a tick: what was sent arrives."""
        for buffer in BUFFERS:
            rows = getattr(self.table, f"receive_{buffer}_slot")
            for stage, slot in enumerate(rows[tick].tolist()):
                value = self.sent.pop((buffer, stage), None)
                where = f"tick {tick} stage {stage}"
                if value is None and slot >= 0:
                    raise ValueError(f"{where}: {buffer} slot {slot} receives, but nothing was sent")
                if value is not None and slot < 0:
                    raise ValueError(f"{where}: the {buffer} of microbatch {value[0]} is sent, but not received")
                if value is not None:
                    self._write(where, buffer, stage, slot, value)

    def _write(self, where: str, buffer: str, stage: int, slot: int, value: Value) -> None:
        held = self.slots.get((buffer, stage, slot))
        # The last reader: the backward, or what a schedule has after or in place of it.
        if held is not None and held not in self.done[KINDS[self.table.name][-1]]:
            raise ValueError(f"{where}: {buffer} slot {slot} is overwritten, but {_holds(held)}, still to be read")
        self.slots[buffer, stage, slot] = value

    def finish(self) -> None:
        table = self.table
        for kind, value in self._missing():
            raise ValueError(f"{NAMES[kind]} of microbatch {value[0]} on virtual stage {value[1]} is missing")
        if table.ticks and not any((getattr(table, f"{kind}_microbatch")[-1] >= 0).any() for kind in "fbw"):
            raise ValueError(f"tick {table.ticks - 1}, the last, is empty")

    def _missing(self) -> Iterator[tuple[str, Value]]:
        for kind in KINDS[self.table.name]:
            for microbatch in range(self.table.microbatches):
                for virtual in range(self.table.virtual):
                    if (microbatch, virtual) not in self.done[kind]:
                        yield kind, (microbatch, virtual)


def _holds(value: Value | None) -> str:
    return "was never written" if value is None else f"holds microbatch {value[0]} for virtual stage {value[1]}"
