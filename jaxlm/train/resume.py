"""Where a run begins: from nothing, or from the newest valid checkpoint of its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import NoValidCheckpoint, UserError
from jaxlm.config.load import BEGUN, IMPORTED
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.corpus import Corpora
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.train.assemble import Assembly
from jaxlm.train.state import State


@dataclass(frozen=True, kw_only=True)
class Start:
    """The state a run begins with."""

    state: State
    step: int
    """Steps done."""
    position: int
    """Samples consumed."""
    seen_tokens: int
    """Tokens consumed, padding included."""
    rewinds: int
    """Times that it went back for bad numbers."""
    watch: dict[str, Any]
    """What is known of the losses before (`train.watch`)."""


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise where the run in `folder` has learned the ids of another tokenizer: a corpus that changes, changes the one
    that is trained on it."""
    begun, own = folder / BEGUN, folder / "tokenizer"
    if not own.is_dir() or not begun.is_file() or not begun.stat().st_size:
        return
    if tokenizers.load(own).digest() != tokenizer.digest():
        raise UserError(
            f"{own} is not the tokenizer that the corpora give now: they have changed since the run began; bring them "
            "back (--data.path), or use another --run"
        )


def check_data(store: Store, step: int | None, corpora: Corpora) -> None:
    """Raise where checkpoint `step` counts samples of other data: its position means nothing in these."""
    if step is None or store.meta(step).get("data") in (None, corpora.digest()):  # None: of an import
        return
    names = ", ".join(str(corpus.folder.path) for corpus in corpora.corpora)
    raise UserError(
        f"checkpoint {step} of {store.folder.parent} was trained on other data than is there now ({names}): samples "
        "would be repeated and left out; bring the data back (--data.path), or use another --run"
    )


def choose(store: Store, resume: str, say: Callable[[str], None]) -> int | None:
    """The step to continue from; None to begin anew.

    Raises:
        NoValidCheckpoint: `resume` is must, or the model was imported, and there is none; or there are some and none
            is valid.
        UserError: `resume` is never and the folder holds checkpoints, which a new run would mix with its own.
    """
    held = store.steps()
    if resume == "never":
        if held:
            raise UserError(
                f"--resume=never, but {store.folder} holds checkpoints up to step {held[-1]}; "
                "use another --run, or delete them"
            )
        return None
    step = store.latest_valid(say)
    if step is None and held:
        raise NoValidCheckpoint(
            f"none of the checkpoints {' '.join(map(str, held))} in {store.folder} is valid; "
            "restore them from a copy, or begin anew with another --run"
        )
    if step is None and resume == "must":
        raise NoValidCheckpoint(f"--resume=must, but {store.folder} holds no checkpoint; check --run")
    if step is None and (store.folder.parent / IMPORTED).is_dir():
        raise NoValidCheckpoint(
            f"{store.folder.parent} is of an imported model and holds no checkpoint of it; import into another --run"
        )
    if step is not None and (imported := store.meta(step).get("imported")):
        say(f"beginning with the weights imported from {imported['family']}, in {imported['dtype']}")
    return step


def begin(assembly: Assembly, store: Store, step: int | None) -> Start:
    """Initialise, or restore `step` onto the mesh of `assembly`, whatever mesh it was saved from.

    A checkpoint that was imported has parameters alone: the rest of the state is initialised.
    """
    if step is None:
        return Start(state=assembly.init(), step=0, position=0, seen_tokens=0, rewinds=0, watch={})
    meta = store.meta(step)
    if imported := meta.get("imported"):
        stored = jnp.dtype(imported["dtype"])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored, sharding=leaf.sharding),
            assembly.plan.abstract["params"],
        )
        params = store.restore(step, {"params": abstract})["params"]
        return Start(state=assembly.init(params), step=step, position=0, seen_tokens=0, rewinds=0, watch={})
    state = store.restore(step, assembly.plan.abstract)
    # A run that starts again has its whole patience with steps that are not finite.
    state["streak"] = jax.device_put(np.zeros_like(state["streak"]), state["streak"].sharding)
    return Start(
        state=state,
        step=step,
        position=meta["position"],
        seen_tokens=meta["seen_tokens"],
        rewinds=meta.get("rewinds", 0),
        watch=meta.get("watch", {}),
    )
