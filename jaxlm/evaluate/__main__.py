"""`python -m jaxlm.evaluate`: measure a trained model."""

import os
from importlib import import_module
from pathlib import Path

from jaxlm.config import cli
from jaxlm.config.errors import UserError
from jaxlm.config.load import load, read_run
from jaxlm.config.mesh_spec import MeshSpec, parse
from jaxlm.config.schema import RunConfig
from jaxlm.evaluate.options import Data, Options


def main(argv: list[str]) -> None:
    """Print the result on stdout; on stderr what computed it."""
    options, _ = load(Options, argv)
    _check(options)
    spec = parse(options.mesh)
    folder = Path(options.run).expanduser()
    config = read_run(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(config.data.cache).expanduser() / "xla"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if options.tasks or options.references:
        _text(options, folder, config, spec)
    else:
        _perplexity(options, folder, config, spec)


def _check(options: Options) -> None:
    """That the options are of one kind of measurement."""
    kinds = {"--tasks": options.tasks, "--references": options.references, "--data.path": options.data.path}
    given = [name for name, value in kinds.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are different measurements; name one")
    defaults, data = Options(), Data()
    of_tasks = ("include", "shots")
    of_references = ("max_tokens", "stop")
    of_text = ("batches", "data.split", "data.text_key", "data.sequence_length")
    wrong = {"--tasks": of_references + of_text, "--references": of_tasks + of_text}
    for key in wrong.get(given[0] if given else "", (*of_tasks, *of_references, "chat")):
        section, _, name = key.rpartition(".")
        here, there = (options.data, data) if section else (options, defaults)
        if getattr(here, name) != getattr(there, name):
            kind = given[0] if given and given[0] in wrong else "perplexity"
            raise UserError(f"--{key.replace('_', '-')} has no effect on {kind}; leave it out")
    for name in ("documents", "batches"):
        if (count := getattr(options, name)) is not None and not 1 <= count < 2**31:
            raise UserError(f"--{name}={count}: must be from 1 to {2**31 - 1}; leave it out for all")
    if options.data.batch_size is not None and options.data.batch_size < 1:
        raise UserError(f"--data.batch-size={options.data.batch_size}: must be 1 or more")


def _perplexity(options: Options, folder: Path, config: RunConfig, spec: MeshSpec) -> None:
    from jaxlm.evaluate import output, perplexity

    output.check_out(options.out)
    with output.progress("batches") as advance:
        found = perplexity.measure(options, folder, config, spec, output.note, advance)
    print(perplexity.line(found))
    output.write(options.out, found)


def _text(options: Options, folder: Path, config: RunConfig, spec: MeshSpec) -> None:
    """What needs the model's text, or its likelihood of one."""
    from jaxlm.evaluate import output

    output.check_out(options.out)
    if options.tasks and config.model.architecture == "encoder_decoder":
        raise UserError(
            "--tasks asks how likely texts go on, and an encoder_decoder answers what it has read; use --references"
        )
    kind = import_module(f"jaxlm.evaluate.{'harness' if options.tasks else 'references'}")
    from jaxlm.checkpoint.opened import open_run
    from jaxlm.generate.decode import check

    check(config.model)
    run = open_run(folder, config, spec, options.step, output.note)
    output.note(run.describe())
    size = options.data.batch_size or config.data.batch_size
    found = kind.measure(options, run, size, output.note, output.progress)
    output.table(kind.rows(found))
    output.write(options.out, {"run": str(folder), "step": run.step, "mesh": options.mesh, **found})


if __name__ == "__main__":
    cli.run(main)
