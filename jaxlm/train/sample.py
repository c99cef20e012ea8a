"""The text a run writes at its end, to see what the loss means."""

from pathlib import Path
from typing import Any

import jax

from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.decode import generate
from jaxlm.train.assemble import Assembly


def write_sample(assembly: Assembly, tokenizer: Tokenizer, params: Any, folder: Path, step: int) -> str:
    """Continue `eval.prompt` by `eval.sample_tokens` tokens and return the text; process 0 writes it to samples.txt."""
    config = assembly.config.eval
    prompt = tokenizer.encode(config.prompt) or [tokenizer.eos_id]
    model, length = assembly.model.config, config.sample_tokens
    if model.positions == "learned":
        # A sample is a courtesy: one as long as the position table allows is better than an error after the training.
        prompt = prompt[: model.max_positions // 2]
        length = min(length, model.max_positions - len(prompt))
    runtime = assembly.unpiped("decode")
    continuation = generate(
        assembly.model,
        assembly.moved(params, runtime),
        runtime,
        [prompt],
        max_new_tokens=length,
        temperature=0.8,
        top_p=0.95,
        seed=step,
        eos_id=tokenizer.eos_id,
    )[0]
    text = tokenizer.decode([*prompt, *continuation])
    if jax.process_index() == 0:
        with (folder / "samples.txt").open("a", encoding="utf-8") as file:
            file.write(f"--- step {step} ---\n{text}\n")
    return text
