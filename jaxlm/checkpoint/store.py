"""Saves training state without stopping training, and restores it onto any mesh, bit for bit.

Orbax writes the arrays; `manifest` decides which steps count. A state is stored as a flat dictionary from the path of a
leaf (`params.blocks.mlp.up`) to its array, so reading it back never needs a Python class.
"""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxlm.checkpoint import manifest, provenance
from jaxlm.config import faultpoints
from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.files import FULL, write_atomically

_PLAIN_FILES = "TensorStore data files not found"
"""What Orbax warns of where arrays lie in files of their own, as `slices` writes them."""


CHUNK_BYTES = 2**26
"""Smaller arrays are not cut on disk but for how devices hold them."""

SHARE_BYTES = 2**24
"""Devices that hold copies of an array share in writing it where that leaves each of them as much. Cutting it is a
program for each shape and share, which the first save would wait for."""


class SaveFailed(CommandError):
    """A checkpoint could not be written (disk full, read-only, ...). Earlier checkpoints are as they were."""


class Store:
    """The checkpoints of one run, in `folder`: see `manifest` for what lies in it.

    Keeps the newest `keep` steps (0: all) and every step divisible by `keep_every` (0: none); an older step is deleted
    only while as many newer ones are committed. With several processes, all of them construct it and call save, wait,
    latest_valid, restore and close in the same order, on a shared file system; process 0 writes manifests and deletes.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int = 2,
        keep_every: int = 0,
        announce: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`announce` gets a line where a step that retention does not keep cannot be deleted."""
        if "://" in str(folder):
            raise UserError(f"run folder {str(folder)!r}: checkpoints need a file system, not a bucket (--run)")
        if keep < 0 or keep_every < 0:
            raise UserError(f"checkpoint.keep={keep} and keep_every={keep_every} must be 0 or more (--checkpoint.keep)")
        self.folder = Path(folder).absolute()
        self.keep, self.keep_every = keep, keep_every
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[str | None]] | None = None
        self._damaged: set[int] = set()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind and self._pending:
            self._pending[1].exception()  # what ended the block matters more than a save that failed
            self._pending = None
        self.close()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Copy `state` (a pytree of jax.Arrays) to the host and return; write, hash, commit and tidy in the background.

        The buffers may be donated as soon as this returns. `meta` must be JSON; the software versions are added to it.
        Waits for the previous save first. Raises SaveFailed if that one failed.
        """
        self.wait()
        leaves = _flatten(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"leaf {name} is a {type(leaf).__name__}; only jax.Arrays are saved")
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise TypeError(f"leaf {name} is a typed PRNG key; save jax.random.key_data of it")
        record = {
            "meta": {**self._provenance(), **meta},
            "leaves": {name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for name, leaf in leaves.items()},
        }
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
        number = self._prepare(step)
        data = manifest.save_folder(self.folder, step, number)
        ocp = _orbax()
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights shrink by 8%, and saving takes ten times as long
        context.array.saving.scoped_storage_options_creator = _chunks
        context.array.saving.min_slice_bytes_for_replica_parallel = SHARE_BYTES
        try:
            with context:
                written = ocp.save_async(data / manifest.ARRAYS, {n: leaf for n, leaf in leaves.items() if leaf.size})
        except OSError as error:
            raise self._failure(step, error) from error
        self._pending = (step, self._thread.submit(self._finish, step, number, written.result, text))

    def poll(self) -> int | None:
        """The step whose save was committed since the last call, if any; never waits.

        Raises SaveFailed if it failed; with several processes that is left to save and wait, which all of them call.
        """
        if self._pending and self._pending[1].done() and jax.process_count() == 1:
            return self.wait()
        return None

    def wait(self) -> int | None:
        """Wait until the save in progress, if any, is committed, and return its step. Raises SaveFailed."""
        if not self._pending:
            return None
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if _any_process(error is not None):
            raise self._failure(step, error) from error
        if untidy := future.result():
            self._announce(untidy)
        return step

    def close(self) -> None:
        """Wait for the save in progress and end the background thread. Raises SaveFailed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """Committed steps, ascending; their files are not looked at."""
        return manifest.steps(self.folder)

    def latest_valid(self, announce: Callable[[str], None], before: int | None = None) -> int | None:
        """The newest step (of those before `before`) every file of which has its SHA-256; None if there is none.

        `announce` gets one line for each newer step that is damaged or incomplete, and one for the choice made then.
        """
        chosen = -1
        if jax.process_index() == 0:
            chosen = self._choose(announce, before)
        if jax.process_count() > 1:
            chosen = int(multihost_utils.broadcast_one_to_all(np.int64(chosen)))
        return None if chosen < 0 else chosen

    def forget_after(self, step: int) -> None:
        """Delete the steps after `step`: the run went another way from there."""
        if jax.process_index() == 0:
            for other in (*self.steps(), *manifest.incomplete(self.folder)):
                if other > step:
                    manifest.delete(self.folder, other)

    def verify(self, step: int) -> str | None:
        """What is wrong with `step`, in one line; None if every file has its SHA-256."""
        try:
            manifest.verify(self.folder, step)
        except manifest.Damaged as error:
            return str(error)
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """What was passed to save as `meta`, with `versions`, `git_revision` and `saved_at` (UTC)."""
        return self._record(step)["meta"]

    def restore(self, step: int, abstract: Any, partial: bool = False) -> Any:
        """The state of `step`, bitwise as saved, in the tree and shardings of `abstract`.

        `abstract` is a pytree of jax.ShapeDtypeStruct with a sharding on any mesh (none: the first device). Leaves that
        are missing, unexpected, or of another shape or dtype are refused with a UserError naming the leaf; `partial`
        lets the checkpoint hold more leaves than `abstract` does (the parameters alone, for example). Call
        latest_valid or verify first: this does not read checksums.
        """
        wanted = _flatten(abstract)
        saved = self._record(step)["leaves"]
        self._compare(step, wanted, saved, partial)
        wanted = {name: _placed(leaf) for name, leaf in wanted.items()}
        arrays = {name: jnp.zeros(w.shape, w.dtype, device=w.sharding) for name, w in wanted.items() if not w.size}
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        number = manifest.attempt(self.folder, step)
        if stored:
            ocp = _orbax()
            context = ocp.Context()
            context.pytree.loading.partial_load = partial
            with context:
                arrays |= ocp.load(manifest.save_folder(self.folder, step, number) / manifest.ARRAYS, stored)
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])

    def _prepare(self, step: int) -> int:
        """Make room: remove leftovers of earlier saves of `step`, and other steps that do not count or are not kept;
        the number of the new save, agreed by all processes."""
        number, failure = 0, None
        if jax.process_index() == 0:
            try:
                (self.folder / str(step)).mkdir(parents=True, exist_ok=True)
                current = manifest.attempt(self.folder, step)
                manifest.delete_leftovers(self.folder, step, current)
                number = current + 1
                self._tidy(step)
            except OSError as error:
                failure = error
        if jax.process_count() > 1:
            number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
        if not number:
            raise self._failure(step, failure) from failure
        return number

    def _finish(self, step: int, number: int, wait: Callable[[], None], text: str) -> str | None:
        """In the background: wait for Orbax, then commit the step and delete what retention does not keep. A line where
        something cannot be deleted: the step counts all the same."""
        faultpoints.point("array-write")
        wait()
        if jax.process_index() != 0:
            return None
        faultpoints.point("data-state")
        write_atomically(manifest.save_folder(self.folder, step, number) / manifest.META, text)
        faultpoints.point("before-commit")
        manifest.commit(self.folder, step, number)
        faultpoints.point("after-commit")
        self._damaged.discard(step)
        manifest.delete_leftovers(self.folder, step, number)
        return self._tidy(step)

    def _tidy(self, saving: int) -> str | None:
        """Delete the steps that retention does not keep, and those but `saving` that were never finished; a line about
        the first that cannot be deleted."""
        found = None
        for other in (*self._expired(), *manifest.incomplete(self.folder)):
            if other == saving:
                continue
            try:
                manifest.delete(self.folder, other)
            except OSError as error:
                where = self.folder / str(other)
                found = found or f"warning: old checkpoint {where} cannot be deleted: {_reason(error)}"
        return found

    def _expired(self) -> list[int]:
        """Committed steps that retention does not keep; damaged ones neither count nor go (evidence)."""
        sound = [step for step in self.steps() if step not in self._damaged]
        old = sound[: -self.keep] if self.keep else []
        return [step for step in old if not (self.keep_every and step % self.keep_every == 0)]

    def _choose(self, announce: Callable[[str], None], before: int | None) -> int:
        committed, unfinished = (
            [step for step in steps if before is None or step < before]
            for steps in (self.steps(), manifest.incomplete(self.folder))
        )
        chosen = -1
        for step in reversed(committed):
            problem = self.verify(step)
            if problem is None:
                chosen = step
                break
            self._damaged.add(step)
            announce(f"checkpoint {step} is damaged and not used: {problem} ({self.folder / str(step)})")
        for step in (step for step in unfinished if step > chosen):
            announce(f"checkpoint {step} is incomplete and not used: its save never finished")
        if 0 <= chosen != max([*committed, *unfinished]):
            announce(f"checkpoint {chosen} is the newest valid one: continuing from it")
        return chosen

    def _record(self, step: int) -> dict[str, Any]:
        try:
            return manifest.read_meta(self.folder, step)
        except manifest.Damaged as error:
            have = " ".join(map(str, self.steps())) or "none"
            raise UserError(f"checkpoint {step} of {self.folder}: {error}; there are: {have}") from error

    def _compare(self, step: int, wanted: Mapping[str, Any], saved: Mapping[str, Any], partial: bool) -> None:
        cure = "use the configuration it was saved with (config.yaml in the run folder) or another --run"
        for name in sorted(wanted.keys() - saved.keys()):
            raise UserError(f"checkpoint {step} has no leaf {name}, which this run has; {cure}")
        for name in () if partial else sorted(saved.keys() - wanted.keys()):
            raise UserError(f"checkpoint {step} has a leaf {name}, which this run has not; {cure}")
        for name, leaf in wanted.items():
            there = f"{saved[name]['dtype']}{saved[name]['shape']}"
            here = f"{leaf.dtype}{list(leaf.shape)}"
            if there != here:
                raise UserError(f"leaf {name} is {there} in checkpoint {step} and {here} in this run; {cure}")

    def _failure(self, step: int, error: BaseException | None) -> SaveFailed:
        """The line about a save that failed; process 0 removes what it left behind, to give the space back."""
        committed = step in self.steps()
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                if committed:
                    manifest.delete_leftovers(self.folder, step, manifest.attempt(self.folder, step))
                else:
                    shutil.rmtree(self.folder / str(step), ignore_errors=True)
        have = " ".join(map(str, self.steps())) or "none"
        return SaveFailed(
            f"saving checkpoint {step} in {self.folder} failed: {_reason(error)}; checkpoints there: {have}"
        )

    @staticmethod
    def _provenance() -> dict[str, Any]:
        return {
            "versions": provenance.versions(),
            "git_revision": provenance.git_revision(),
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def _reason(error: BaseException | None) -> str:
    """Why a save failed, in the system's words: TensorStore puts its own around them, with the number of the error."""
    if error is None:
        return "another process could not write its part"
    wrapped = re.search(r"os_error_code='(\d+)'", str(error))
    number = error.errno if isinstance(error, OSError) else int(wrapped[1]) if wrapped else None
    if number is None:
        return " ".join(str(error).split())[:300]
    cure = " (free some, or lower --checkpoint.keep)" if number in FULL else ""
    return os.strerror(number) + cure


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, in tree order: {"params.blocks.up": ..., "optimizer.0.mu.blocks.up": ...}."""
    pairs = jax.tree.leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves have the same path: dictionary keys must not hold dots that collide")
    return leaves


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _chunks(path: tuple[Any, ...], leaf: jax.Array) -> Any:
    """Orbax's options for `leaf`: what is stacked over layers, and over experts, lies on disk one by one where it is
    large, so that an export need not hold more of it."""
    from orbax.checkpoint import v1 as ocp

    names = path[-1].key.split(".")
    stacked = ("blocks" in names) + ("blocks" in names and "experts" in names)
    if leaf.nbytes < CHUNK_BYTES or not stacked:
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=tuple(range(min(stacked, leaf.ndim))))


@functools.cache
def _orbax() -> Any:
    """The library, imported with the first save or restore: a run starts sooner without.

    It hands a failed write to whoever waits for it, and logs and raises it in its thread too: those two are dropped.
    """
    from orbax.checkpoint import v1 as ocp

    show = threading.excepthook

    def show_others(error: threading.ExceptHookArgs) -> None:
        if not type(error.thread).__module__.startswith("orbax.checkpoint"):
            show(error)

    threading.excepthook = show_others
    logging.getLogger("absl").addFilter(
        lambda record: "/orbax/" not in record.pathname or not (record.exc_info or _PLAIN_FILES in record.msg)
    )
    return ocp


def _any_process(flag: bool) -> bool:
    """Whether `flag` holds on at least one process: all must act on an error together."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.bool_(flag)).any())
