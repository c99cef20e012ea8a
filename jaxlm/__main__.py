"""`jaxlm VERB ...`: the same code as `python -m jaxlm.VERB ...`."""

import sys
from difflib import get_close_matches
from importlib import import_module

from jaxlm import __version__
from jaxlm.config.cli import run
from jaxlm.config.errors import UserError

VERBS = {
    "train": "train a model, or continue a run",
    "launch": "run the processes of a run, and keep them running",
    "data": "turn text into token shards",
    "generate": "continue a prompt with a trained model",
    "evaluate": "measure a trained model",
    "checkpoint": "list, show and verify checkpoints",
    "metrics": "summarise and draw what a run logged",
}


def dispatch(argv: list[str]) -> int | None:
    """Run the verb that `argv` starts with."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = [f"  {verb:12}{meaning}" for verb, meaning in VERBS.items()]
        print("usage: jaxlm VERB [--key=value ...]", "", *lines, "", "jaxlm VERB --help explains every key.", sep="\n")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"jaxlm {__version__}")
        return 0
    if argv[0] not in VERBS:
        near = get_close_matches(argv[0][:80], VERBS, n=1, cutoff=0.0)[0]
        raise UserError(f"no verb {argv[0][:80]!r}; nearest is {near}, all are {' '.join(VERBS)}")
    return import_module(f"jaxlm.{argv[0]}.__main__").main(argv[1:])


def main() -> None:
    """The console script `jaxlm`."""
    run(dispatch, sys.argv[1:])


if __name__ == "__main__":
    main()
