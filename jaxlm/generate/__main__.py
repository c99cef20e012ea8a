"""`python -m jaxlm.generate`: continue text with a trained model."""

import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import cli
from jaxlm.config.errors import UserError
from jaxlm.config.load import load, read_run
from jaxlm.config.mesh_spec import MeshSpec, parse
from jaxlm.config.schema import RunConfig

if TYPE_CHECKING:
    from jaxlm.checkpoint.opened import Opened
    from jaxlm.generate.decode import Speed
    from jaxlm.generate.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """python -m jaxlm.generate: continue text with the newest checkpoint of a run."""

    run: str = "runs/default"
    """The run folder that training wrote."""
    prompt: str = ""
    """Text to continue (default: the run's eval.prompt)."""
    prompt_file: str = ""
    """A file of prompts instead, one a line; in a .jsonl file each line is a JSON string, which may hold line ends
    (default: none)."""
    bos: bool = True
    """Begin prompts as the model's tokenizer.json begins texts (Llama and Gemma: the bos token; most: nothing)."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation, comma-separated; it stops before the first of them (default: none)."""
    samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 128
    """Most new tokens of a continuation; it ends sooner where the model ends the text."""
    temperature: float = 0.8
    """Logits are divided by it before a token is drawn; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 is all."""
    top_p: float = 0.95
    """Then draw among the fewest likeliest tokens that hold this much of the probability; 1 is all."""
    interactive: bool = False
    """Type prompts and read replies as they come; where the run's tokenizer has a chat template, a conversation."""
    beams: int = 1
    """Search the likeliest text with this many that go on together, with temperature 0; 1 is no search."""
    length_penalty: float = 1.0
    """A search ranks texts by log-probability over length to this power; more than 1 is for longer texts."""
    seed: int = 0
    """Seed of the draws: the same seed gives row i the same text on any mesh."""
    mesh: str = "dp1"
    """Devices by axis, as in training (rep dp fsdp tp; one size may be -1); dp1 is one device, whatever is there."""
    step: int | None = None
    """The checkpoint (default: the newest valid one)."""


def main(argv: list[str]) -> None:
    """Print the continuation of each prompt on stdout; on stderr what computed it and how fast."""
    options, _ = load(GenerateConfig, argv)
    spec = parse(options.mesh)
    folder = Path(options.run).expanduser()
    config = read_run(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(config.data.cache).expanduser() / "xla"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _generate(options, spec, folder, config)


def _generate(options: GenerateConfig, spec: MeshSpec, folder: Path, config: RunConfig) -> None:
    from jaxlm.checkpoint.opened import open_run
    from jaxlm.generate import beams
    from jaxlm.generate.decode import Generator, check
    from jaxlm.generate.sampling import Sampling
    from jaxlm.generate.text import Output, TextStream

    check(config.model)
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    rule = beams.rule(sampling, options.beams, options.length_penalty)
    texts = _texts(options, config, greedy=sampling.greedy)
    run = open_run(folder, config, spec, options.step, note)
    note(run.describe())
    prefix = run.conventions.prefix if options.bos else ()
    if options.interactive:
        _talk(options, run, sampling, prefix)
        return
    prompts = [[*prefix, *run.tokenizer.encode(text)] for text in texts]
    output = Output(texts, [TextStream(run.tokenizer.decode, prompt, options.stop) for prompt in prompts])
    generator = Generator(run.model, run.runtime)
    generator(
        run.params,
        prompts,
        max_new_tokens=options.max_tokens,
        rule=rule,
        eos_id=run.tokenizer.eos_id,
        stop_ids=run.conventions.stops,
        on_token=output.push,
    )
    output.finish()
    if generator.speed:
        note(_speed_line(generator.speed))


def _talk(options: GenerateConfig, run: "Opened", rule: "Sampling", prefix: Sequence[int]) -> None:
    from jaxlm.generate import talk
    from jaxlm.generate.chat import Chat
    from jaxlm.generate.decode import Generator
    from jaxlm.generate.text import written

    ways = run.conventions
    chat = Chat(ways.template, ways.names) if ways.template is not None else None
    kind = "a conversation, in the chat template of its tokenizer" if chat else "each message is a text to continue"
    note(f"{kind}. {talk.HELP}")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    partner = talk.Talk(
        generator=Generator(run.model, run.runtime),
        params=run.params,
        tokenizer=run.tokenizer,
        rule=rule,
        max_new_tokens=options.max_tokens,
        prefix=prefix,
        stop_ids=ways.stops,
        stops=options.stop,
        chat=chat,
    )
    for text in talk.messages():
        try:
            partner.answer(text, written, note)
        except UserError as error:  # of this message; the next may do
            note(f"error: {error}")


def _texts(options: GenerateConfig, config: RunConfig, *, greedy: bool) -> list[str]:
    """The prompt of each row."""
    from jaxlm.generate.text import read_prompts

    if options.samples < 1:
        raise UserError(f"--samples={options.samples}: must be 1 or more")
    if options.samples > 1 and greedy:
        raise UserError(f"--samples={options.samples} with --temperature=0 would all be the same; use --samples=1")
    if options.interactive and (options.prompt or options.prompt_file or options.samples > 1):
        raise UserError("--interactive reads prompts as you type them; leave out --prompt, --prompt-file and --samples")
    if options.interactive and options.beams > 1:
        raise UserError(
            f"--interactive writes a reply as it is made, --beams={options.beams} knows it at its end; leave one out"
        )
    if options.prompt and options.prompt_file:
        raise UserError("--prompt and --prompt-file are both given; use one")
    texts = [options.prompt or config.eval.prompt]
    if options.prompt_file:
        texts = read_prompts(Path(options.prompt_file).expanduser())
    return [text for text in texts for _ in range(options.samples)]


def note(line: str) -> None:
    """Tell a line about the work, apart from the text it makes."""
    print(line, file=sys.stderr, flush=True)


def _speed_line(speed: "Speed") -> str:
    prefill = speed.prompt_tokens / speed.prefill_seconds
    parts = [
        f"prefill {speed.prompt_tokens} tokens in {speed.prefill_seconds:.3f} s = {prefill:.0f} tokens/s",
        f"compile {speed.compile_seconds:.1f} s",
    ]
    if speed.decoded_tokens:
        decode = speed.decoded_tokens / speed.decode_seconds
        text = f"decode {speed.decoded_tokens} tokens in {speed.decode_seconds:.3f} s = {decode:.0f} tokens/s"
        parts.insert(1, text)
    return "; ".join(parts)


if __name__ == "__main__":
    cli.run(main)
