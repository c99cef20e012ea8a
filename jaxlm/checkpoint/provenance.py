"""Which software wrote a checkpoint."""

import functools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import jaxlm

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, jaxlm and the packages that decide the numbers, by name."""
    return {
        "python": platform.python_version(),
        "jaxlm": jaxlm.__version__,
        **{package: version(package) for package in _PACKAGES},
    }


@functools.cache
def git_revision() -> str | None:
    """Commit of the checkout jaxlm runs from, with `-dirty` if it was edited; None outside one or without git."""
    root = Path(jaxlm.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
