"""`python -m jaxlm.checkpoint`: look at the checkpoints of a run. Imports no jax, so it needs no accelerator."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jaxlm.checkpoint import manifest
from jaxlm.config.cli import run
from jaxlm.config.errors import NoValidCheckpoint, UserError
from jaxlm.config.load import items, load

USAGE = """python -m jaxlm.checkpoint list RUN                every checkpoint: when, by what and how big
python -m jaxlm.checkpoint show RUN [--step=N]     configuration, position, software and arrays of one
python -m jaxlm.checkpoint verify RUN [--step=N]   read every file and compare its SHA-256
RUN is the run folder (runs/NAME). Each takes --help. Exit code 4: there is no valid checkpoint."""


@dataclass(frozen=True, kw_only=True)
class List:
    """python -m jaxlm.checkpoint list RUN: when, by what and how big; reads no arrays."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """python -m jaxlm.checkpoint show RUN: configuration, position, software and arrays of one checkpoint."""

    step: int | None = None
    """The checkpoint (default: the newest)."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """python -m jaxlm.checkpoint verify RUN: read every file and compare its SHA-256; exit code 4 if none is valid."""

    step: int | None = None
    """The checkpoint (default: all)."""


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code (4: there is no valid checkpoint)."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in VERBS:
        raise UserError(f"no verb {argv[0][:40]!r}; use {', '.join(VERBS)} (python -m jaxlm.checkpoint --help)")
    options, verb = VERBS[argv[0]]
    if any(word in ("-h", "--help") for word in argv[1:]):
        load(options, ["--help"])
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(f"name the run folder: python -m jaxlm.checkpoint {argv[0]} RUN")
    step = dict(items(load(options, argv[2:])[0])).get("step")
    folder = Path(argv[1], "checkpoints")
    if not folder.parent.is_dir():
        raise UserError(f"no run folder {argv[1]}; pass the folder that --run named")
    steps = manifest.steps(folder)
    if step is not None and step not in steps:
        raise NoValidCheckpoint(f"no checkpoint {step} in {folder}; there are: {_join(steps)} (--step)")
    if not steps:
        raise NoValidCheckpoint(f"no checkpoint in {folder}")
    return verb(folder, steps if step is None else [step])


def _list(folder: Path, steps: list[int]) -> int:
    table = _table("step", "saved (UTC)", "size", "position", "mesh", "jaxlm", "git revision")
    for step in steps:
        try:
            meta, size = manifest.read_meta(folder, step)["meta"], manifest.total_bytes(folder, step)
        except manifest.Damaged as error:
            table.add_row(str(step), f"damaged: {error}")
            continue
        when, revision = str(meta.get("saved_at", "")).removesuffix("+00:00"), str(meta.get("git_revision") or "")
        software = _versions(meta).get("jaxlm", "")
        position, mesh = str(meta.get("position", "")), str(meta.get("mesh", ""))
        table.add_row(str(step), when, _bytes(size), position, mesh, str(software), revision[:12])
    _print(table)
    unfinished = manifest.incomplete(folder)
    if unfinished:
        print(f"incomplete saves (never used, removed by the next save): {_join(unfinished)}")
    return 0


def _show(folder: Path, steps: list[int]) -> int:
    step = steps[-1]
    try:
        record, size = manifest.read_meta(folder, step), manifest.total_bytes(folder, step)
    except manifest.Damaged as error:
        raise NoValidCheckpoint(
            f"checkpoint {step} in {folder} is damaged: {error}; verify finds a sound one"
        ) from error
    for key, value in {"step": step, "bytes": size, **record["meta"]}.items():
        if isinstance(value, str) and "\n" in value:  # a resolved configuration: as the file it was
            print(f"{key}:", textwrap.indent(value.rstrip(), "  "), sep="\n")
        else:
            print(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True), end="")
    table = _table("leaf", "dtype", "shape", "elements")
    for name, leaf in record["leaves"].items():
        table.add_row(name, leaf["dtype"], str(leaf["shape"]), f"{math.prod(leaf['shape']):,}")
    _print(table)
    return 0


def _verify(folder: Path, steps: list[int]) -> int:
    valid = 0
    for step in steps:
        try:
            manifest.verify(folder, step)
        except manifest.Damaged as error:
            print(f"checkpoint {step}: damaged: {error}")
            continue
        valid += 1
        print(f"checkpoint {step}: valid ({_bytes(manifest.total_bytes(folder, step))})")
    return 0 if valid else NoValidCheckpoint.exit_code


VERBS: dict[str, tuple[type, Callable[[Path, list[int]], int]]] = {
    "list": (List, _list),
    "show": (Show, _show),
    "verify": (Verify, _verify),
}


def _versions(meta: dict[str, Any]) -> dict[str, Any]:
    versions = meta.get("versions")
    return versions if isinstance(versions, dict) else {}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in ("step", "size", "elements") else "left")
    return table


def _print(table: Table) -> None:
    """As wide as the terminal, and in a file as wide as it needs to be."""
    wide = Console(highlight=False, markup=False)
    (wide if wide.is_terminal else Console(width=10_000, highlight=False, markup=False)).print(table)


def _bytes(count: int) -> str:
    unit = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{count / 1024**unit:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def _join(steps: list[int]) -> str:
    return " ".join(map(str, steps)) or "none"


if __name__ == "__main__":
    run(main)
