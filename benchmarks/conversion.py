"""What import and export take of a model of several GB: peak memory of the process, seconds.

    python benchmarks/conversion.py --out=benchmarks/results/conversion.json

4.4 GB, and three times that on the disk for some minutes; --layers=8 is a smaller one.

Weights are made here: random bytes of a Llama's shapes, in bfloat16. What is promised is the largest tensor and 500 MB,
whatever the size of the model: a parameter that is stacked over the layers is many times larger.
"""

import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.matching import matches
from jaxlm.config import cli
from jaxlm.config.load import load
from jaxlm.models import families
from jaxlm.models.build import build

PROMISED_BYTES = 500_000_000
"""Beside the largest tensor."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/conversion.py: peak memory of import and export."""

    out: str | None = None
    """JSON file to write the figures to."""
    layers: int = 32
    """Layers of the model."""
    vocabulary: int = 128_256
    """Tokens of its vocabulary."""


SAVE = """
import sys, jax
from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import Store
with Store(sys.argv[1], keep=0) as store:
    leaves = manifest.read_meta(store.folder, 0)["leaves"]
    wanted = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
    store.save(1, store.restore(0, wanted), store.meta(0))
"""
"""Saves step 0 again as training saves, from arrays in memory."""

PEAK = """
import re, sys
from pathlib import Path
from jaxlm.checkpoint.__main__ import main
main(sys.argv[1:])
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""
"""Its own peak: that of `getrusage` begins at the memory of the process that started it."""


def config(layers: int, vocabulary: int) -> dict[str, Any]:
    """Llama 3.2 1B's widths."""
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }


def write(folder: Path, given: dict[str, Any]) -> dict[str, int]:
    """A model of `given` in bfloat16; bytes of all its tensors, of the largest, and of the largest parameter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(given))
    family = families.of_config(given)
    model = build(family.read(given), None)
    found = matches(family, model)
    writer = safetensors.Writer(folder, {match.name: match.shape for match in found}, "BF16")
    noise = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(safetensors.DTYPES["BF16"])
    for match in found:
        each = len(noise) // math.prod(match.shape[1:])
        for first in range(0, match.shape[0], each):
            last = min(first + each, match.shape[0])
            writer.write(match.name, first, noise[: (last - first) * math.prod(match.shape[1:])])
    sizes = [math.prod(match.shape) * 2 for match in found]
    stacked = max(size for size, match in zip(sizes, found, strict=True) if match.at) * given["num_hidden_layers"]
    return {"model_bytes": sum(sizes), "largest_tensor_bytes": max(sizes), "largest_parameter_bytes": stacked}


def run(*argv: str) -> tuple[int, float]:
    """Peak bytes and seconds of a conversion in a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-c", PEAK, *argv]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1]), round(time.perf_counter() - began, 1)


def measure(folder: Path, layers: int, vocabulary: int) -> dict[str, Any]:
    """Import and export in `folder`."""
    sizes = write(folder / "model", config(layers, vocabulary))
    found: dict[str, Any] = {"layers": layers, **sizes}
    imports = run("import", f"--from={folder / 'model'}", f"--run={folder / 'run'}")
    exports = run("export", f"--run={folder / 'run'}", f"--to={folder / 'back'}")
    shutil.rmtree(folder / "back")
    found |= {"import_peak_bytes": imports[0], "import_seconds": imports[1]}
    found |= {"export_peak_bytes": exports[0], "export_seconds": exports[1]}
    subprocess.run([sys.executable, "-c", SAVE, folder / "run" / "checkpoints"], check=True)
    exports = run("export", f"--run={folder / 'run'}", "--step=1", f"--to={folder / 'back'}")
    return found | {"saved_export_peak_bytes": exports[0], "saved_export_seconds": exports[1]}


def main(argv: list[str]) -> None:
    """Measure, print and write."""
    import report  # beside this file: found where it is run, and not where tests import it

    options, _ = load(Options, argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.layers, options.vocabulary)
    for name, value in found.items():
        print(f"{name:24} {value / 1e6:,.0f} MB" if name.endswith("bytes") else f"{name:24} {value}")
    report.write(options.out, "conversion.py", argv, found)


if __name__ == "__main__":
    cli.run(main)
