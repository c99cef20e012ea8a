"""What the benchmarks share: a random batch, sizes for the other implementations, PyTorch in a process of its own."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.config.schema import RunConfig

Turn = Callable[[], tuple[float, float]]
"""Run some steps; CPU and clock milliseconds a step."""


def random_batch(config: RunConfig, vocabulary: int, documents: int = 3) -> dict[str, np.ndarray]:
    """Rows of random tokens, `documents` (1 or 3) in each, no loss across their borders."""
    random = np.random.default_rng(0)
    rows, length = config.data.batch_size, config.data.sequence_length
    tokens = random.integers(0, vocabulary, (rows, length + 1), dtype=np.int32)
    cuts = np.sort(random.integers(1, length, (rows, 2)), axis=1) if documents > 1 else np.full((rows, 2), 2 * length)
    at = np.arange(length)[None]
    first, second = at >= cuts[:, :1], at >= cuts[:, 1:]
    border = (at + 1 == cuts[:, :1]) | (at + 1 == cuts[:, 1:])
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": (1 + first + second).astype(np.int32),
        "positions": (at - np.where(second, cuts[:, 1:], np.where(first, cuts[:, :1], 0))).astype(np.int32),
        "loss_mask": (~border).astype(np.float32),
    }


def sizes(config: RunConfig, vocabulary: int) -> dict[str, Any]:
    """The model and its batch in the words of `handwritten.Shape`, with the more that `torch_step.py` knows."""
    model, data = config.model, config.data
    return {
        "layers": model.layers,
        "embed": model.embed,
        "heads": model.heads,
        "kv_heads": model.key_value_heads,
        "head_size": model.head_width,
        "mlp": model.mlp,
        "vocabulary": vocabulary,
        "positions": model.max_positions,
        "length": data.sequence_length,
        "batch": data.batch_size,
        "llama": model.positions == "rotary",
    }


def torch_turn(python: str, sizes: dict[str, Any], steps: int, processes: contextlib.ExitStack) -> Turn | None:
    """Steps of `torch_step.py`, in a process that `processes` ends; None, and a line, where torch is not installed."""
    if not shutil.which(python) or subprocess.run([python, "-c", "import torch"], capture_output=True).returncode:
        print(f"PyTorch left out: {python} has none (--torch names another Python)", file=sys.stderr, flush=True)
        return None
    child = subprocess.Popen(
        [python, str(Path(__file__).parent / "torch_step.py"), json.dumps(sizes), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},  # else waiting threads spin, and count as CPU time
    )
    processes.enter_context(child)
    processes.callback(child.terminate)

    def answer() -> Any:
        line = child.stdout.readline() if child.stdout else ""
        if not line:
            raise UserError("torch_step.py ended early (its message is above); --torch=none leaves PyTorch out")
        return json.loads(line)

    ready = answer()
    print(f"PyTorch {ready['version']} on {ready['threads']} threads", file=sys.stderr, flush=True)

    def turn() -> tuple[float, float]:
        child.stdin.write("go\n")
        child.stdin.flush()
        cpu, clock = answer()
        return cpu, clock

    return turn
