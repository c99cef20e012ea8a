"""`python -m jaxlm.checkpoint`: look at the checkpoints of a run, bring models of Hugging Face in and out.

Only the verbs that read arrays import jax.
"""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
python -m jaxlm.checkpoint diff RUN [--step=N] [--other=RUN] [--other-step=N]   what differs between two
python -m jaxlm.checkpoint import --from=DIR --run=RUN             a model of Hugging Face into a new run
python -m jaxlm.checkpoint export --run=RUN --to=DIR [--step=N]    a checkpoint as a model of Hugging Face
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


@dataclass(frozen=True, kw_only=True)
class Diff:
    """python -m jaxlm.checkpoint diff RUN: what two checkpoints say differently, and how far their arrays are apart;
    exit code 1 if anything differs but the time they were saved."""

    step: int | None = None
    """One of the two (default: the newest)."""
    other: str | None = None
    """Run folder of the other (default: the same)."""
    other_step: int | None = None
    """The other (default: the newest; in the same run folder, the one before)."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """python -m jaxlm.checkpoint import: a model of Hugging Face into a new run folder, to generate and to train."""

    from_: str
    """Folder of the model."""
    run: str
    """The run folder to make."""
    mesh: str = "dp-1"
    """Devices by axis that the run's config.yaml names; any other works as well."""
    params: Literal["float32", "bfloat16"] | None = None
    """precision.params of the run, in which the parameters are stored (default: as they are; float16 as float32)."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """python -m jaxlm.checkpoint export: a checkpoint as a model of Hugging Face."""

    run: str
    """The run folder."""
    to: str
    """The folder to make."""
    step: int | None = None
    """The checkpoint (default: the newest valid one)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the tensors (default: as they are stored; of an import that was not trained on, as they came)."""


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code (4: there is no valid checkpoint)."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] in CONVERSIONS:
        asked, convert = CONVERSIONS[argv[0]]
        return convert(load(asked, argv[1:])[0])
    if argv[0] not in VERBS:
        known = ", ".join((*VERBS, *CONVERSIONS))
        raise UserError(f"no verb {argv[0][:40]!r}; use {known} (python -m jaxlm.checkpoint --help)")
    options, verb = VERBS[argv[0]]
    if any(word in ("-h", "--help") for word in argv[1:]):
        load(options, ["--help"])
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(f"name the run folder: python -m jaxlm.checkpoint {argv[0]} RUN")
    given: Any = load(options, argv[2:])[0]
    folder, steps = _steps(argv[1], dict(items(given)).get("step"), "--step")
    return verb(folder, steps, given)


def _steps(run_folder: str, step: int | None, flag: str) -> tuple[Path, list[int]]:
    """The checkpoints' folder of a run, and all its steps or the one that is meant."""
    folder = Path(run_folder, "checkpoints")
    if not folder.parent.is_dir():
        raise UserError(f"no run folder {run_folder}; pass the folder that --run named")
    steps = manifest.steps(folder)
    if step is not None and step not in steps:
        raise NoValidCheckpoint(f"no checkpoint {step} in {folder}; there are: {_join(steps)} ({flag})")
    if not steps:
        raise NoValidCheckpoint(f"no checkpoint in {folder}")
    return folder, steps if step is None else [step]


def _list(folder: Path, steps: list[int], _: List) -> int:
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


def _show(folder: Path, steps: list[int], _: Show) -> int:
    step = steps[-1]
    try:
        record, size = manifest.read_meta(folder, step), manifest.total_bytes(folder, step)
    except manifest.Damaged as error:
        raise NoValidCheckpoint(
            f"checkpoint {step} in {folder} is damaged: {error}; verify finds a sound one"
        ) from error
    for key, value in {"step": step, "bytes": size, **record["meta"]}.items():
        if key == "watch":  # a hundred losses, which metrics.jsonl has too
            continue
        if isinstance(value, str) and "\n" in value:  # a resolved configuration: as the file it was
            print(f"{key}:", textwrap.indent(value.rstrip(), "  "), sep="\n")
        else:
            print(yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True), end="")
    table = _table("leaf", "dtype", "shape", "elements")
    for name, leaf in record["leaves"].items():
        table.add_row(name, leaf["dtype"], str(leaf["shape"]), f"{math.prod(leaf['shape']):,}")
    _print(table)
    return 0


def _verify(folder: Path, steps: list[int], _: Verify) -> int:
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


def _diff(folder: Path, steps: list[int], given: Diff) -> int:
    from jaxlm.checkpoint import diff  # which imports jax

    first = diff.Checkpoint(folder, steps[-1])
    others, there = _steps(given.other or str(folder.parent), given.other_step, "--other-step")
    if given.other_step is None and others.resolve() == folder.resolve():
        there = [step for step in there if step < first.step]
        if not there:
            raise UserError(f"no checkpoint before {first.step} in {folder}; name another (--other-step, --other)")
    second = diff.Checkpoint(others, there[-1])
    print(f"{first.folder / str(first.step)} and {second.folder / str(second.step)}")
    try:
        facts = list(diff.facts(first, second))
        for key, a, b in facts:
            print(f"{key}: {a} and {b}")
        apart = [leaf for leaf in diff.leaves(first, second) if leaf.differing]
    except manifest.Damaged as error:
        raise NoValidCheckpoint(f"one of the two is damaged: {error}; verify finds sound ones") from error
    table = _table("leaf", "differing", "elements", "largest", "relative")
    for leaf in apart:
        table.add_row(
            leaf.name, f"{leaf.differing:,}", f"{leaf.elements:,}", f"{leaf.largest:.2e}", f"{leaf.relative:.2e}"
        )
    if apart:
        _print(table)
    else:
        print("the arrays that both have are bitwise the same")
    return 1 if facts or apart else 0


def _import(given: Import) -> int:
    from jaxlm.checkpoint import convert  # which imports jax

    source, run = Path(given.from_).expanduser(), Path(given.run).expanduser()
    convert.import_(source, run, given.mesh, given.params, print)
    return 0


def _export(given: Export) -> int:
    from jaxlm.checkpoint import convert  # which imports jax

    folder, steps = _steps(given.run, given.step, "--step")
    for step in reversed(steps):
        try:
            manifest.verify(folder, step)
            break
        except manifest.Damaged as error:
            print(f"checkpoint {step} is damaged and not used: {error}")
    else:
        raise NoValidCheckpoint(f"no valid checkpoint in {folder}; verify says what is wrong")
    convert.export(folder.parent, Path(given.to).expanduser(), step, given.dtype, print)
    return 0


CONVERSIONS: dict[str, tuple[type, Callable[[Any], int]]] = {"import": (Import, _import), "export": (Export, _export)}
"""Verbs of models of Hugging Face."""

VERBS: dict[str, tuple[type, Callable[[Path, list[int], Any], int]]] = {
    "list": (List, _list),
    "show": (Show, _show),
    "verify": (Verify, _verify),
    "diff": (Diff, _diff),
}


LEFT = ("leaf", "dtype", "shape", "saved (UTC)", "position", "mesh", "jaxlm", "git revision")
"""Columns of words; the others are of numbers."""


def _versions(meta: dict[str, Any]) -> dict[str, Any]:
    versions = meta.get("versions")
    return versions if isinstance(versions, dict) else {}


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, no_wrap=True, justify="left" if column in LEFT else "right")
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
