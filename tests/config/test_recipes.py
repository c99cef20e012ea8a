import math
import re
from pathlib import Path

import jax
import pytest

from jaxlm.config import mesh_spec
from jaxlm.config.checks import check
from jaxlm.config.load import RECIPES, differences, load
from jaxlm.config.schema import RunConfig
from jaxlm.metrics.flops import parameter_count
from jaxlm.models import families
from jaxlm.models.build import build
from jaxlm.models.families.family import unlike
from tests.models.test_families import PUBLISHED

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
PARAMETERS = {
    "bert_base_dp8_h100": 109_514_298,
    "gemma2_2b_fsdp16_v5p": 2_614_341_888,
    "gemma3_1b_fsdp8_h100": 999_885_952,
    "gpt2_124m_dp1_h200": 124_439_808,
    "gpt2_124m_dp8_h100": 124_439_808,
    "llama3_1b_fsdp8_h100": 1_235_814_400,
    "llama3_8b_fsdp32tp2_h100": 8_030_261_248,
    "mistral_7b_rep4fsdp8_h100": 7_241_732_096,
    "mixtral_8x7b_fsdp8ep8_h100": 46_702_792_704,
    "olmo2_7b_fsdp32_h100": 7_298_617_344,
    "qwen2_494m_dp8_h100": 494_032_768,
    "qwen3_30b_a3b_fsdp8ep8_h100": 30_532_122_624,
    "qwen3_596m_dp1_h200": 596_049_920,
    "roberta_base_dp8_h100": 124_697_433,
    "t5_v1_1_base_dp8_h100": 247_577_856,
}
"""Recipe of a published model -> its parameters."""

OF_FAMILY = {
    "gpt2": ("gpt2_124m_dp8_h100", "gpt2"),
    "llama": ("llama3_1b_fsdp8_h100", "Llama-3.2-1B"),
    "mistral": ("mistral_7b_rep4fsdp8_h100", "Mistral-7B-v0.1"),
    "qwen2": ("qwen2_494m_dp8_h100", "Qwen2.5-0.5B"),  # of the shape of Qwen2 0.5B
    "qwen3": ("qwen3_596m_dp1_h200", "Qwen3-0.6B"),
    "gemma2": ("gemma2_2b_fsdp16_v5p", "gemma-2-2b"),
    "gemma3_text": ("gemma3_1b_fsdp8_h100", "gemma-3-1b"),
    "olmo2": ("olmo2_7b_fsdp32_h100", "OLMo-2-7B"),
    "mixtral": ("mixtral_8x7b_fsdp8ep8_h100", "Mixtral-8x7B"),
    "qwen3_moe": ("qwen3_30b_a3b_fsdp8ep8_h100", "Qwen3-30B-A3B"),
    "bert": ("bert_base_dp8_h100", "bert-base-uncased"),
    "roberta": ("roberta_base_dp8_h100", "roberta-base"),
    "t5": ("t5_v1_1_base_dp8_h100", "t5-v1_1-base"),
}
"""Family of Hugging Face -> a recipe of it, and the published model that has the same config.json."""


def recipe(name):
    return load(RunConfig, [f"--config={name}"])[0]


def parameters(model):
    """Parameters of the model that is built, without the padding of its vocabulary; no array is made."""
    built = build(model, None)
    dims = jax.tree.leaves(built.dims, is_leaf=lambda node: isinstance(node, tuple))
    leaves = zip(jax.tree.leaves(built.abstract), dims, strict=True)
    shapes = [zip(leaf.shape, own, strict=True) for leaf, own in leaves]
    return sum(math.prod(built.vocabulary if dim == "vocab" else size for size, dim in shape) for shape in shapes)


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


def test_every_recipe_but_the_tiny_ones_is_of_a_published_model():
    assert [name for name in NAMES if "_tiny_" not in f"_{name}"] == sorted(PARAMETERS)


@pytest.mark.parametrize("name, count", PARAMETERS.items())
def test_published_parameter_counts(name, count):
    model = recipe(name).model
    assert parameters(model) == count == parameter_count(model, model.vocabulary)


def test_every_family_has_a_recipe():
    assert OF_FAMILY.keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("family", OF_FAMILY)
def test_the_recipe_of_a_family_is_the_published_model(family):
    name, published = OF_FAMILY[family]
    model, theirs = recipe(name).model, families.FAMILIES[family]
    count, given, _ = PUBLISHED[published]
    assert (given["model_type"], count) == (family, PARAMETERS[name])
    assert unlike(model, theirs.read(given)) == unlike(model, theirs.read(theirs.write(model))) == []
    assert families.of_model(model).name == ("bert" if family == "roberta" else family)  # RoBERTa's is BERT's too


def test_the_page_lists_the_recipe_of_each_family():
    text = Path("docs/huggingface.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([0-9,]+) \|$", text, re.MULTILINE)
    assert rows == [(family, name, f"{PARAMETERS[name]:,}") for family, (name, _) in OF_FAMILY.items()]


def test_the_tiny_recipe_is_the_defaults():
    assert [key for key, *_ in differences(recipe("tiny_dp4tp2_cpu"), RunConfig())] == ["mesh"]


def test_a_run_can_move_between_the_gpt2_recipes():
    changed = {key for key, *_ in differences(recipe("gpt2_124m_dp1_h200"), recipe("gpt2_124m_dp8_h100"))}
    assert changed == {"mesh", "train.microbatches"}


def test_recipes_are_where_the_package_looks():
    assert Path("configs").resolve() == RECIPES
