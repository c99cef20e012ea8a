from pathlib import Path

import pytest

from jaxlm.config import mesh_spec
from jaxlm.config.checks import check
from jaxlm.config.load import RECIPES, differences, load
from jaxlm.config.schema import RunConfig

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "llama3_1b": 1_235_814_400,
    "llama3_8b": 8_030_261_248,
    "mixtral_8x7b": 46_702_792_704,
    "bert_base": 109_514_298,
}


def recipe(name):
    return load(RunConfig, [f"--config={name}"])[0]


def parameters(m):
    """Parameters of a model by arithmetic, without the model's code and without vocabulary padding."""
    head = m.head_size or m.embed // m.heads
    kv = m.kv_heads or m.heads
    norm = 2 * m.embed if m.norm == "layer" else m.embed
    attention = m.embed * head * (2 * m.heads + 2 * kv)
    attention += head * (m.heads + 2 * kv) * ("qkv" in m.biases) + m.embed * ("output" in m.biases)
    mlp = m.embed * m.mlp * (3 if m.gated else 2)
    mlp += (m.embed + m.mlp * (2 if m.gated else 1)) * ("mlp" in m.biases)
    mlp = mlp * max(m.experts, 1) + m.embed * m.experts
    tables = m.vocabulary * m.embed * (1 if m.tied else 2) + m.max_positions * m.embed * (m.positions == "learned")
    tables += m.token_types * m.embed
    head = m.embed * (m.embed + 1) + norm + m.vocabulary if m.architecture == "encoder" else 0
    return m.layers * (attention + mlp + 2 * norm) + norm + tables + head


@pytest.mark.parametrize("name", NAMES)
def test_recipe_fits_its_mesh(name):
    config = recipe(name)
    spec = mesh_spec.parse(config.mesh)
    check(config, spec.resolve(spec.device_count))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_named_and_introduced(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert name.split("_")[-2] == recipe(name).mesh.replace(",", "")
    head = text[: text.index("\nmesh:")]
    assert all(line.startswith("#") for line in head.splitlines())
    for word in (f"python -m jaxlm.train --config={name}", "Cost", "Expect"):
        assert word in head


@pytest.mark.parametrize("model, count", PUBLISHED.items())
def test_published_parameter_counts(model, count):
    found = [name for name in NAMES if name.startswith(f"{model}_")]
    assert found
    for name in found:
        assert parameters(recipe(name).model) == count


def test_the_tiny_recipe_is_the_defaults():
    assert [key for key, *_ in differences(recipe("tiny_dp4tp2_cpu"), RunConfig())] == ["mesh"]


def test_a_run_can_move_between_the_gpt2_recipes():
    changed = {key for key, *_ in differences(recipe("gpt2_124m_dp1_h200"), recipe("gpt2_124m_dp8_h100"))}
    assert changed == {"mesh", "train.microbatches"}


def test_recipes_are_where_the_package_looks():
    assert Path("configs").resolve() == RECIPES
