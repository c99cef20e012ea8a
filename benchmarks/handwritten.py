"""The tightest train step of the default model that we can write by hand: plain JAX, one file, no framework.

What `step_time.py` measures jaxlm against. It is written for one model (GPT-2 style: LayerNorm first, learned
positions, biases, tanh gelu, tied output layer, AdamW) and knows nothing else. What makes it fast on XLA:CPU, measured:

- activations are [B*T, D], so that every product is a plain 2-D matmul; one product makes queries, keys and values
  ([D, 3, N*H], so that a mesh shards each by heads and the backward pass sums over devices once and not three times);
- what is kept for the backward pass is as little as can be: gelu its input, a norm its input and two numbers a row,
  attention q, k, v, its output and the log-sum-exp;
- attention goes through the queries in blocks and skips the keys that causality hides, and divides after the sum;
- a product that contracts over rows has its SMALLER side first, and is turned afterwards behind a barrier (without
  which XLA swaps the sides back): twice as fast for the output layer and keys and values;
- the gradient of the loss is taken in the forward pass, while the logits are at hand.

Legend: B batch, T length, R = B * T rows, D embed, F mlp, N heads, H head size, V vocabulary, L layers.
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

HIDDEN = -1e30
EPSILON = 1e-5
GELU = math.sqrt(2 / math.pi)
BATCH = ("tokens", "targets", "segment_ids", "positions", "loss_mask")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model and its batch; the defaults are jaxlm's."""

    layers: int = 4
    embed: int = 128
    heads: int = 4
    mlp: int = 512
    vocabulary: int = 2048
    positions: int = 1024
    length: int = 128
    batch: int = 16
    query_blocks: int = 2
    """Attention goes through the queries in so many blocks."""
    unroll: int = 4
    """Layers written out in a turn of the loop; as many as there are layers: no loop."""


def init(shape: Shape, seed: int = 0) -> dict[str, Any]:
    """Random parameters on the host; blocks are stacked."""
    random = np.random.default_rng(seed)
    layers, embed, mlp = shape.layers, shape.embed, shape.mlp

    def normal(*size: int) -> np.ndarray:
        return (0.02 * random.standard_normal(size)).astype(np.float32)

    def norm(*size: int) -> dict[str, np.ndarray]:
        return {"scale": np.ones(size, np.float32), "bias": np.zeros(size, np.float32)}

    def linear(*size: int) -> dict[str, np.ndarray]:
        return {"kernel": normal(layers, *size), "bias": np.zeros((layers, *size[1:]), np.float32)}

    return {
        "tokens": normal(shape.vocabulary, embed),
        "positions": normal(shape.positions, embed),
        "final_norm": norm(embed),
        "blocks": {
            "attention_norm": norm(layers, embed),
            "qkv": linear(embed, 3, embed),
            "output": linear(embed, embed),
            "mlp_norm": norm(layers, embed),
            "up": linear(embed, mlp),
            "down": linear(mlp, embed),
        },
    }


def specs() -> dict[str, Any]:
    """How a (dp, tp) mesh cuts the parameters: vocabulary, heads and mlp over tp."""
    P = PartitionSpec
    whole = {"scale": P(), "bias": P()}
    return {
        "tokens": P("tp", None),
        "positions": P(),
        "final_norm": whole,
        "blocks": {
            "attention_norm": whole,
            "qkv": {"kernel": P(None, None, None, "tp"), "bias": P(None, None, "tp")},
            "output": {"kernel": P(None, "tp", None), "bias": P()},
            "mlp_norm": whole,
            "up": {"kernel": P(None, None, "tp"), "bias": P(None, "tp")},
            "down": {"kernel": P(None, "tp", None), "bias": P()},
        },
    }


def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b, with the smaller of the two first (see the head of this file)."""
    if a.shape[1] > b.shape[1]:
        return lax.optimization_barrier(over_rows(b, a)).T
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())))


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ kernel + bias


def _linear_backward(kept, g):
    x, kernel = kept
    return g @ kernel.T, over_rows(x, g), g.sum(0)


linear.defvjp(lambda x, kernel, bias: (linear(x, kernel, bias), (x, kernel)), _linear_backward)


@jax.custom_vjp
def qkv(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """[R, 3, N*H] by one product."""
    return jnp.einsum("rd,dcf->rcf", x, kernel) + bias


def _qkv_backward(kept, g):
    x, kernel = kept
    # A key bias shifts all logits of a query alike, which the softmax ignores: its gradient is zero but for rounding.
    bias = g.sum(0) * jnp.array([[1.0], [0.0], [1.0]])
    return jnp.einsum("rcf,dcf->rd", g, kernel), jnp.einsum("rd,rcf->dcf", x, g), bias


qkv.defvjp(lambda x, kernel, bias: (qkv(x, kernel, bias), (x, kernel)), _qkv_backward)


def _normalised(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    root = lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + EPSILON)
    return (x - mean) * root * scale + bias, (x, mean, root, scale)


def _norm_backward(kept, g):
    x, mean, root, scale = kept
    y, gs = (x - mean) * root, g * scale
    dx = root * (gs - gs.mean(-1, keepdims=True) - y * (gs * y).mean(-1, keepdims=True))
    return dx, (g * y).sum(0), g.sum(0)


norm = jax.custom_vjp(lambda x, scale, bias: _normalised(x, scale, bias)[0])
norm.defvjp(_normalised, _norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _gelu_backward(x, g):
    square = x * x
    t = jnp.tanh(GELU * x * (1 + 0.044715 * square))
    return (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU * (1 + 3 * 0.044715 * square)),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def attention(q, k, v, seen):
    """softmax(where(seen, q k^T)) v of [B, N, T, H] queries and [B, N, S, H] keys and values."""
    return _attention(q, k, v, seen)[0]


def _attention(q, k, v, seen):
    logits = jnp.where(seen, jnp.einsum("bnth,bnsh->bnts", q, k), HIDDEN)
    peak = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum("bnts,bnsh->bnth", weights, v) / total
    return o, (q, k, v, seen, peak + jnp.log(total), o)


def _attention_backward(kept, g):
    q, k, v, seen, lse, o = kept
    weights = jnp.exp(jnp.where(seen, jnp.einsum("bnth,bnsh->bnts", q, k), HIDDEN) - lse)
    dlogits = weights * (jnp.einsum("bnth,bnsh->bnts", g, v) - (g * o).sum(-1, keepdims=True))
    dk = lax.optimization_barrier(jnp.einsum("bnth,bnts->bnhs", q, dlogits)).swapaxes(2, 3)
    dv = lax.optimization_barrier(jnp.einsum("bnth,bnts->bnhs", g, weights)).swapaxes(2, 3)
    return jnp.einsum("bnts,bnsh->bnth", dlogits, k), dk, dv, None


attention.defvjp(_attention, _attention_backward)


@jax.custom_vjp
def cross_entropy(x, table, targets, mask):
    """Loss of [R, D] hidden states summed over the rows that `mask` counts; the logits are x table^T."""
    return _cross_entropy(x, table, targets, mask)[0]


def _cross_entropy(x, table, targets, mask):
    logits = x @ table.T
    peak = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    target = jnp.take_along_axis(logits, targets[:, None], axis=1)
    loss = ((peak + jnp.log(total) - target)[:, 0] * mask).sum()
    hit = jnp.arange(table.shape[0])[None] == targets[:, None]
    dlogits = weights * (mask[:, None] / total) - jnp.where(hit, mask[:, None], 0)
    return loss, (dlogits @ table, over_rows(dlogits, x))


def _cross_entropy_backward(gradients, g):
    return gradients[0] * g, gradients[1] * g, None, None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_backward)


def loss(params: dict[str, Any], batch: dict[str, jax.Array], shape: Shape, mesh: Mesh | None = None) -> jax.Array:
    """Mean loss over the counted tokens."""

    def pin(x: jax.Array, *axes: str | None) -> jax.Array:
        return x if mesh is None else lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    length, heads, embed = shape.length, shape.heads, shape.embed
    segments = batch["segment_ids"]
    seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(length, dtype=bool)
    edges = [length * i // shape.query_blocks for i in range(shape.query_blocks + 1)]

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(-1, length, heads, embed // heads).transpose(0, 2, 1, 3)

    def block(x: jax.Array, w: dict[str, dict[str, jax.Array]]) -> tuple[jax.Array, None]:
        h = pin(qkv(norm(x, **w["attention_norm"]), **w["qkv"]), "dp", None, "tp")
        q, k, v = split(h[:, 0] * (embed // heads) ** -0.5), split(h[:, 1]), split(h[:, 2])
        pieces = [
            attention(q[:, :, first:end], k[:, :, :end], v[:, :, :end], seen[:, None, first:end, :end])
            for first, end in zip(edges[:-1], edges[1:], strict=True)
        ]
        o = jnp.concatenate(pieces, axis=2).transpose(0, 2, 1, 3).reshape(-1, embed)
        x = x + pin(linear(pin(o, "dp", "tp"), **w["output"]), "dp")
        h = gelu(pin(linear(norm(x, **w["mlp_norm"]), **w["up"]), "dp", "tp"))
        return x + pin(linear(h, **w["down"]), "dp"), None

    x = params["tokens"][batch["tokens"]] + params["positions"][batch["positions"]]
    x, _ = lax.scan(block, pin(x.reshape(-1, embed), "dp"), params["blocks"], unroll=shape.unroll)
    x = norm(x, **params["final_norm"])
    total = cross_entropy(x, params["tokens"], batch["targets"].reshape(-1), batch["loss_mask"].reshape(-1))
    return total / batch["loss_mask"].sum()


def adamw(params, grads, m, v, count, *, rate=3e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, decay=0.1, clip=1.0):
    """AdamW after clipping, decaying matrices only; returns new params, m, v and the gradient norm."""
    # Not jnp.vdot: it flattens, and to flatten a sharded array is to gather it.
    length = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)))
    shrink = jnp.minimum(1.0, clip / length)

    def update(path, p, g, m, v):
        m = beta1 * m + (1 - beta1) * (g * shrink)
        v = beta2 * v + (1 - beta2) * jnp.square(g * shrink)
        change = (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + epsilon)
        if path[-1].key in ("kernel", "tokens"):
            change += decay * p
        return p - rate * change, m, v

    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    rest = [jax.tree.leaves(part) for part in (grads, m, v)]
    new = [update(path, p, *more) for (path, p), *more in zip(leaves, *rest, strict=True)]
    return *(tree.unflatten(part) for part in zip(*new, strict=True)), length


def step(state, batch, *, shape: Shape, mesh: Mesh | None = None):
    """(state, batch) -> (state, metrics)."""
    value, grads = jax.value_and_grad(loss)(state["params"], batch, shape, mesh)
    count = state["count"] + 1
    params, m, v, length = adamw(state["params"], grads, state["m"], state["v"], count.astype(jnp.float32))
    return {"params": params, "m": m, "v": v, "count": count}, {"loss": value, "grad_norm": length}


def make_mesh(dp: int, tp: int) -> Mesh | None:
    """None on one device."""
    if dp * tp == 1:
        return None
    return jax.make_mesh((dp, tp), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: dp * tp])


def place(tree: Any, mesh: Mesh | None, spec: Any) -> Any:
    """A tree of host arrays on the devices."""
    if mesh is None:
        return jax.device_put(tree, jax.devices()[0])
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, spec)


def start(params: dict[str, Any], mesh: Mesh | None) -> dict[str, Any]:
    """The state of a first step, on the devices."""
    zeros = jax.tree.map(np.zeros_like, params)
    state = {"params": params, "m": zeros, "v": zeros, "count": np.int32(0)}
    cuts = specs()
    return place(state, mesh, {"params": cuts, "m": cuts, "v": cuts, "count": PartitionSpec()})


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, jax.Array]:
    return place({name: batch[name] for name in BATCH}, mesh, dict.fromkeys(BATCH, PartitionSpec("dp")))


def compile_step(state, batch, shape: Shape, mesh: Mesh | None) -> jax.stages.Compiled:
    """The step as one program that gives the old state's memory to the new one."""
    out = None if mesh is None else (jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec()))
    jitted = jax.jit(partial(step, shape=shape, mesh=mesh), donate_argnums=0, out_shardings=out)
    return jitted.lower(state, batch).compile()


def main(dp: int, tp: int, sizes: dict[str, int]) -> None:
    """From nothing to the end of a first step, for `startup.py`; then say so."""
    if dp * tp > 1:
        jax.config.update("jax_num_cpu_devices", dp * tp)
    shape, mesh = Shape(**sizes), make_mesh(dp, tp)
    tokens = np.random.default_rng(0).integers(0, shape.vocabulary, (shape.batch, shape.length + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((shape.batch, shape.length), np.int32),
        "positions": np.tile(np.arange(shape.length, dtype=np.int32), (shape.batch, 1)),
        "loss_mask": np.ones((shape.batch, shape.length), np.float32),
    }
    state, placed = start(init(shape), mesh), place_batch(batch, mesh)
    _, metrics = compile_step(state, placed, shape, mesh)(state, placed)
    print(f"step 1/1  loss {float(metrics['loss']):.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
