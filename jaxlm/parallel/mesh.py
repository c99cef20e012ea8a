"""From a mesh spec to the devices: simulates CPU devices, joins other processes, orders devices by network."""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.mesh_spec import AXES, MeshSpec
from jaxlm.parallel.host import keep_heap

LISTEN = "JAXLM_LISTEN"
"""Environment variable: the address at which CPU processes listen for each other (default: that of the host's name)."""

MOST_SIMULATED = 1024
"""Each simulated device is a thread or two."""


def build(
    spec: MeshSpec,
    *,
    simulate: bool = True,
    distributed: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[Mesh, MeshSpec]:
    """Make the device mesh of a run. Must be the process's first use of JAX devices where CPU devices are simulated.

    Args:
        spec: sizes by axis; an inferred size becomes the rest of the devices.
        simulate: on a CPU host, simulate as many devices as `spec` asks for.
        distributed: join the other processes through `jax.distributed` first.
        announce: told in one line what was done on the caller's behalf.

    Returns:
        The mesh (all seven axes, named as in `AXES`, outermost first) and the resolved spec.

    Raises:
        UserError: the sizes do not multiply to the devices there are.
    """
    if distributed:
        _join_processes()
    elif simulate:
        _simulate(spec.device_count)
    devices = jax.devices()
    # The devices of other processes are no simulation of ours: a mesh that leaves some out would leave processes out.
    simulated = simulate and not distributed and devices[0].platform == "cpu"
    if simulated and spec.device_count < len(devices) and not spec.inferred:
        devices = devices[: spec.device_count]
    resolved = spec.resolve(len(devices))
    if devices[0].platform == "cpu":
        keep_heap()
    if simulated and len(devices) > 1:
        announce(f"simulating {len(devices)} devices on this CPU host for mesh {resolved} (--no-simulate to forbid)")
    return from_devices(resolved, devices), resolved


def from_devices(spec: MeshSpec, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of `spec` (every size known) over `devices`; JAX places the inner axes on the fastest links."""
    # Not `jax.make_mesh`: on a torus of TPU chips that takes only axes which are products of whole sides (no tp2 on
    # 4x4x4). And Explicit axis types, its default, reject optax.adafactor and gathers over sharded dims.
    placed = mesh_utils.create_device_mesh(tuple(spec.sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(placed, tuple(AXES.values()), axis_types=(AxisType.Auto,) * len(AXES))


def _simulate(count: int) -> None:
    """Ask the CPU backend, if that is what this host turns out to have, for `count` devices."""
    forced = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if count > MOST_SIMULATED:
        raise UserError(f"mesh of {count} devices: this host simulates at most {MOST_SIMULATED}; use a smaller --mesh")
    if count > 1 and not forced:
        # Once devices are in use their number stands, and `resolve` compares it.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _join_processes() -> None:
    """Join the processes that the environment names; JAX itself finds those of SLURM, Kubernetes, MPI and TPU pods."""
    variables = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    if address := os.environ.get(LISTEN):
        # Gloo, which carries the collectives of CPU processes, listens where the host's name leads. It takes an
        # address, but jax has no option that passes one on.
        from jax._src.lib import _jax

        _jax.make_gloo_tcp_collectives = functools.partial(_jax.make_gloo_tcp_collectives, hostname=address)
    try:
        numbers = {name: int(os.environ[key]) for name, key in variables.items() if key in os.environ}
        # When a process dies the others end after this time, rather than wait 100 seconds in a collective.
        jax.distributed.initialize(
            num_processes=numbers.get("num_processes"),
            process_id=numbers.get("process_id"),
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=60,
        )
    except RuntimeError as error:
        # Not a mistake of the command: the same one may work the next time.
        raise CommandError(f"the processes did not find each other: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"jax.distributed found no other processes ({reason}); set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID, or run under SLURM, or drop --distributed"
        ) from error
