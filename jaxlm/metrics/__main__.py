"""`python -m jaxlm.metrics RUN`: the loss curve of a run, as a line of text and as a picture."""

from dataclasses import dataclass
from pathlib import Path

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.metrics import curve


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m jaxlm.metrics RUN: the loss of the run folder RUN (runs/NAME)."""

    out: str | None = None
    """Picture to write (png, svg, pdf; extra: plot)."""


def main(argv: list[str]) -> None:
    """Print the curve, and draw it where --out asks for it."""
    if not argv or argv[0] in ("-h", "--help"):
        load(Options, ["--help"])
    options, _ = load(Options, argv[1:])
    folder = Path(argv[0])
    line = curve.summary(folder)
    if not line:
        raise UserError(f"no loss in {folder / 'metrics.jsonl'}; pass the folder that --run named")
    print(line)
    if options.out:
        curve.draw(folder, Path(options.out))
        print(f"wrote {options.out}")


if __name__ == "__main__":
    run(main)
