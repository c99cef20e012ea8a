"""`python -m jaxlm.evaluate`: measure a trained model."""

import os
from pathlib import Path

from jaxlm.config import cli
from jaxlm.config.load import load, read_run
from jaxlm.config.mesh_spec import parse
from jaxlm.evaluate.options import Options


def main(argv: list[str]) -> None:
    """Print the result on stdout; on stderr what computed it."""
    options, _ = load(Options, argv)
    spec = parse(options.mesh)
    folder = Path(options.run).expanduser()
    config = read_run(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(config.data.cache).expanduser() / "xla"))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from jaxlm.evaluate import output, perplexity

    output.check_out(options.out)
    with output.progress("batches") as advance:
        found = perplexity.measure(options, folder, config, spec, output.note, advance)
    print(perplexity.line(found))
    output.write(options.out, found)


if __name__ == "__main__":
    cli.run(main)
