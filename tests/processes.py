"""Tests of several processes that jax.distributed joins."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_ranks(script: str, *arguments: str) -> list[str]:
    """What each of two processes prints that run `script` with its rank, a free port and `arguments`; both must end
    well."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(port), *arguments],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [rank.communicate(timeout=400) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, error) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, error
    return [out for out, _ in outputs]
