"""Compile a mixture of experts for CUDA without the hardware. Fails if rows do not travel by ragged all-to-all, or if
anything as large as an expert travels over ep."""

from attention_aot import devices  # which comes first: it says where jax finds its devices

import jax  # isort: skip
import jax.numpy as jnp
from flax import nnx

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models.experts import Experts
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import rules
from jaxlm.parallel.collectives import Collective, collectives
from jaxlm.parallel.keys import Keys, words
from jaxlm.parallel.mesh import from_devices

B, T, D, F = 16, 512, 512, 1024
CONFIG = ModelConfig(
    layers=1, embed=D, heads=8, mlp=F, gated=True, activation="silu", biases=("qkv", "output"), experts=8
)


def compiled() -> list[Collective]:
    """The collectives of forward and backward on ep4,tp2."""
    layout = rules.layout(from_devices(parse("ep4,tp2"), devices("cuda")))
    how = Runtime(layout=layout, dtype=jnp.dtype("bfloat16"))
    graph, state = nnx.split(nnx.eval_shape(lambda: Experts(Keys(**words(seed=0, layers=1)), CONFIG)))
    places = {path: layout.sharding(leaf.get_metadata()["dims"]) for path, leaf in nnx.to_flat_state(state)}
    tokens = layout.sharding(("batch", "sequence"))

    def loss(params, x, segments):
        y, load = nnx.merge(graph, params)(x, segments, how)
        return (y.astype(jnp.float32) ** 2).sum() + load.loss

    def placed(path, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[tuple(key.key for key in path)])

    params = jax.tree_util.tree_map_with_path(placed, nnx.to_pure_dict(state))
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16, sharding=tokens)
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=tokens)
    out = (jax.tree.map(lambda leaf: leaf.sharding, params), tokens)
    program = jax.jit(jax.grad(loss, (0, 1)), out_shardings=out).lower(params, x, segments).compile()
    return collectives(program.as_text(), layout.mesh)


def main() -> None:
    found = compiled()
    for row in found:
        print(row)
    over_ep = {row.kind: row for row in found if "ep" in row.axes}
    assert over_ep.pop("ragged-all-to-all").count == 6, "rows and weights there, rows back, and all for the gradients"
    assert all(row.bytes < D * F for row in over_ep.values()), "an expert travels"


if __name__ == "__main__":
    main()
