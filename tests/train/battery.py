"""The parity battery: what a configuration computes on one device, on any mesh, and how far apart the two are."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from jaxlm.data.spans import target_length
from jaxlm.parallel import mesh as meshes
from jaxlm.train import optimizer as optimizers
from jaxlm.train import step as steps
from jaxlm.train.assemble import Assembly, assemble

LOSS, GRADIENT, PARAMETER = 1e-5, 1e-4, 1e-5
"""What is promised: loss, relative; gradient of each leaf, relative to its norm; parameters after three steps."""

VOCABULARY = 250
"""Padded to 256: the padding takes part in every sharding."""

GPT = ModelConfig(layers=2, embed=128, heads=4, mlp=256, max_positions=32)
LLAMA = ModelConfig(
    layers=2,
    embed=128,
    heads=4,
    kv_heads=2,
    mlp=256,
    gated=True,
    activation="silu",
    norm="rms",
    positions="rotary",
    biases=(),
    tied=False,
    windows=(8, 0),
    qk_norm="head",
)
MOE = dataclasses.replace(LLAMA, mlp=128, experts=8, balance_loss=0.05, router_z_loss=0.02)
MOE_SHARED = dataclasses.replace(MOE, router="sigmoid", router_scale=2.0, shared_experts=1, balance_rate=0.01)
MOE_CAPPED = dataclasses.replace(
    GPT, mlp=64, experts=4, experts_per_token=1, router="softmax", capacity_factor=1.0, balance_loss=0.05
)
BERT = dataclasses.replace(
    GPT, architecture="encoder", norm_placement="sum", token_types=2, activation="gelu", norm_epsilon=1e-12
)
T5 = ModelConfig(
    architecture="encoder_decoder",
    layers=2,
    embed=128,
    heads=4,
    head_size=16,
    mlp=256,
    gated=True,
    norm="rms",
    positions="relative",
    query_scale=1.0,
    biases=(),
)
STYLES = {
    **{"gpt": GPT, "llama": LLAMA, "moe": MOE, "moe_shared": MOE_SHARED, "moe_capped": MOE_CAPPED, "bert": BERT},
    "t5": T5,
}


class Result(NamedTuple):
    """What one mesh computed, on the host."""

    losses: list[float]
    """Of three steps."""
    gradients: dict[str, np.ndarray]
    """Of the first step."""
    parameters: dict[str, np.ndarray]
    """After three steps."""


class Errors(NamedTuple):
    """Worst relative errors between two results, with the leaf."""

    loss: float
    gradient: tuple[float, str]
    parameter: tuple[float, str]

    def check(self) -> None:
        assert self.loss <= LOSS, self
        assert self.gradient[0] <= GRADIENT, self
        assert self.parameter[0] <= PARAMETER, self


def configuration(style: str | ModelConfig, optimizer: str = "adamw", **changes: Any) -> RunConfig:
    """A small run; `changes` are dotted keys with dots as double underscores."""
    model = STYLES[style] if isinstance(style, str) else style
    config = RunConfig(
        model=dataclasses.replace(model, vocabulary=VOCABULARY),
        data=DataConfig(sequence_length=32, batch_size=16, noise=0.0 if model.architecture == "decoder" else 0.15),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=3e-4, warmup_steps=0),
        train=TrainConfig(steps=10),
    )
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            value = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: value})
    return config


def build(config: RunConfig, mesh: str) -> Assembly:
    """The parts of a run on the first devices of this process."""
    spec = parse(mesh)
    return assemble(config, meshes.from_devices(spec, jax.devices()[: spec.device_count]), None)


def batch(config: RunConfig, seed: int) -> dict[str, np.ndarray]:
    """Packed rows of random tokens: documents, padding, and masks that leave the rows very unequal."""
    size, length = config.data.batch_size, config.data.sequence_length
    random, vocabulary = np.random.default_rng(seed), config.model.vocabulary
    if config.objective != "spans":
        return rows(random, size, length, vocabulary)
    source = rows(random, size, length, vocabulary)
    written = rows(random, size, target_length(length, config.data.noise), vocabulary)
    return written | {f"source_{name}": source[name] for name in ("tokens", "segment_ids", "positions")}


def rows(random: np.random.Generator, size: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Packed rows of one sequence."""
    cuts = np.sort(random.integers(1, length, (size, 2)), axis=1)
    at = np.arange(length)[None]
    segments = 1 + (at >= cuts[:, :1]) + (at >= cuts[:, 1:])
    segments = np.where((segments == 3) & (np.arange(size)[:, None] % 3 == 0), 0, segments)
    starts = np.where(segments == 1, 0, np.where(segments == 2, cuts[:, :1], cuts[:, 1:]))
    kept = random.random((size, length)) < np.linspace(1.0, 0.05, size)[:, None]
    return {
        "tokens": random.integers(0, vocabulary, (size, length)).astype(np.int32),
        "targets": random.integers(0, vocabulary, (size, length)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": (at - starts).astype(np.int32),
        "loss_mask": (kept & (segments > 0)).astype(np.float32),
    }


def place(assembly: Assembly, arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jax.device_put(value, assembly.batch[name].sharding) for name, value in arrays.items()}


def measure(config: RunConfig, mesh: str, *, born_there: bool = False) -> Result:
    """Three real steps, and the gradients of the first.

    Args:
        born_there: the state is initialised on the mesh. Else on one device, the same (a test of its own says so) and
            a compilation less.
    """
    assembly = build(config, mesh)
    step = steps.train_step(
        assembly.model,
        assembly.optimizer,
        optimizers.schedule(config.optimizer, config.train.steps),
        config,
        assembly.runtime,
        assembly.plan,
        keep_gradients=True,
    )
    shardings = (assembly.plan.shardings, None)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(assembly.plan.abstract, assembly.batch)
    compiled = compiled.compile()
    state = assembly.init() if born_there else jax.device_put(born_on_one_device(plain(config)), shardings[0])
    losses, gradients = [], {}
    for seed in range(3):
        state, metrics = compiled(state, place(assembly, batch(config, seed)))
        losses.append(float(metrics["loss"]))
        gradients = gradients or flat(metrics["gradients"])
    return Result(losses, gradients, flat(state["params"]))


@functools.cache
def on_one_device(config: RunConfig) -> Result:
    """The reference: plain, one device, no accumulation, nothing recomputed, nothing sharded."""
    return measure(plain(config), "dp1")


def plain(config: RunConfig) -> RunConfig:
    """What one device runs in place of `config`."""
    return dataclasses.replace(
        config,
        remat="none",
        attention="reference",
        train=dataclasses.replace(config.train, microbatches=1),
        optimizer=dataclasses.replace(config.optimizer, shard="none"),
    )


@functools.cache
def born_on_one_device(config: RunConfig) -> Any:
    """The state that a run begins with, on the host."""
    return jax.device_get(build(config, "dp1").init())


def compare(found: Result, wanted: Result) -> Errors:
    """Errors of `found` against `wanted`."""
    return Errors(
        loss=max(abs(a - b) / abs(b) for a, b in zip(found.losses, wanted.losses, strict=True)),
        gradient=max((relative(found.gradients[name], g), name) for name, g in wanted.gradients.items()),
        parameter=max((distance(found.parameters[name], p), name) for name, p in wanted.parameters.items()),
    )


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| over |b|, 2-norms; 0 where both are all zeros."""
    size = float(np.linalg.norm(b))
    error = float(np.linalg.norm(a - b))
    return error / size if size else error


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Relative to the norm of the leaf, or the largest difference of an element if that is less.

    A bias or offset scale begins at zero: after three steps its norm is three updates, to which Adam's division by
    the root of a tiny second moment lends the rounding of the gradient; its absolute error is what matters.
    """
    return min(relative(a, b), float(np.abs(a - b).max()))


def flat(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}


def leaf_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
