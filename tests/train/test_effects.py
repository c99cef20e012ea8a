"""The table of `config.effects` is true: a key changes the program where it says that it counts, and only there."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxlm.config.effects import NEEDS, mistakes
from jaxlm.config.schema import ModelConfig, OptimizerConfig, RunConfig
from jaxlm.train import optimizer
from tests.train.battery import GPT, batch, configuration
from tests.train.battery import build as assemble

OPTIMIZER = {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "decay_fraction": 0.5, "final_fraction": 0.5}
MODEL = {
    "max_positions": 64,
    "rope_theta": 5e5,
    "rope_local_theta": 5e4,
    "rope_scaling": "yarn",
    "rope_factor": 4.0,
    "rope_original_length": 128,
    "rope_frequencies": (1.0, 8.0),
}
"""Values that are not the defaults."""

STRETCHED = {"positions": "rotary", "rope_factor": 2.0}
DECODERS = [
    {},
    {"positions": "none"},
    {"positions": "rotary"},
    {"positions": "rotary", "windows": (0,)},
    {"positions": "rotary", "windows": (4, 0)},
    {**STRETCHED, "rope_scaling": "llama3"},
    {**STRETCHED, "rope_scaling": "linear", "windows": (4, 0)},
]


def program(function: Any, *arguments: Any) -> tuple[str, list[bytes]]:
    """What a function computes from arrays of these shapes: its operations, and the constants in them."""
    closed = jax.make_jaxpr(function)(*arguments)
    return str(closed.jaxpr), [np.asarray(constant).tobytes() for constant in closed.consts]


def counts(config: RunConfig, key: str) -> bool:
    return not any(line.startswith(f"--{key.replace('_', '-')}=") for line in mistakes(config))


def update(config: OptimizerConfig) -> tuple[str, list[bytes]]:
    params = {"blocks": {"kernel": jax.ShapeDtypeStruct((2, 4, 4), np.float32)}}
    rule = optimizer.build(config, 100)
    return program(rule.update, params, jax.eval_shape(rule.init, params), params)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_optimizer_keys(name: str, schedule: str) -> None:
    plain = OptimizerConfig(name=name, schedule=schedule)
    for key, value in OPTIMIZER.items():
        changed = replace(plain, **{key: value})
        counted = counts(RunConfig(optimizer=changed), f"optimizer.{key}")
        assert (update(changed) != update(plain)) is counted, key


def hidden(model: ModelConfig) -> tuple[str, list[bytes]]:
    config = configuration(model)
    made = assemble(config, "dp1")
    return program(lambda params, b: made.model.hidden(params, b, made.runtime), made.model.abstract, batch(config, 0))


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_model_keys(decoder: dict[str, Any]) -> None:
    plain = replace(GPT, **decoder)
    before = hidden(plain)
    for key, value in MODEL.items():
        changed = replace(plain, **{key: value})
        assert (hidden(changed) != before) is counts(RunConfig(model=changed), f"model.{key}"), key


def test_every_key_of_the_table_is_tried() -> None:
    named = {key for need in NEEDS for key in need.keys}
    tried = {f"optimizer.{key}" for key in OPTIMIZER} | {f"model.{key}" for key in MODEL}
    assert tried == {key for key in named if key.startswith("optimizer.") or "rope" in key or "positions" in key}
