"""When each schedule does what: the tick of every forward, backward and weight gradient.

Legend: p stages, v chunks of a stage, m microbatches; microbatch i, virtual stage j = chunk c * p + stage s.
"""

from collections.abc import Callable
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


ORDERS: dict[str, Callable[[int, int, int], Order]] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""Schedule -> its order of (p, m, v)."""


def grid(m: int, virtual: int) -> tuple[Ticks, Ticks]:
    """Microbatch and virtual stage of each entry [m, virtual]."""
    i, j = np.meshgrid(np.arange(m), np.arange(virtual), indexing="ij")
    return i, j
