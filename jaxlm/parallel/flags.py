"""Compiler options, most of which let communication run beside computation: the one place where they are set.

They are given to the compiler with the step, so that a program is the same whatever the environment of the process, and
`--explain` lists them. To decide otherwise, name an option in `XLA_FLAGS` (CPU, GPU) or `LIBTPU_INIT_ARGS` (TPU), as in
`XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=false`: an option named there is left to the environment. On CPU
the step has none: its devices are threads of one process, with nothing to hide.

See https://docs.jax.dev/en/latest/gpu_performance_tips.html for GPU, and MaxText's `xla_flags_library.py` for TPU.
"""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax

ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables from which XLA reads options itself."""

LAYER_BYTES = 1 << 30
"""No less than the weights of one layer, so that its gathers are sent as one: the pipelined loop hides it behind the
layer before."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """A compiler option, and what it is for."""

    name: str
    value: bool | int | str
    why: str
    older: tuple[str, bool | int | str] | None = None
    """Name and value in compilers that do not know `name` yet."""
    kinds: tuple[str, ...] = ()
    """Kinds of device that it is for, as JAX calls them; of none, all of its platform."""


V5E = ("TPU v5 lite", "TPU v5e")
"""Elsewhere the compiler refuses to carry collectives on inside matrix products, or warns of wrong results."""

OPTIONS: dict[str, tuple[Option, ...]] = {
    "cpu": (),
    "gpu": (
        Option(
            name="xla_gpu_enable_latency_hiding_scheduler",
            value=True,
            why="starts collectives early and waits for them late",
        ),
        Option(
            name="xla_gpu_pipeline_all_gather",
            value="COLLECTIVE_PIPELINING_MODE_ON",
            why="fsdp: gathers the next layer's weights while this layer computes",
            older=("xla_gpu_enable_pipelined_all_gather", True),
        ),
        Option(
            name="xla_gpu_all_gather_combine_threshold_bytes",
            value=LAYER_BYTES,
            why="fsdp: one gather a layer, which is what the pipelined loop can hide",
        ),
        Option(
            name="xla_gpu_reduce_scatter_combine_threshold_bytes",
            value=LAYER_BYTES,
            why="fsdp: one reduce-scatter a layer's gradients",
        ),
    ),
    "tpu": (
        Option(
            name="xla_tpu_enable_async_collective_fusion",
            value=True,
            why="carries a collective on inside the matrix products beside it",
            kinds=V5E,
        ),
        Option(
            name="xla_tpu_enable_async_collective_fusion_fuse_all_gather",
            value=True,
            why="fsdp: so for the gathers of weights",
            kinds=V5E,
        ),
        Option(
            name="xla_tpu_enable_async_collective_fusion_fuse_all_reduce",
            value=True,
            why="dp, tp: so for the sums of gradients and activations",
            kinds=V5E,
        ),
        Option(
            name="xla_tpu_enable_async_collective_fusion_multiple_steps",
            value=True,
            why="one collective may span several products",
            kinds=V5E,
        ),
        Option(
            name="xla_tpu_overlap_compute_collective_tc",
            value=True,
            why="lets the core compute between the parts of a collective",
        ),
        Option(name="xla_enable_async_all_gather", value=True, why="gathers have a start and an end"),
        Option(name="xla_enable_async_all_reduce", value=True, why="all-reduces have a start and an end"),
    ),
}
"""By platform. Each has been given to that platform's compiler: see `benchmarks/tpu_compile.py`."""

INITIALISATION: dict[str, tuple[Option, ...]] = {
    "cpu": (
        Option(
            name="xla_backend_optimization_level",
            value=1,
            why="it runs once: LLVM would take longer over the draws than they take; same bits",
        ),
        Option(
            name="xla_cpu_use_fusion_emitters",
            value=False,
            why="the older emitters, where there are both, take three quarters of the time; same bits",
        ),
    ),
}
"""By platform, for the program that makes a fresh state."""


def options(platform: str, kind: str) -> tuple[Option, ...]:
    """Those of a step on devices of `kind` on `platform`, without the ones that the environment names."""
    return _left(option for option in OPTIONS[platform] if not option.kinds or kind in option.kinds)


def initialisation(platform: str) -> tuple[Option, ...]:
    """Those for making a fresh state, without the ones that the environment names."""
    return _left(INITIALISATION.get(platform, ()))


def _left(meant: Iterable[Option]) -> tuple[Option, ...]:
    named = {name for key in ENVIRONMENT for name in re.findall(r"--(\w+)", os.environ.get(key, ""))}
    return tuple(option for option in meant if not named & {option.name, *(option.older or ())[:1]})


def compile_with(
    lowered: jax.stages.Lowered, chosen: tuple[Option, ...], announce: Callable[[str], None]
) -> jax.stages.Compiled:
    """Compile a program with the options that this version of the compiler knows, by their older names where it knows
    only those, and say in a line which it lacks."""
    while True:
        try:
            values: dict[str, Any] = {option.name: option.value for option in chosen}
            return lowered.compile(compiler_options=values or None)
        except jax.errors.JaxRuntimeError as error:
            unknown = re.search(r"No such compile option: '(\w+)'", str(error))
            if unknown is None or unknown[1] not in {option.name for option in chosen}:
                raise
            at = [option.name for option in chosen].index(unknown[1])
            older = chosen[at].older
            if older is None:
                announce(f"this compiler has no option {unknown[1]}: compiling without it")
            instead = () if older is None else (replace(chosen[at], name=older[0], value=older[1], older=None),)
            chosen = (*chosen[:at], *instead, *chosen[at + 1 :])
