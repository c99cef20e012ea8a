"""The train step by TPU's own compiler, for 64 chips and more that are not there: whole recipes on every kind of axis.

The cases are those of `benchmarks/tpu_compile.py`, whose figures docs/parallelism.md quotes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tpu_compile.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="not installed: libtpu (tpu-compile)"),
]


class Program:
    """A case, compiled in a process of its own."""

    def __init__(self, case: str):
        # The optimisation level of the tests is for CPU.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment["PYTHONPATH"] = str(SCRIPT.parents[1])
        command = [sys.executable, str(SCRIPT), f"--case={case}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        self.figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        self.temporary_bytes: int = self.figures["temporary_bytes"]
        self.moved = {(row["kind"], row["axes"]): row for row in self.figures["collectives"]}
        self.branches: list[str] = self.figures["axes_in_branches"]
        assert not [line for line in self.figures["choices"] if "has no option" in line]

    def kinds(self, axis: str) -> set[str]:
        """What is sent over `axis`, alone or with others."""
        return {kind for kind, axes in self.moved if axis in axes.split("+")}

    def bytes(self, kind: str, axes: str) -> int:
        return self.moved[kind, axes]["bytes"] if (kind, axes) in self.moved else 0
