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


def test_fsdp_gathers_weights_and_tp_moves_activations_alone():
    program = Program("fsdp-tp")
    assert program.kinds("fsdp") >= {"all-gather", "reduce-scatter"}
    # Two gathers a layer in the forward, two in its repetition and two in the backward; two at the ends.
    layers, microbatches, activation = 32, 4, 8192 * 4096 * 2
    assert program.bytes("all-gather", "tp") <= (6 * layers + 2) * microbatches * activation
    # Two sums a layer in the forward and two in the backward, of which each chip gets its half; two at the ends.
    assert program.bytes("reduce-scatter", "tp") == (4 * layers + 2) * microbatches * activation / 2
    assert program.kinds("tp") == {"all-gather", "reduce-scatter", "all-reduce"}
    assert program.bytes("all-reduce", "tp") < activation / 4, "statistics of the loss and gradients of norms alone"
    assert program.bytes("all-reduce", "fsdp") < program.bytes("reduce-scatter", "fsdp") / 10
    assert program.temporary_bytes < 10e9


def test_memory_of_1f1b_does_not_grow_with_microbatches():
    """Once there are enough to fill all 2 x 8 - 3 places."""
    few, many = Program("pp-fsdp-tp-16"), Program("pp-fsdp-tp-32")
    assert many.temporary_bytes <= 1.02 * few.temporary_bytes
    for program, microbatches in ((few, 16), (many, 32)):
        ticks = microbatches + 2 * 7
        assert program.moved["collective-permute", "pp"]["count"] == 2 * ticks
        assert program.kinds("pp") == {"collective-permute", "all-reduce"}
        assert {"fsdp", "tp"} <= set(program.branches)  # else the next line would show nothing
        assert not [axes for axes in program.branches if "pp" in axes or axes == "other"]


def test_a_ring_of_four_times_the_chips_holds_four_times_the_sequence():
    cube, larger = Program("cp-ring"), Program("cp-ring-larger")
    assert larger.temporary_bytes <= 1.02 * cube.temporary_bytes
    for program in (cube, larger):
        assert ("collective-permute", "cp") in program.moved
        assert program.kinds("cp") <= {"collective-permute", "all-reduce"}, "keys are never gathered"


def test_ulysses_exchanges_heads_for_tokens():
    program = Program("cp-ulysses")
    assert ("all-to-all", "cp") in program.moved
    assert "collective-permute" not in program.kinds("cp")


def test_rows_go_to_the_experts_and_no_expert_goes_to_the_rows():
    program = Program("ep-fsdp")
    layers, microbatches = 32, 2
    # Rows and their weights there, rows back; in the backward both there again, and the gradients of all three.
    assert program.moved["ragged-all-to-all", "ep"]["count"] == 8 * layers * microbatches
    assert {kind for kind, axes in program.moved if axes == "ep"} == {"ragged-all-to-all", "all-reduce"}
    # Gradients of what is no expert's (attention, the tables), of which fsdp has scattered an eighth to each chip.
    rest = 4 * (32 * 2 * (4096 * 4096 + 4096 * 1024) + 2 * 32000 * 4096)
    assert program.bytes("all-reduce", "ep") < 1.02 * rest / 8
    assert program.kinds("fsdp") >= {"all-gather", "reduce-scatter"}
    assert program.bytes("all-reduce", "fsdp") <= program.bytes("reduce-scatter", "fsdp"), (
        "of 8, which move 8 times that"
    )


def test_pipeline_and_ring_and_tensor_together():
    program = Program("pp-cp-tp")
    assert program.bytes("all-reduce", "tp") < program.bytes("reduce-scatter", "tp") / 100
    assert ("collective-permute", "pp") in program.moved and ("collective-permute", "cp") in program.moved
    assert not [axes for axes in program.branches if "pp" in axes or axes == "other"]
