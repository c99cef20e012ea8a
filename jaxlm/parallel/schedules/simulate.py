"""How long a table takes and what it keeps, from what its actions cost."""

from dataclasses import dataclass

from jaxlm.parallel.schedules.table import Table


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Time of the actions on one microbatch and all layers of a stage, a chunk of which takes its share.

    The unit is a forward. The engine keeps only stage inputs, so whatever goes backward makes the forward again (1);
    then the cotangents of inputs (1) and the gradients of weights (1) cost about a forward each. Weight gradients that
    go alone need the cotangents inside the stage, which are made again too. Without rematerialisation the costs were
    1, 2, 1 and 1.
    """

    forward: float = 1.0
    backward: float = 3.0
    """Where it also makes the gradients of weights."""
    input_backward: float = 2.0
    """Where another action makes the gradients of weights."""
    weights: float = 3.0
    """That action."""

    def of(self, table: Table) -> dict[str, float]:
        """Time of one action of each kind, f, b and w, on one chunk."""
        backward = self.input_backward if (table.w_microbatch >= 0).any() else self.backward
        return {
            kind: cost / table.chunks for kind, cost in zip("fbw", (self.forward, backward, self.weights), strict=True)
        }


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What one run of a table takes, in the unit of its costs. A bubble is the share of all stages' time spent idle."""

    prices: dict[str, float]
    """Time of an action of each kind: f, b, w."""
    busy: tuple[float, ...]
    """Work of each stage."""
    starts: tuple[float, ...]
    """When each tick starts where a tick lasts as long as its slowest stage, and when the last one ends."""
    loose_time: float
    """Where a stage goes on to its next action as soon as its inputs are there, whatever the others do."""
    stash: tuple[int, ...]
    """Stage inputs that each stage keeps at most."""
    cotangents: tuple[int, ...]
    """Cotangents of outputs that each stage keeps at most."""

    @property
    def time(self) -> float:
        return self.starts[-1]

    @property
    def ideal_time(self) -> float:
        """Where no stage was ever idle."""
        return sum(self.busy) / len(self.busy)

    @property
    def bubble(self) -> float:
        return 1 - self.ideal_time / self.time

    @property
    def loose_bubble(self) -> float:
        return 1 - self.ideal_time / self.loose_time

    def stash_bytes(self, value_bytes: int) -> int:
        """Buffers of the fullest stage, where the input of a stage for one microbatch takes `value_bytes`.

        Every stage of the engine has them, because all stages run one program.
        """
        return (max(self.stash) + max(self.cotangents)) * value_bytes


def simulate(table: Table, costs: Costs | None = None) -> Simulation:
    """Run `table` on a clock; sending takes no time."""
    prices = (costs or Costs()).of(table)
    ends: dict[tuple[str, int, int], float] = {}  # (kind, microbatch, virtual stage) -> when it is done, in loose time
    free = [0.0] * table.stages
    busy = [0.0] * table.stages
    starts = [0.0]
    for actions in table.actions():
        spent = [0.0] * table.stages
        for stage, kind, microbatch, virtual, *_ in actions:
            # F needs that of the virtual stage before, B that of the one after; W only what its stage did already.
            needs = (kind, microbatch, virtual + {"f": -1, "b": 1, "w": 0}[kind])
            free[stage] = ends[kind, microbatch, virtual] = max(free[stage], ends.get(needs, 0.0)) + prices[kind]
            spent[stage] += prices[kind]
        busy = [done + more for done, more in zip(busy, spent, strict=True)]
        starts.append(starts[-1] + max(spent))
    return Simulation(
        prices=prices,
        busy=tuple(busy),
        starts=tuple(starts),
        loose_time=max(free),
        stash=tuple((table.receive_activation_slot.max(axis=0) + 1).tolist()),
        cotangents=tuple((table.receive_cotangent_slot.max(axis=0) + 1).tolist()),
    )
