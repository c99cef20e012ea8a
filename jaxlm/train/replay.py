"""`python -m jaxlm.train replay`: do steps of a run again, from a checkpoint before them, and compare every bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.load import read_run
from jaxlm.config.mesh_spec import parse
from jaxlm.data.corpus import open_corpora
from jaxlm.data.loader import Loader, batch_at
from jaxlm.metrics.jsonl import read
from jaxlm.parallel import mesh as meshes
from jaxlm.train import resume
from jaxlm.train.assemble import Assembly, assemble
from jaxlm.train.state import State

COMPARED = ("loss", "grad_norm", "tokens", "skipped_steps")
"""What metrics.jsonl says of a step that depends on nothing but the computation."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """python -m jaxlm.train replay: do steps of a run again and compare every bit, on the mesh and software it had."""

    run: str = "runs/default"
    """The run folder; nothing in it is changed."""
    step: int | None = None
    """Last step to do again (default: the last that was logged)."""


class Different(CommandError):
    """A step did not give what it gave before: the hardware, the software or the data is not what it was."""


def replay(options: Replay) -> None:
    """Replay from the newest valid checkpoint before `options.step` (or from the beginning) up to it.

    Raises:
        UserError: there is nothing of that step to compare with. Different: something is not bit for bit the same.
    """
    folder = Path(options.run).expanduser()
    config = read_run(folder)
    logged = {line["step"]: line for line in read(folder / "metrics.jsonl")}
    last = options.step or max(logged, default=0)
    mesh, _ = meshes.build(parse(config.mesh), simulate=config.simulate, distributed=config.distributed, announce=print)
    corpora = open_corpora(config.data, config.objective)
    assembly = assemble(config, mesh, corpora.tokenizer.vocabulary_size, print)
    with Store(folder / "checkpoints", keep=0) as store:
        before = store.latest_valid(print, before=last)
        wanted = {step: line for step, line in logged.items() if (before or 0) < step <= last}
        saved = last in store.steps()
        if not wanted and not saved:
            raise UserError(f"--step={last}: nothing of it was logged or saved; {folder} has steps up to {max(logged)}")
        resume.check_data(store, before, corpora)
        start = resume.begin(assembly, store, before)
        positions = _positions(folder, start, last, config.data.batch_size)
        print(f"replaying steps {start.step + 1} to {last}, from sample {positions[start.step + 1]:,}")
        state, wrong = _run(assembly, Loader(corpora, config.data), start.state, positions, wanted)
        if saved:
            wrong += _compare(state, store.restore(last, assembly.plan.abstract), last)
    if wrong:
        raise Different(f"not the same: {'; '.join(wrong[:5])}" + (f" and {len(wrong) - 5} more" if wrong[5:] else ""))
    arrays = f", and all {len(jax.tree.leaves(state))} arrays of checkpoint {last}" if saved else ""
    print(f"bit for bit the same: {len(wanted)} logged steps{arrays}")


def _positions(folder: Path, start: resume.Start, last: int, size: int) -> dict[int, int]:
    """Step -> number of its first sample. Where the run went back for bad numbers, it went on further into its data."""
    jumps: dict[int, int] = {}
    for event in read(folder / "events.jsonl"):
        if event.get("kind") == "rewind":
            jumps = {to: position for to, position in jumps.items() if to < event["to"]}
            jumps[event["to"]] = event["skipped_samples"][1]
    found, position = {}, start.position
    for step in range(start.step, last):
        found[step + 1] = position = jumps.get(step, position)
        position += size
    return found


def _run(
    assembly: Assembly, loader: Loader, state: State, positions: dict[int, int], wanted: dict[int, dict[str, Any]]
) -> tuple[State, list[str]]:
    compiled, wrong = assembly.compile(), []
    for step, position in positions.items():
        batch = batch_at(loader, position, assembly.config.data.batch_size, lambda name: assembly.batch[name].sharding)
        state, metrics = compiled(state, batch)
        line = wanted.get(step)
        if line is None:
            continue
        now = {name: np.asarray(value).item() for name, value in metrics.items()}
        then = line | {"tokens": line["loss_tokens"]}
        differing = [name for name in COMPARED if not _same(now[name], then[name])]
        wrong += [f"step {step} {name} {now[name]!r} now, {then[name]!r} then" for name in differing]
        print(f"step {step}  loss {now['loss']:.6f}  {'DIFFERENT' if differing else 'the same'}")
    return state, wrong


def _same(now: float | int, then: float | int | None) -> bool:
    return now == then or (then is None and not np.isfinite(now))


def _compare(now: State, then: State, step: int) -> list[str]:
    """Names of the arrays of checkpoint `step` that differ in a bit."""

    def bits(array: jax.Array) -> list[bytes]:
        return [np.asarray(shard.data).tobytes() for shard in array.addressable_shards]

    pairs = zip(jax.tree.leaves_with_path(now), jax.tree.leaves(then), strict=True)
    names = {jax.tree_util.keystr(path, simple=True, separator="."): (a, b) for (path, a), b in pairs}
    # A run that is continued begins with a streak of 0, whatever was saved.
    return [f"checkpoint {step} {name}" for name, (a, b) in names.items() if name != "streak" and bits(a) != bits(b)]
