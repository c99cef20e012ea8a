"""`python -m jaxlm.generate`: continue text with a trained model."""

import os
import sys
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from jaxlm.config import cli
from jaxlm.config.errors import NoValidCheckpoint, UserError
from jaxlm.config.load import load, read_file
from jaxlm.config.mesh_spec import MeshSpec, parse
from jaxlm.config.schema import RunConfig
from jaxlm.config.values import shown

if TYPE_CHECKING:
    from jaxlm.generate.decode import Speed
    from jaxlm.models.runtime import Runtime


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
    samples: int = 1
    """Continuations of each prompt."""
    max_tokens: int = 128
    """Most new tokens of a continuation; it ends before where the model ends the document."""
    temperature: float = 0.8
    """Logits are divided by it before a token is drawn; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 is all."""
    top_p: float = 0.95
    """Then draw among the fewest likeliest tokens that hold this much of the probability; 1 is all."""
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
    config = _read_run(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(config.data.cache).expanduser() / "xla"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _generate(options, spec, folder, config)


def _read_run(folder: Path) -> RunConfig:
    if not (folder / "config.yaml").is_file():
        others = sorted(path.parent.name for path in folder.parent.glob("*/config.yaml"))
        near = get_close_matches(folder.name, others, n=1, cutoff=0.0)
        hint = f"; nearest is --run={folder.parent / near[0]}" if near else "; train one first (python -m jaxlm.train)"
        raise UserError(f"--run={shown(str(folder))}: no run there (no config.yaml){hint}")
    return read_file(RunConfig, folder / "config.yaml")


def _generate(options: GenerateConfig, spec: MeshSpec, folder: Path, config: RunConfig) -> None:
    from jaxlm.data import tokenizer as tokenizers
    from jaxlm.generate.decode import Generator, check
    from jaxlm.generate.sampling import Sampling
    from jaxlm.generate.text import Output, TextStream
    from jaxlm.models.build import build

    check(config.model)
    rule = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    texts = _texts(options, config, greedy=rule.greedy)
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"--run={folder}: it holds no tokenizer folder; copy the whole run, or train again")
    tokenizer = tokenizers.load(folder / "tokenizer")
    runtime = _runtime(config, spec)
    model = build(config.model, tokenizer.vocabulary_size)
    params, step = _restore(folder, options, config, model, runtime)
    device, mesh = runtime.layout.mesh.devices.flat[0], runtime.layout.mesh
    kind = f"{'simulated ' if device.platform == 'cpu' and mesh.size > 1 else ''}{device.device_kind}"
    note(f"{folder} step {step} on {mesh.size} x {kind}, {runtime.dtype}, attention {runtime.attention}")
    prompts = [tokenizer.encode(text) for text in texts]
    output = Output(texts, [TextStream(tokenizer.decode, prompt) for prompt in prompts])
    generator = Generator(model, runtime)
    generator(
        params,
        prompts,
        max_new_tokens=options.max_tokens,
        rule=rule,
        eos_id=tokenizer.eos_id,
        on_token=output.push,
    )
    output.finish()
    if generator.speed:
        note(_speed_line(generator.speed))


def _texts(options: GenerateConfig, config: RunConfig, *, greedy: bool) -> list[str]:
    """The prompt of each row."""
    from jaxlm.generate.text import read_prompts

    if options.samples < 1:
        raise UserError(f"--samples={options.samples}: must be 1 or more")
    if options.samples > 1 and greedy:
        raise UserError(f"--samples={options.samples} with --temperature=0 would all be the same; use --samples=1")
    if options.prompt and options.prompt_file:
        raise UserError("--prompt and --prompt-file are both given; use one")
    texts = [options.prompt or config.eval.prompt]
    if options.prompt_file:
        texts = read_prompts(Path(options.prompt_file).expanduser())
    return [text for text in texts for _ in range(options.samples)]


def _runtime(config: RunConfig, spec: MeshSpec) -> "Runtime":
    import jax

    from jaxlm.models.attention import choose
    from jaxlm.models.runtime import Runtime, compute_dtype
    from jaxlm.parallel import mesh as meshes
    from jaxlm.parallel.rules import layout

    if spec.device_count == 1 and not spec.inferred:
        mesh = meshes.from_devices(spec, jax.devices()[:1])
    else:
        mesh, _ = meshes.build(spec)
    platform = mesh.devices.flat[0].platform
    dtype = compute_dtype(config.precision, platform)
    # What training computed attention with may not read a cache: only the reference is kept where it was asked for.
    attention = choose(
        "reference" if config.attention == "reference" else "auto",
        platform=platform,
        compute_dtype=str(dtype),
        head_size=config.model.head_width,
        sequence_length=config.data.sequence_length,
        softcap=config.model.attention_softcap,
        cached=True,
    )
    return Runtime(
        layout=layout(mesh, kv_heads=config.model.key_value_heads, variant="decode"),
        attention=attention.name,
        dtype=dtype,
    )


def note(line: str) -> None:
    """Tell a line about the work, apart from the text it makes."""
    print(line, file=sys.stderr, flush=True)


def _restore(folder: Path, options: GenerateConfig, config: RunConfig, model, runtime):
    """The parameters alone, straight onto the mesh, and the step they are of."""
    import jax

    from jaxlm.checkpoint.store import Store

    def place(path, leaf, dims):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        sharding = runtime.layout.sharding(dims, leaf.shape, name)
        return jax.ShapeDtypeStruct(leaf.shape, config.precision.params, sharding=sharding)

    abstract = jax.tree_util.tree_map_with_path(place, model.abstract, model.dims)
    with Store(folder / "checkpoints") as store:
        held, step = store.steps(), options.step
        if step is None:
            step = store.latest_valid(note)
            if step is None:
                what = f"none of the checkpoints {' '.join(map(str, held))} is valid" if held else "no checkpoint yet"
                raise NoValidCheckpoint(f"--run={folder}: {what}; train on, or restore one from a copy")
        elif step not in held:
            have = " ".join(map(str, held)) or "none"
            raise NoValidCheckpoint(f"--step={step}: no such checkpoint; there are: {have}")
        elif problem := store.verify(step):
            raise NoValidCheckpoint(f"--step={step}: that checkpoint is damaged: {problem}; leave out --step")
        return store.restore(step, {"params": abstract}, partial=True)["params"], step


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
