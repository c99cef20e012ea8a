"""From the name of a schedule to its table: the order of its actions, and a place for every value that waits."""

from heapq import heappop, heappush

import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.parallel.schedules.order import ORDERS, Order, Ticks, forward_only, grid
from jaxlm.parallel.schedules.table import ROWS, Table
from jaxlm.parallel.schedules.validate import validate


def build(schedule: str, stages: int, microbatches: int, chunks: int = 1) -> Table:
    """The table of a schedule that goes forward and backward.

    Args:
        schedule: gpipe, 1f1b, interleaved or zb.
        chunks: virtual stages of each stage, with interleaved; the others have one.

    Raises:
        UserError: a number that the schedule cannot work with.
    """
    check(schedule, stages, microbatches, chunks)
    chunks = chunks if schedule in CHUNKED else 1
    return _table(schedule, ORDERS[schedule](stages, microbatches, chunks), stages, chunks)


def forward(stages: int, microbatches: int, chunks: int = 1) -> Table:
    """The table of an evaluation, which only goes forward; any number of microbatches.

    Raises:
        UserError: a number below 1.
    """
    for name, number in (("microbatches", microbatches), ("stages", stages), ("chunks", chunks)):
        if number < 1:
            raise UserError(f"{number} {name}: a pipeline has 1 or more")
    return _table("forward", forward_only(stages, microbatches, chunks), stages, chunks)


def check(schedule: str, stages: int, microbatches: int, chunks: int, prefix: str = "--pipeline.") -> None:
    """Raise UserError for numbers that `build` cannot work with; `prefix` is that of the options' names."""
    if schedule not in ORDERS:
        raise UserError(f"{prefix}schedule={schedule}: no such schedule; use {', '.join(ORDERS)}")
    if stages < 1:
        raise UserError(f"{stages} stages: a pipeline has 1 or more (pp of --mesh)")
    if microbatches < stages:
        raise UserError(
            f"{prefix}microbatches={microbatches} is less than the {stages} stages, some of which would never work; "
            f"use {prefix}microbatches={stages} or more, or fewer stages"
        )
    if schedule in CHUNKED and chunks < 2:
        raise UserError(
            f"{prefix}chunks={chunks}: interleaved gives each stage 2 chunks or more; "
            f"use {prefix}chunks=2, or {prefix}schedule=1f1b"
        )


CHUNKED = ("interleaved",)


def _table(name: str, order: Order, stages: int, chunks: int) -> Table:
    kinds = {kind: ticks for kind, ticks in zip("fbw", order, strict=True) if ticks is not None}
    ticks = max(int(a.max()) for a in kinds.values()) + 1
    rows = {row: np.full((ticks, stages), -1, np.int32) for row in ROWS}
    microbatch, virtual = grid(*order.forward.shape)
    chunk, stage = virtual // stages, virtual % stages
    read = np.maximum.reduce(list(kinds.values()))  # the last tick that needs the values of (microbatch, virtual stage)
    # What virtual stage j reads was made by j - 1 going forward, and by j + 1 going backward.
    activation, activation_slots = _slots(order.forward[:, :-1], read[:, 1:], stage[:, 1:], stages)
    activation = np.pad(activation, ((0, 0), (1, 0)), constant_values=-1)
    rows["receive_activation_slot"][order.forward[:, :-1], stage[:, 1:]] = activation[:, 1:]
    cotangent, cotangent_slots = np.full_like(activation, -1), 0
    if order.backward is not None:
        made = order.backward[:, 1:]
        cotangent[:, :-1], cotangent_slots = _slots(made, read[:, :-1], stage[:, :-1], stages)
        rows["receive_cotangent_slot"][made, stage[:, :-1]] = cotangent[:, :-1]
    for kind, when in kinds.items():
        values = {"microbatch": microbatch, "chunk": chunk, "slot": activation, "cotangent_slot": cotangent}
        for part, value in values.items():
            if f"{kind}_{part}" in rows:
                rows[f"{kind}_{part}"][when, stage] = value
    table = Table(
        name=name,
        stages=stages,
        chunks=chunks,
        microbatches=order.forward.shape[0],
        activation_slots=activation_slots,
        cotangent_slots=cotangent_slots,
        **rows,
    )
    validate(table)
    return table


def _slots(made: Ticks, read: Ticks, stage: Ticks, stages: int) -> tuple[Ticks, int]:
    """A slot for each value that arrives at the end of tick `made` and is last read in tick `read` on `stage`.

    A tick reads before it receives, so a slot is free for the arrivals of the tick of its last reader. Given in the
    order of arrival, the lowest free slot each, the slots are as few as can be: values that wait at once.

    Returns:
        The slots, and how many the fullest stage has.
    """
    slots, most = np.full(made.shape, -1, np.int64), 0
    for s in range(stages):
        where = np.argwhere(stage == s)
        values = sorted((int(made[i, j]), int(read[i, j]), i, j) for i, j in where.tolist())
        free: list[int] = []
        waiting: list[tuple[int, int]] = []
        used = 0
        for arrives, leaves, i, j in values:
            while waiting and waiting[0][0] <= arrives:
                heappush(free, heappop(waiting)[1])
            if not free:
                heappush(free, used)
                used += 1
            slots[i, j] = slot = heappop(free)
            heappush(waiting, (leaves, slot))
        most = max(most, used)
    return slots, most
