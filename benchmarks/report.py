"""What every benchmark writes beside its figures: the command, the day, the machine and the versions."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def write(out: str | None, script: str, argv: list[str], figures: dict[str, Any]) -> None:
    """Write `figures` to the JSON file `out`, if there is one."""
    if out is None:
        return
    head = {
        "command": " ".join(["python", f"benchmarks/{script}", *argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": versions() | {"python": platform.python_version()},
    }
    Path(out).write_text(json.dumps(head | figures, indent=1) + "\n")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # torch is optional
            continue
    return found
