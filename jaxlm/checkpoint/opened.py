"""A run folder opened to compute with: its tokenizer, its model on a mesh, the parameters of one checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxlm.checkpoint.conventions import Conventions
from jaxlm.checkpoint.conventions import read as read_conventions
from jaxlm.checkpoint.store import Store
from jaxlm.config.errors import NoValidCheckpoint, UserError
from jaxlm.config.mesh_spec import MeshSpec
from jaxlm.config.schema import RunConfig
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.models.attention import choose
from jaxlm.models.build import Model, Params, build
from jaxlm.models.runtime import Runtime, compute_dtype
from jaxlm.parallel import mesh as meshes
from jaxlm.parallel.rules import layout

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run, ready to write text."""

    folder: Path
    config: RunConfig
    tokenizer: Tokenizer
    conventions: Conventions
    model: Model
    runtime: Runtime
    """Of decoding: see `decoding`."""
    params: Params
    step: int

    def describe(self) -> str:
        """What computes, in a line."""
        kind, runtime = kind_of(self.runtime.layout.mesh), self.runtime
        return f"{self.folder} step {self.step} on {kind}, {runtime.dtype}, attention {runtime.attention}"


def open_run(folder: Path, config: RunConfig, spec: MeshSpec, step: int | None, say: Say) -> Opened:
    """The run in `folder`, whose configuration is `config`, on the mesh `spec`, to write text with.

    Args:
        step: the checkpoint; None: the newest valid one.

    Raises:
        UserError: no tokenizer, a tokenizer of another model, a mesh that does not fit.
        NoValidCheckpoint: `step` is not there or damaged, or no checkpoint is valid.
    """
    tokenizer = read_tokenizer(folder)
    runtime = decoding(config, devices(spec))
    model = build(config.model, tokenizer.vocabulary_size)

    def place(path: Any, leaf: Any, dims: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        return runtime.layout.sharding(dims, leaf.shape, name)

    shardings = jax.tree_util.tree_map_with_path(place, model.abstract, model.dims)
    params, step = restore(folder, config, model, shardings, step, say)
    return Opened(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        conventions=read_conventions(folder, config, tokenizer),
        model=model,
        runtime=runtime,
        params=params,
        step=step,
    )


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a run."""
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"--run={folder}: it holds no tokenizer folder; copy the whole run, or train again")
    return tokenizers.load(folder / "tokenizer")


def devices(spec: MeshSpec) -> Mesh:
    """The mesh of a command; dp1 is one device, however many there are."""
    if spec.device_count == 1 and not spec.inferred:
        return meshes.from_devices(spec, jax.devices()[:1])
    return meshes.build(spec)[0]


def kind_of(mesh: Mesh) -> str:
    """How many devices of what kind."""
    device = mesh.devices.flat[0]
    simulated = "simulated " if device.platform == "cpu" and mesh.size > 1 else ""
    return f"{mesh.size} x {simulated}{device.device_kind}"


def decoding(config: RunConfig, mesh: Mesh) -> Runtime:
    """How text is computed on `mesh`: with a cache, in the number format of the run."""
    platform = mesh.devices.flat[0].platform
    dtype = compute_dtype(config.precision, platform)
    # What training computed attention with may not read a cache: only the reference is kept where it was asked for.
    attention = choose(
        "reference" if config.attention == "reference" else "auto",
        platform=platform,
        compute_dtype=str(dtype),
        head_size=config.model.head_width,
        sequence_length=config.data.sequence_length,
        softcap=config.model.attention_softcap,
        cached=True,
        biased=config.model.positions == "relative",
    )
    return Runtime(
        layout=layout(mesh, kv_heads=config.model.key_value_heads, variant="decode"),
        attention=attention.name,
        dtype=dtype,
    )


def restore(
    folder: Path, config: RunConfig, model: Model, shardings: Any, step: int | None, say: Say
) -> tuple[Params, int]:
    """The parameters alone of checkpoint `step` (None: the newest valid one), placed as `shardings`, and its step."""
    with Store(folder / "checkpoints") as store:
        step = _choose(store, folder, step, say)
        imported = store.meta(step).get("imported")
        dtype = imported["dtype"] if imported else config.precision.params
        abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding), model.abstract, shardings
        )
        return store.restore(step, {"params": abstract}, partial=True)["params"], step


def _choose(store: Store, folder: Path, step: int | None, say: Say) -> int:
    held = store.steps()
    if step is None:
        step = store.latest_valid(say)
        if step is None:
            what = f"none of the checkpoints {' '.join(map(str, held))} is valid" if held else "no checkpoint yet"
            raise NoValidCheckpoint(f"--run={folder}: {what}; train on, or restore one from a copy")
    elif step not in held:
        have = " ".join(map(str, held)) or "none"
        raise NoValidCheckpoint(f"--step={step}: no such checkpoint; there are: {have}")
    elif problem := store.verify(step):
        raise NoValidCheckpoint(f"--step={step}: that checkpoint is damaged: {problem}; leave out --step")
    return step
