"""Which keys count where: a key that is set where it has no effect is a mistake, or is said where it may be none."""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

from jaxlm.config.mesh_spec import MeshSpec
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import option, plain, text

DEFAULTS = RunConfig()


class Need(NamedTuple):
    """`keys` count only where the value of the key `of` passes `test`, which `words` say."""

    keys: tuple[str, ...]
    of: str
    words: str
    test: Callable[[Any], bool]
    switch: bool = False
    """`of` turns a part of the run off for a while, so that keys left set for it are no mistake."""


def _one_of(*values: str) -> tuple[str, Callable[[Any], bool]]:
    return " or ".join((", ".join(values[:-1]), values[-1]) if len(values) > 1 else values), lambda v: v in values


_POSITIVE = "1 or more", lambda value: value > 0

NEEDS = (
    Need(("model.windows",), "model.architecture", *_one_of("decoder")),
    Need(("model.max_positions",), "model.positions", *_one_of("learned")),
    Need(("model.rope_theta", "model.rope_local_theta", "model.rope_scaling"), "model.positions", *_one_of("rotary")),
    Need(("model.rope_local_theta",), "model.windows", "lengths above 0", any),
    Need(("model.rope_factor",), "model.rope_scaling", *_one_of("linear", "llama3", "yarn")),
    Need(("model.rope_original_length", "model.rope_frequencies"), "model.rope_scaling", *_one_of("llama3", "yarn")),
    Need(("model.rope_scaling",), "model.rope_factor", "more than 1", lambda factor: factor > 1),
    Need(
        (
            *("model.experts_per_token", "model.shared_experts", "model.router", "model.router_scale"),
            *("model.capacity_factor", "model.balance_loss", "model.balance_rate", "model.router_z_loss"),
        ),
        "model.experts",
        *_POSITIVE,
    ),
    Need(("model.balance_rate",), "model.router", *_one_of("sigmoid")),
    Need(("data.weights",), "data.path", "two corpora or more", lambda path: len(path) > 1),
    Need(("data.vocabulary",), "data.tokenizer", *_one_of("bpe")),
    Need(("optimizer.beta1",), "optimizer.name", *_one_of("adamw", "lion", "muon", "sgd")),
    Need(("optimizer.beta2",), "optimizer.name", *_one_of("adamw", "lion", "muon")),
    Need(("optimizer.epsilon",), "optimizer.name", *_one_of("adamw", "muon")),
    Need(("optimizer.decay_fraction",), "optimizer.schedule", *_one_of("wsd")),
    Need(("optimizer.final_fraction",), "optimizer.schedule", *_one_of("linear", "cosine", "wsd")),
    Need(("pipeline.chunks",), "pipeline.schedule", *_one_of("interleaved")),
    Need(("checkpoint.keep_every",), "checkpoint.keep", *_POSITIVE, switch=True),
    Need(("eval.batches",), "eval.every", *_POSITIVE, switch=True),
    Need(("eval.prompt",), "eval.sample_tokens", *_POSITIVE, switch=True),
    Need(("eval.prompt", "eval.sample_tokens"), "model.architecture", *_one_of("decoder"), switch=True),
)
"""Keys that need another key."""

AXES_NEEDED = {
    "pp": ("pipeline.schedule", "pipeline.microbatches", "pipeline.chunks"),
    "dp": ("optimizer.shard",),
    "cp": ("context.method",),
    "tp": ("context.sequence_parallel",),
}
"""Axis of the mesh -> keys that count only where it has more than one device. A run may continue on another mesh, so
these are never a mistake."""


def mistakes(config: RunConfig) -> Iterator[str]:
    """A line for each key that is set to other than its default and has no effect."""
    yield from (line for line, need in _unmet(config) if not need.switch)


def idle(config: RunConfig, spec: MeshSpec) -> Iterator[str]:
    """A line for each key that is set and has no effect in this run, which may be meant for another of its folder."""
    yield from (line for line, need in _unmet(config) if need.switch)
    for axis, keys in AXES_NEEDED.items():
        if spec.sizes[axis] == 1:
            told = [_told(config, key) for key in keys if _is_set(config, key)]
            yield from (f"{key} has no effect on mesh {spec}, which has no {axis}" for key in told)


def condition(key: str) -> str:
    """Where `key` counts, as a sentence for --help; empty where it always does."""
    parts = [f"{option(need.of)} is {need.words}" for need in NEEDS if key in need.keys]
    parts += [f"the mesh has {axis}" for axis, keys in AXES_NEEDED.items() if key in keys]
    return f"Only where {' and '.join(parts)}." if parts else ""


def _unmet(config: RunConfig) -> Iterator[tuple[str, Need]]:
    for need in NEEDS:
        governing = attrgetter(need.of)(config)
        for key in need.keys:
            if _is_set(config, key) and not need.test(governing):
                line = f"{_told(config, key)} has no effect with {option(need.of)}={_short(governing)}; "
                default = _short(attrgetter(key)(DEFAULTS))
                yield f"{line}set {option(need.of)} to {need.words}, or leave {option(key)} at {default}", need


def _told(config: RunConfig, key: str) -> str:
    return f"{option(key)}={_short(attrgetter(key)(config))}"


def _is_set(config: RunConfig, key: str) -> bool:
    return attrgetter(key)(config) != attrgetter(key)(DEFAULTS)


def _short(value: Any) -> str:
    return plain(text(value)) or "nothing"
