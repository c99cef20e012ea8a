"""`python -m jaxlm.launch`: run the processes of a training run, and keep them running."""

from jaxlm.config import checks, cli
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.launch.options import Options, check
from jaxlm.launch.supervisor import Supervisor

USAGE = """python -m jaxlm.launch local [--processes=2] -- TRAINING OPTIONS          all processes on this host
python -m jaxlm.launch node --nodes=2 --node-rank=0 --coordinator=HOST -- TRAINING OPTIONS   those of one of several
Training options are those of python -m jaxlm.train. Each verb takes --help. The exit code is that of the job."""
VERBS = ("local", "node")


def main(argv: list[str]) -> int:
    """Run one verb; returns the exit code of the job."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    if argv[0] not in VERBS:
        raise UserError(f"no verb {argv[0][:40]!r}; use {', '.join(VERBS)} (python -m jaxlm.launch --help)")
    own = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    options, _ = load(Options, own)
    check(options, argv[0])
    arguments = argv[argv.index("--") + 1 :] if "--" in argv else []
    config, flags = load(RunConfig, arguments, ("print-config", "dry-run", "explain"))
    if flags:
        raise UserError(f"--{min(flags)} does not train; give it to python -m jaxlm.train")
    checks.check(config, parse(config.mesh))
    return Supervisor(config, arguments, options).run()


if __name__ == "__main__":
    cli.run(main)
