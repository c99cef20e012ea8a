"""What is known of a run at the step where its numbers went bad, in a file for whoever has to find out why."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.config.files import write_atomically
from jaxlm.data.loader import Loader, batch_at
from jaxlm.train.assemble import Assembly
from jaxlm.train.state import State
from jaxlm.train.step import train_step
from jaxlm.train.watch import BadNumbers


def record(folder: Path, assembly: Assembly, loader: Loader, state: State, bad: BadNumbers) -> Path:
    """Write `folder`/forensics/step-N.json, N the first bad step.

    It names the samples of the bad steps, and gives by leaf (of blocks, by layer) the norm and the count of numbers
    that are not finite: of parameters and optimizer state as they are now, and of that batch's gradients with them.
    All processes call it, the first one writes.
    """
    config, size = assembly.config, assembly.config.data.batch_size
    position = bad.position - (bad.step - bad.first + 1) * size
    batch = batch_at(loader, position, size, lambda name: assembly.batch[name].sharding)
    step = train_step(
        assembly.model,
        assembly.optimizer,
        lambda count: jnp.float32(0),
        config,
        assembly.runtime,
        assembly.plan,
        keep_gradients=True,
    )

    def measure(state: State, batch: dict[str, jax.Array]) -> dict[str, Any]:
        metrics = step(state | {"step": jnp.int32(bad.first - 1)}, batch)[1]
        trees = {"parameters": state["params"], "optimizer": state["optimizer"], "gradients": metrics["gradients"]}
        return {"loss": metrics["loss"], **{name: _by_leaf(tree) for name, tree in trees.items()}}

    everywhere = NamedSharding(assembly.runtime.layout.mesh, PartitionSpec())
    found = jax.tree.map(_plain, jax.jit(measure, out_shardings=everywhere)(state, batch))
    path = folder / "forensics" / f"step-{bad.first}.json"
    if jax.process_index() == 0:
        steps = range(bad.first, bad.step + 1)
        samples = {step: loader.sample_ids(position + i * size, size) for i, step in enumerate(steps)}
        path.parent.mkdir(exist_ok=True)
        about = {"what": str(bad), "first_bad_step": bad.first, "last_bad_step": bad.step, "position": position}
        write_atomically(path, json.dumps(about | found | {"sample_ids": samples}, indent=1) + "\n")
    return path


def _plain(x: jax.Array) -> Any:
    """For JSON, which has no word for numbers that are not finite: "nan", "inf"."""
    value = np.asarray(x)
    return (
        value.tolist() if np.isfinite(value).all() else np.where(np.isfinite(value), value, value.astype(str)).tolist()
    )


def _by_leaf(tree: Any) -> dict[str, Any]:
    """Name -> norm and count of numbers that are not finite, lists by layer for what is stacked over layers."""
    found = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        dims = tuple(range(1 if "blocks" in name.split(".") else 0, leaf.ndim))
        numbers = leaf.astype(jnp.float32)
        found[name] = {"norm": jnp.sqrt((numbers**2).sum(dims)), "not_finite": (~jnp.isfinite(numbers)).sum(dims)}
    return found
