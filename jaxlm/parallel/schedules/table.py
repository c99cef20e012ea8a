"""What a pipeline's stages do, tick by tick: the contract between the schedules and the engine that runs them."""

from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

Rows = Int32[np.ndarray, "ticks stages"]
"""An entry for each tick and stage; -1 is nothing."""


class Action(NamedTuple):
    """Something that a stage does in a tick."""

    stage: int
    kind: str
    """f, b or w."""
    microbatch: int
    virtual: int
    """The virtual stage: chunk * stages + stage."""
    slot: int
    cotangent_slot: int
    """-1 for a forward."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A schedule. In a tick each stage does its forward F, then its backward B, then its weight gradients W, if any.

    At the end of the tick the output of an F goes to the next stage of the ring, and the input's cotangent that a B
    made goes to the previous one. What arrives can be read from the next tick on. Virtual stage j is chunk j // stages
    of stage j % stages. Nobody reads the output of the last virtual stage's F.
    """

    name: str
    stages: int
    chunks: int
    """Virtual stages of each stage."""
    microbatches: int
    activation_slots: int
    """Stage inputs that a stage has room for: enough for the fullest stage."""
    cotangent_slots: int
    """Cotangents of stage outputs that a stage has room for."""

    f_microbatch: Rows
    f_chunk: Rows
    f_slot: Rows
    """Activation slot that holds the input; -1 on the first virtual stage, whose input is the embedding."""

    b_microbatch: Rows
    b_chunk: Rows
    b_slot: Rows
    """Activation slot that holds the chunk's input, from which its forward is made again; -1 as in `f_slot`."""
    b_cotangent_slot: Rows
    """Cotangent slot of the output; -1 on the last virtual stage, whose cotangent comes from the loss."""

    w_microbatch: Rows
    """Where any entry is not -1, B makes the input's cotangent only and W the gradients of the weights."""
    w_chunk: Rows
    w_slot: Rows
    w_cotangent_slot: Rows

    receive_activation_slot: Rows
    """Where the activation that arrives at the end of the tick is kept; -1 where none does."""
    receive_cotangent_slot: Rows

    def __post_init__(self) -> None:
        for name in ROWS:
            getattr(self, name).setflags(write=False)

    @property
    def ticks(self) -> int:
        return self.f_microbatch.shape[0]

    @property
    def virtual(self) -> int:
        """Virtual stages in all."""
        return self.stages * self.chunks

    def actions(self) -> list[list[Action]]:
        """What is done in each tick, in order: stage by stage, F before B before W."""
        found: list[list[Action]] = [[] for _ in range(self.ticks)]
        nothing = np.full_like(self.f_microbatch, -1)
        for kind, cotangent_slot in (("f", nothing), ("b", self.b_cotangent_slot), ("w", self.w_cotangent_slot)):
            microbatch, chunk, slot = (getattr(self, f"{kind}_{part}") for part in ("microbatch", "chunk", "slot"))
            ticks, stages = np.nonzero(microbatch >= 0)
            columns = (microbatch, chunk * self.stages + np.arange(self.stages, dtype=np.int32), slot, cotangent_slot)
            values = (column[ticks, stages].tolist() for column in columns)
            for tick, stage, *rest in zip(ticks.tolist(), stages.tolist(), *values, strict=True):
                found[tick].append(Action(stage, kind, *rest))
        return [sorted(actions, key=lambda action: (action.stage, "fbw".index(action.kind))) for actions in found]


ROWS = tuple(f.name for f in fields(Table) if f.type is Rows)
"""The arrays [ticks, stages] of a table."""
