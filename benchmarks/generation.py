"""Tokens a second of generation, reading prompts and writing text, beside transformers' `generate` on the same CPU.

    python benchmarks/generation.py --out=benchmarks/results/generation.json

A Llama of random weights, made here in float32; its greedy text is the same in both before anything is timed. Both take
turns, and medians are told: a call that makes one token is the time of reading prompts, and what further tokens add to
it, that of writing. Threads that wait for each other on a busy machine spoil such a comparison: `taskset -c 0` in front
of the command gives both one core. Needs the extra hf-test.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import report

from jaxlm.checkpoint import safetensors
from jaxlm.checkpoint.__main__ import main as checkpoint
from jaxlm.checkpoint.matching import matches
from jaxlm.checkpoint.opened import open_run
from jaxlm.config import cli
from jaxlm.config.errors import UserError
from jaxlm.config.load import load, read_run
from jaxlm.config.mesh_spec import parse
from jaxlm.data.tokenizer import Bytes
from jaxlm.generate.decode import Generator
from jaxlm.generate.sampling import Sampling
from jaxlm.models import families
from jaxlm.models.build import build

CLOCKS = ("clock", "cpu")
"""Seconds that pass, and those of the processor, which say more on a busy machine."""
Generate = Callable[[list[list[int]], int], list[list[int]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """python benchmarks/generation.py: tokens a second, beside transformers."""

    out: str | None = None
    """JSON file to write the figures to."""
    layers: int = 6
    """Layers of the model."""
    embed: int = 512
    """Its width."""
    vocabulary: int = 8192
    """Tokens of its vocabulary."""
    prompt: int = 256
    """Tokens of a prompt."""
    new: int = 65
    """New tokens of each row."""
    rows: tuple[int, ...] = (1, 8)
    """Rows of a batch."""
    rounds: int = 7
    """Turns that each of the two takes."""


def config(options: Options) -> dict[str, Any]:
    """Of a small Llama."""
    return {
        "model_type": "llama",
        "vocab_size": options.vocabulary,
        "hidden_size": options.embed,
        "intermediate_size": options.embed * 11 // 4,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.embed // 64,
        "num_key_value_heads": max(options.embed // 128, 1),
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": None,
        "bos_token_id": None,
    }


def write(folder: Path, given: dict[str, Any]) -> int:
    """A model of `given`; the number of its parameters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(given))
    family = families.of_config(given)
    found = matches(family, build(family.read(given), None))
    writer = safetensors.Writer(folder, {match.name: match.shape for match in found}, "F32")
    random = np.random.default_rng(0)
    for match in found:
        spread = 1.0 if len(match.shape) == 1 else match.shape[-1] ** -0.5
        writer.write(match.name, 0, random.standard_normal(match.shape, np.float32) * spread)
    return sum(math.prod(match.shape) for match in found)


def ours(run: Path) -> Generate:
    """Our generator on one device."""
    Bytes().save(run / "tokenizer")  # a run has one; here ids are all there is
    opened = open_run(run, read_run(run), parse("dp1"), None, lambda line: None)
    generator = Generator(opened.model, opened.runtime)
    return lambda prompts, count: generator(opened.params, prompts, max_new_tokens=count, rule=Sampling())


def theirs(folder: Path) -> Generate:
    """transformers' of the same files."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UserError(f"this measures beside transformers ({error}): pip install 'jaxlm[hf-test]'") from None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return made[:, ids.shape[1] :].tolist()

    return generate


def measure(options: Options, generators: dict[str, Generate], rows: int) -> dict[str, Any]:
    """Medians of tokens a second, and ours over theirs."""
    random = np.random.default_rng(1)
    prompts = random.integers(0, options.vocabulary, (rows, options.prompt)).tolist()
    texts = {name: generate(prompts, options.new) for name, generate in generators.items()}
    if texts["jaxlm"] != texts["transformers"]:
        raise UserError("the two write different text, so their times mean nothing; look at tests/checkpoint first")
    seconds: dict[tuple[str, int], list[list[float]]] = {}
    for _ in range(options.rounds + 1):  # the first compiles and warms up
        for name, generate in generators.items():
            for count in (1, options.new):
                began = [time.perf_counter(), time.process_time()]
                generate(prompts, count)
                spent = [time.perf_counter() - began[0], time.process_time() - began[1]]
                seconds.setdefault((name, count), []).append(spent)
    found: dict[str, Any] = {"rows": rows}
    for i, clock in enumerate(CLOCKS):
        for name in generators:
            first, whole = (np.array(seconds[name, count])[1:, i] for count in (1, options.new))
            found[f"{name}_prefill_{clock}"] = round(rows * options.prompt / np.median(first), 1)
            found[f"{name}_decode_{clock}"] = round(rows * (options.new - 1) / np.median(whole - first), 1)
        for what in ("prefill", "decode"):
            ratio = found[f"jaxlm_{what}_{clock}"] / found[f"transformers_{what}_{clock}"]
            found[f"{what}_{clock}_ratio"] = round(ratio, 3)
    return found


def main(argv: list[str]) -> None:
    """Measure, print and write."""
    options, _ = load(Options, argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = write(folder / "model", config(options))
        checkpoint(["import", f"--from={folder / 'model'}", f"--run={folder / 'run'}"])
        generators = {"jaxlm": ours(folder / "run"), "transformers": theirs(folder / "model")}
        found = [measure(options, generators, rows) for rows in options.rows]
    for each in found:
        print(f"rows {each['rows']}: tokens/s, jaxlm and transformers")
        for key in [f"{what}_{clock}" for what in ("prefill", "decode") for clock in CLOCKS]:
            one, other, ratio = each[f"jaxlm_{key}"], each[f"transformers_{key}"], each[f"{key}_ratio"]
            print(f"  {key:13} {one:10,.0f} {other:10,.0f}  ratio {ratio:.2f}")
    size = {"parameters": count, "prompt_tokens": options.prompt, "new_tokens": options.new}
    report.write(options.out, "generation.py", argv, size | {"tokens_per_second": found})


if __name__ == "__main__":
    cli.run(main)
