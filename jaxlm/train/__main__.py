"""`python -m jaxlm.train`: train a language model; `python -m jaxlm.train replay`: do steps of a run again."""

import gc
import os
from pathlib import Path

from jaxlm.config import cli
from jaxlm.config.checks import check
from jaxlm.config.load import dump, load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.metrics import heartbeat


def main(argv: list[str]) -> None:
    """Read the configuration, then train, or only explain what training would do."""
    if argv[:1] == ["replay"]:
        from jaxlm.train.replay import Replay, replay

        replay(load(Replay, argv[1:])[0])
        return
    config, flags = load(RunConfig, argv, ("print-config", "dry-run", "explain"))
    check(config, parse(config.mesh))  # before jax is imported: a mistake is answered at once
    if "print-config" in flags:
        print(dump(config), end="")
        return
    # Compiled programs are kept, so that the second start of a run does not compile again. XLA logs its own affairs
    # (an unused CPU feature, a slow rendezvous on two cores) at levels below error.
    cache = Path(config.data.cache).expanduser() / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if flags & {"dry-run", "explain"}:
        from jaxlm.train.preview import preview

        preview(config, full="explain" in flags)
    else:
        heartbeat.begin()
        heartbeat.phase("init")
        # What importing and tracing make stays: to look through it again and again delays the start.
        gc.disable()
        try:
            from jaxlm.train.loop import run

            run(config)  # which enables it again before it trains
        finally:
            gc.enable()


if __name__ == "__main__":
    cli.run(main)
