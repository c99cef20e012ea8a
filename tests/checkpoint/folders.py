"""Folders as Hugging Face has them, of random numbers: weights, config.json, a tokenizer with a chat template."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.matching import matches
from jaxlm.models import families
from jaxlm.models.build import build

BOS = "<s>"
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}\n"


def write_model(folder: Path, given: dict[str, Any], dtype: str = "F32", largest: int = 10**9) -> Path:
    """A model of `given`, a config.json, with random tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(given, indent=2))
    family = families.of_config(given)
    found = matches(family, build(family.read(given), None))
    writer = safetensors.Writer(folder, {match.name: match.shape for match in found}, dtype, largest)
    rng = np.random.default_rng(0)
    for match in found:
        values = rng.standard_normal(match.shape, np.float32) * match.shape[-1] ** -0.5
        writer.write(match.name, 0, values)
    return folder


def write_tokenizer(folder: Path, vocabulary: int = 300, *, bos: bool = False) -> Path:
    """A byte-level tokenizer of `vocabulary` tokens and whatever stands beside one; with `bos`, its texts begin with
    BOS, as those of Llama do."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=270, special_tokens=["</s>", "<pad>", *[BOS] * bos], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def function(self): return the value of the other function"] * 20, trainer)
    tokenizer.add_special_tokens([f"<extra {i}>" for i in range(vocabulary - tokenizer.get_vocab_size())])
    described = {"eos_token": "</s>", "chat_template": CHAT, "model_max_length": 64}
    if bos:
        described["bos_token"], number = BOS, tokenizer.token_to_id(BOS)
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, number)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "</s>", "pad_token": "<pad>"}')
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}\n')
    return folder


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """dtype, shape and bytes of every tensor in a folder."""
    stored = safetensors.open_folder(folder)
    return {
        name: (tensor.dtype, tensor.shape, tensor.read(0, tensor.shape[0]).tobytes()) for name, tensor in stored.items()
    }
