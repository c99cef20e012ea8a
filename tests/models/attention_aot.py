"""Compile the kernels for TPU or CUDA without the hardware: attention_aot.py tpu|cuda. Fails if a kernel is not used,
if it is not smaller than plain XLA, or if anything moves between devices."""

import os
import re
import sys
from functools import partial
from pathlib import Path

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # by tests that run side by side
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec  # noqa: E402

from jaxlm.models.attention import attend  # noqa: E402

B, T, N, K, H = 8, 2048, 8, 4, 128
SETTINGS = [{}, {"window": 256}, {"softcap": 50.0}]
KERNEL = {"tpu": ("splash", "tpu_custom_call"), "cuda": ("cudnn", "__cudnn$fmha")}


def devices(platform: str):
    if platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5:2x2x2").devices[:8]
    target = Path(__file__).with_name("h100_sxm.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x8").devices


def compiled(mesh: Mesh, backend: str, **settings):
    heads = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16, sharding=heads) for n in (N, K))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data")))

    def step(q, k, v, do, segments, positions):
        run = partial(attend, q_segments_BT=segments, q_positions_BT=positions, scale=H**-0.5, backend=backend)
        o, vjp = jax.vjp(lambda q, k, v: run(q, k, v, mesh=mesh, **settings), q, k, v)
        return o, *vjp(do)

    return jax.jit(step, out_shardings=(heads,) * 4).lower(q, k, k, q, ids, ids).compile()


def main(platform: str) -> None:
    backend, kernel = KERNEL[platform]
    axes = ("replica", "data", "fsdp", "model")
    mesh = jax.make_mesh((1, 4, 1, 2), axes, devices=devices(platform), axis_types=(AxisType.Auto,) * 4)
    plain = compiled(mesh, "xla").memory_analysis().temp_size_in_bytes
    for settings in SETTINGS if backend == "splash" else SETTINGS[:2]:
        program = compiled(mesh, backend, **settings)
        text, size = program.as_text(), program.memory_analysis().temp_size_in_bytes
        print(f"{backend} {settings}: {size / 2**20:.1f} MiB of temporaries, xla {plain / 2**20:.1f} MiB")
        assert kernel in text, f"no {kernel} in the program"
        assert size < plain / 2, "no smaller than plain XLA"
        assert not re.search(r"\b(all-|reduce-scatter|collective-)\w*\(", text), "something moves between devices"


if __name__ == "__main__":
    main(sys.argv[1])
