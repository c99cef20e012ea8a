"""The host's memory, where it is the device's too."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_heap() -> None:
    """Keep freed memory in the process, on Linux with glibc: CPU devices allocate the same again in every step.

    XLA:CPU allocates the temporaries of each step anew. By default glibc maps blocks of that size from the kernel
    and gives them back, and the kernel then clears tens of thousands of pages a step: a fifth of a small model's time.
    The process keeps its largest size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)
