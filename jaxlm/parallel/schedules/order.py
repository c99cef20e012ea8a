"""When each schedule does what: the tick of every forward, backward and weight gradient.

Legend: p stages, v chunks of a stage, m microbatches; microbatch i, virtual stage j = chunk c * p + stage s.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

Ticks = Int64[np.ndarray, "microbatches virtual"]


class Order(NamedTuple):
    """Ticks by microbatch and virtual stage; backward and weight gradients where there are any."""

    forward: Ticks
    backward: Ticks | None = None
    weights: Ticks | None = None


def gpipe(p: int, m: int, v: int) -> Order:
    """All forwards, in m + p - 1 ticks, then all backwards, in as many."""
    i, s = grid(m, p)
    return Order(i + s, m + p - 1 + i + p - 1 - s)


def one_f_one_b(p: int, m: int, v: int) -> Order:
    """m + 2 (p - 1) ticks: the last stage goes backward in the tick of its forward, each before it 2 ticks later."""
    i, s = grid(m, p)
    return Order(i + s, i + 2 * (p - 1) - s)


def interleaved(p: int, m: int, v: int) -> Order:
    """Groups of at least p microbatches go through chunk 0 of all stages, then chunk 1, and so on; backward in reverse.

    A microbatch that leaves the last stage comes back to the first p ticks after it was there: a group of p just fills
    these, and needs v p ticks. Where p does not divide m, the groups are made larger, which delays the first backward,
    or the last one is left short, which leaves ticks idle: whichever takes fewer ticks in all.
    """
    return min((_in_groups(sizes, p, v) for sizes in _groups(p, m)), key=_last)


def forward_only(p: int, m: int, v: int) -> Order:
    """Interleaved without the backward."""
    return min((Order(_in_groups(sizes, p, v).forward) for sizes in _groups(p, m)), key=_last)


def zb(p: int, m: int, v: int) -> Order:
    """1f1b, but stage s makes weight gradients s ticks after its backward: all stages in the same tick, to the end.

    Meanwhile nobody waits: the ticks that drain the pipeline, in which the last stages have no backward left, are those
    in which they catch up. Delays of up to p - 1 ticks keep the stash as small as that of 1f1b, but for one input.

    In ticks of the slowest stage the bubble is (p - 1) (F + B), against (p - 1) (F + B + W) of 1f1b; the (p - 1)
    (F + B - W) of the paper needs stages that do not wait for one another's ticks. Where a backward makes the forward
    again, W does so once more, which costs more than the bubble saves: see `simulate`.
    """
    forward, backward, _ = one_f_one_b(p, m, v)
    i, _ = grid(m, p)
    return Order(forward, backward, i + 2 * (p - 1))


ORDERS: dict[str, Callable[[int, int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb": zb,
}
"""Schedule -> its order of (p, m, v)."""


def _groups(p: int, m: int) -> Iterator[list[int]]:
    """Ways to put m microbatches into groups: all of p or larger, and all of p but the last."""
    groups = max(m // p, 1)
    yield [m // groups + (g < m % groups) for g in range(groups)]
    yield [p] * (m // p) + [m % p] * (m % p > 0)


def _in_groups(sizes: Sequence[int], p: int, v: int) -> Order:
    """Interleaved, the microbatches in groups of these sizes."""
    strides = [max(size, p) for size in sizes]  # ticks from a chunk of a group to its next chunk
    starts = [v * sum(strides[:g]) for g in range(len(sizes))]
    first = np.array([start + r for start, size in zip(starts, sizes, strict=True) for r in range(size)])[:, None]
    stride = np.repeat(strides, sizes)[:, None]
    _, j = grid(sum(sizes), p * v)
    c, s = j // p, j % p
    # The last virtual stage cannot go backward before its forward, for which a microbatch of the largest group
    # waits longest.
    delay = (v - 1) * max(strides) + p - 1
    return Order(first + c * stride + s, delay + first + (v - 1 - c) * stride + p - 1 - s)


def _last(order: Order) -> int:
    """The last tick in which anything is done."""
    return max(int(ticks.max()) for ticks in order if ticks is not None)


def grid(m: int, virtual: int) -> tuple[Ticks, Ticks]:
    """Microbatch and virtual stage of each entry [m, virtual]."""
    i, j = np.meshgrid(np.arange(m), np.arange(virtual), indexing="ij")
    return i, j
