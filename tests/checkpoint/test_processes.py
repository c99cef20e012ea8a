"""Two processes of jax.distributed save, restore and fail together."""

from tests.processes import two_ranks

RANK = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.store import SaveFailed, Store

rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
sharded, everywhere = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
make = jax.jit(lambda step: {"a": jnp.arange(64.0) + step, "b": jnp.ones(3)}, static_argnums=0,
               out_shardings={"a": sharded, "b": everywhere})

def no_space(*_):
    raise OSError(28, "No space left on device")

with Store(folder, keep=2) as store:
    for step in (1, 2, 3):
        store.save(step, make(float(step)), {"position": step})
    assert store.wait() == 3 and store.steps() == [2, 3]
    assert store.latest_valid(print) == 3
    wanted = {"a": jax.ShapeDtypeStruct((64,), jnp.float32, sharding=everywhere),
              "b": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=everywhere)}
    np.testing.assert_array_equal(store.restore(3, wanted)["a"], np.arange(64.0) + 3)
    for name in ("commit", "delete_leftovers"):  # in the background, and before a save begins; on rank 0 alone
        working = getattr(manifest, name)
        setattr(manifest, name, no_space)
        try:
            store.save(4, make(4.0), {})
            store.wait()
        except SaveFailed as error:
            print(name, error)
        setattr(manifest, name, working)
    store.save(4, make(4.0), {})
    assert store.wait() == 4 and store.latest_valid(print) == 4
"""


def test_two_processes(tmp_path):
    outputs = two_ranks(RANK, str(tmp_path))
    for out in outputs:
        words = [line.split()[0] for line in out.splitlines() if not line.startswith("[Gloo]")]
        assert words == ["commit", "delete_leftovers"]
    assert "No space left on device" in outputs[0] and "another process" in outputs[1]
