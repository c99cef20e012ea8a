"""`--dry-run` and `--explain`: compile one step, say what it costs, train nothing."""

import time
from pathlib import Path

from rich.console import Console

from jaxlm.config.checks import check
from jaxlm.config.errors import UserError
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.data.corpus import open_corpora
from jaxlm.metrics import flops
from jaxlm.parallel import mesh as meshes
from jaxlm.train.assemble import assemble
from jaxlm.train.explain import explain, memory, placed
from jaxlm.train.meter import written_share
from jaxlm.train.picture import sharding_map


def preview(config: RunConfig, *, full: bool) -> None:
    """Print the memory of one compiled step; in `full`, every parameter, the collectives and a picture of them too.

    The corpus is opened only where `model.vocabulary` leaves the vocabulary to its tokenizer.
    """
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    mesh, spec = meshes.build(
        parse(config.mesh), simulate=config.simulate, distributed=config.distributed, announce=console.print
    )
    check(config, spec, console.print)
    vocabulary = None
    if config.model.vocabulary is None:
        vocabulary = open_corpora(config.data, config.objective).tokenizer.vocabulary_size
    assembly = assemble(config, mesh, vocabulary, console.print)
    began = time.perf_counter()
    compiled = assembly.compile(console.print)
    console.print(f"mesh {spec}, compiled in {time.perf_counter() - began:.1f} s")
    device = mesh.devices.flat[0]
    arguments = (config.model, assembly.model.vocabulary, config.data.sequence_length)
    console.print(flops.explain(*arguments, device.device_kind, str(assembly.runtime.dtype), written_share(config)))
    if not full:
        memory(assembly.plan, compiled, console)
        return
    explain(assembly.model, assembly.plan, compiled, console)
    path = Path(config.run).expanduser() / "sharding.png"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run folder {config.run} cannot be made: {error.strerror}; use another --run") from None
    try:
        sharding_map(placed(assembly.model, assembly.plan), f"parameters on mesh {spec}", path)
    except UserError as error:
        console.print(str(error))
    else:
        console.print(f"sharding map: {path}")
