"""Mixtures of experts against an oracle in NumPy float64 that walks from token to token; and on meshes.

Legend: B batch, T length, D embed, E experts, K experts of a token.
"""

import dataclasses
import importlib.metadata
import math
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import ModelConfig
from jaxlm.models import dispatch
from jaxlm.models.experts import Experts
from jaxlm.models.router import Load, route
from jaxlm.models.runtime import Runtime
from jaxlm.parallel import rules
from jaxlm.parallel.collectives import collectives
from jaxlm.parallel.keys import Keys, words
from jaxlm.parallel.mesh import from_devices

TOLERANCE = 1e-5
"""Of float32 against float64, relative to the norm."""

MIXTRAL = ModelConfig(
    layers=1, embed=32, heads=4, mlp=48, gated=True, activation="silu", biases=("qkv", "output"), experts=8,
    balance_loss=0.3, router_z_loss=0.2,
)  # fmt: skip
DEEPSEEK_V2 = dataclasses.replace(MIXTRAL, router="softmax", experts_per_token=3, shared_experts=2, router_scale=1.5)
DEEPSEEK_V3 = dataclasses.replace(DEEPSEEK_V2, router="sigmoid", router_scale=2.5, balance_rate=1e-3, shared_experts=1)
BIASED = dataclasses.replace(
    MIXTRAL, gated=False, activation="gelu_tanh", biases=ModelConfig().biases, experts_per_token=1
)
SWITCH = dataclasses.replace(BIASED, router="softmax", capacity_factor=1.0)
GSHARD = dataclasses.replace(MIXTRAL, capacity_factor=0.8)
CAPPED_V3 = dataclasses.replace(DEEPSEEK_V3, capacity_factor=1.25)
FAMILIES = {
    "mixtral": MIXTRAL, "deepseek-v2": DEEPSEEK_V2, "deepseek-v3": DEEPSEEK_V3, "biased": BIASED, "switch": SWITCH,
    "gshard": GSHARD, "capped-v3": CAPPED_V3,
}  # fmt: skip

B, T = 8, 24


def runtime(mesh: str = "dp1", **keys) -> Runtime:
    spec = parse(mesh)
    return Runtime(layout=rules.layout(from_devices(spec, jax.devices()[: spec.device_count])), **keys)


@cache
def layer(name: str) -> tuple:
    """Graph, random parameters (biases too) and their logical dims."""
    graph, state = nnx.split(Experts(Keys(**words(seed=0, layers=1)), FAMILIES[name]))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.1 * random.normal(size=p.shape).astype("f"), nnx.to_pure_dict(state))
    dims: dict = {}
    for path, variable in nnx.to_flat_state(state):
        node = dims
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = variable.get_metadata()["dims"]
    return graph, params, dims


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that like some experts better than others, padding in every third row, and a cotangent."""
    random = np.random.default_rng(2)
    x_BTD = (random.normal(size=(B, T, 32)) + 0.8 * random.normal(size=(1, 1, 32))).astype("f")
    segments_BT = np.where((np.arange(T) >= 17) & (np.arange(B)[:, None] % 3 == 0), 0, 1).astype(np.int32)
    return x_BTD, segments_BT, random.normal(size=x_BTD.shape).astype("f")


def computed(name: str, how: Runtime, params=None):
    """(params, x, segments, cotangent) -> output, load, gradients of params and x; placed as the mesh wants them."""
    graph, given, dims = layer(name)
    params = params or given

    def loss(params, x, segments, g):
        y, load = nnx.merge(graph, params)(x, segments, how)
        return (y * g).sum() + load.loss, (y, load)

    def run(params, x, segments, g):
        (_, (y, load)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, segments, g)
        return y, load, grads

    tokens = how.layout.sharding(("batch", "sequence"))
    places = jax.tree.map(lambda p, d: how.layout.sharding(d), params, dims)
    placed = (jax.device_put(params, places), *(jax.device_put(a, tokens) for a in inputs()))
    return jax.jit(run, out_shardings=(tokens, None, (places, tokens))), placed


@cache
def forward(name: str, **keys):
    """(x, segments) -> output and load, on one device."""
    graph, params, _ = layer(name)
    return jax.jit(lambda x, segments: nnx.merge(graph, params)(x, segments, runtime(), **keys))


@cache
def result(name: str, mesh: str = "dp1") -> tuple:
    run, arguments = computed(name, runtime(mesh))
    return jax.tree.map(np.asarray, run(*arguments))


# --- the oracle


def capacity(config) -> int:
    return math.ceil(config.capacity_factor * T * config.experts_per_token / config.experts - 1e-6)


def activate(name: str, x: np.ndarray) -> np.ndarray:
    if name == "silu":
        return x / (1 + np.exp(-x))
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def feed_forward(p, config, x, expert=...):
    def affine(x, q):
        return x @ q["kernel"][expert] + (q["bias"][expert] if q.get("bias") is not None else 0)

    h = affine(x, p["up"])
    h = activate(config.activation, affine(x, p["gate"])) * h if config.gated else activate(config.activation, h)
    return affine(h, p["down"])


def weights_of(config, logits, bias):
    """Expert -> weight for one token, and the probabilities of all, as the papers have them."""
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    if config.router == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
        chosen = np.argsort(-(scores + bias), kind="stable")[: config.experts_per_token]
        return {e: config.router_scale * scores[e] / scores[chosen].sum() for e in chosen}, scores / scores.sum()
    chosen = np.argsort(-logits, kind="stable")[: config.experts_per_token]
    total = softmax[chosen].sum() if config.router == "topk_softmax" else 1.0
    return {e: config.router_scale * softmax[e] / total for e in chosen}, softmax


def oracle(name, x_BTD, segments_BT):
    config, (_, params, _) = FAMILIES[name], layer(name)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x_BTD, y_BTD = x_BTD.astype(np.float64), np.zeros(x_BTD.shape)
    tokens_E, loss, balances, dropped = np.zeros(config.experts), 0.0, 0.0, 0
    for b in range(B):
        taken, shares, count = np.zeros(config.experts), np.zeros(config.experts), 0
        for t in range(T):
            if config.shared_experts:
                y_BTD[b, t] += feed_forward(p["shared"], config, x_BTD[b, t])
            if segments_BT[b, t] == 0:
                continue
            logits = x_BTD[b, t] @ p["router"]["kernel"]
            weights, probabilities = weights_of(config, logits, p.get("routing_bias", 0))
            for e, weight in weights.items():
                taken[e] += 1
                if taken[e] <= (capacity(config) if config.capacity_factor else math.inf):
                    y_BTD[b, t] += weight * feed_forward(p["experts"], config, x_BTD[b, t], e)
                else:
                    dropped += 1
            shares += probabilities
            count += 1
            loss += config.router_z_loss * np.log(np.exp(logits).sum()) ** 2
        fraction = taken / (config.experts_per_token * count)
        balance = config.experts * (fraction * shares / count).sum() * count
        tokens_E, balances = tokens_E + taken, balances + balance
        loss += config.balance_loss * balance
    return y_BTD, Load(loss, balances, tokens_E, dropped)


def error(found, wanted) -> float:
    wanted = np.asarray(wanted, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - wanted) / np.linalg.norm(wanted))


# --- what is computed


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_compute_what_the_papers_say(name):
    x, segments, _ = inputs()
    y, load, _ = result(name)
    wanted, wanted_load = oracle(name, x, segments)
    assert error(y, wanted) < TOLERANCE
    np.testing.assert_array_equal(load.tokens_E, wanted_load.tokens_E)
    assert load.loss == pytest.approx(wanted_load.loss, rel=TOLERANCE)
    assert load.balance == pytest.approx(wanted_load.balance, rel=TOLERANCE)
    assert load.dropped == wanted_load.dropped and (load.dropped > 0) == (FAMILIES[name].capacity_factor > 0)
    assert load.tokens_E.max() > 1.5 * load.tokens_E.mean(), "too even to prove anything"


def dense(name, params, x_BTD, segments_BT):
    """Every expert for every token, weighted, most with zero; and the load's loss."""
    config = FAMILIES[name]
    logits = x_BTD @ params["router"]["kernel"]
    scores = jax.nn.sigmoid(logits) if config.router == "sigmoid" else jax.nn.softmax(logits)
    bias_E = params.get("routing_bias")
    ranked = jax.lax.stop_gradient(scores + (0 if bias_E is None else bias_E))
    real_BT1 = (segments_BT != 0)[..., None]
    chosen_BTE = ((ranked[..., None, :] > ranked[..., :, None]).sum(axis=-1) < config.experts_per_token) & real_BT1
    weights_BTE = chosen_BTE * scores
    if config.router != "softmax":
        weights_BTE /= jnp.where(real_BT1, weights_BTE.sum(axis=-1, keepdims=True), 1)
    if config.capacity_factor:
        weights_BTE *= chosen_BTE.cumsum(axis=1) <= capacity(config)

    def one(p, x):
        def affine(x, q):
            return x @ q["kernel"] + q.get("bias", 0)

        h = affine(x, p["up"])
        h = jax.nn.silu(affine(x, p["gate"])) * h if config.gated else jax.nn.gelu(h)
        return affine(h, p["down"])

    y = jnp.einsum(
        "bte,ebtd->btd", config.router_scale * weights_BTE, jax.vmap(one, (0, None))(params["experts"], x_BTD)
    )
    y += one(params["shared"], x_BTD) if config.shared_experts else 0
    shares_BTE = scores / scores.sum(axis=-1, keepdims=True) * real_BT1
    balance_BE = chosen_BTE.sum(axis=1) / (config.experts_per_token * real_BT1.sum(axis=1)) * shares_BTE.sum(axis=1)
    z = (jax.nn.logsumexp(logits, axis=-1, keepdims=True) ** 2 * real_BT1).sum()
    return y, config.balance_loss * config.experts * balance_BE.sum() + config.router_z_loss * z


def leaves(tree) -> dict[str, np.ndarray]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in flat}


def check(found, wanted, tolerance=TOLERANCE) -> None:
    """Each leaf within `tolerance` of its norm."""
    found, wanted = leaves(found), leaves(wanted)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert np.linalg.norm(found[key] - value) <= tolerance * max(np.linalg.norm(value), 1e-3), key


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_all_experts_weighted(name):
    _, params, _ = layer(name)

    def loss(params, x, segments, g):
        y, loss = dense(name, params, x, segments)
        return (y * g).sum() + loss, y

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        x, segments, g = inputs()
        grads, wanted = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x, segments, g)
    y, _, found = result(name)
    check(y, wanted)
    check(found, grads)
    if FAMILIES[name].balance_rate:
        assert not found[0]["routing_bias"].any(), "the routing bias takes part in the choice alone"


# --- the choice


def test_among_equals_the_lower_number_is_chosen():
    config = dataclasses.replace(MIXTRAL, experts_per_token=3)
    x, kernel = jnp.ones((5, 32)), jnp.zeros((32, 8)).at[:, 6].set(1.0)
    routing = route(x, kernel, None, jnp.ones(5, bool), config)
    np.testing.assert_array_equal(routing.experts_NK, [[6, 0, 1]] * 5)


def test_a_routing_bias_chooses_but_does_not_weigh():
    config, kernel = dataclasses.replace(DEEPSEEK_V3, experts_per_token=2, router_scale=1.0), jnp.zeros((32, 8))
    bias = jnp.zeros(8).at[jnp.array([3, 5])].set(jnp.array([0.1, 0.2]))
    routing = route(jnp.ones((1, 32)), kernel, bias, jnp.ones(1, bool), config)
    np.testing.assert_array_equal(routing.experts_NK, [[5, 3]])
    np.testing.assert_allclose(routing.weights_NK, [[0.5, 0.5]])


@pytest.mark.parametrize("name", ["mixtral", "gshard"])
def test_padding_goes_nowhere(name):
    x, segments, _ = inputs()
    y, load = forward(name)(x, segments)
    other, other_load = forward(name)(np.where(segments[..., None] == 0, 100.0, x).astype("f"), segments)
    np.testing.assert_array_equal(y, other)
    jax.tree.map(np.testing.assert_array_equal, load, other_load)
    assert not np.asarray(y)[segments == 0].any()
    assert float(load.tokens_E.sum()) == 2 * (segments != 0).sum()


def test_a_row_alone_is_dropped_alike():
    """A capacity belongs to a row, so that a batch may be cut anywhere."""
    x, segments, _ = inputs()
    whole, load = forward("gshard")(x, segments)
    parts = [forward("gshard")(x[rows], segments[rows]) for rows in (slice(0, 3), slice(3, B))]
    np.testing.assert_allclose(np.concatenate([y for y, _ in parts]), whole, atol=1e-5)
    check(jax.tree.map(lambda *a: sum(a), *(load for _, load in parts)), load)
    assert load.dropped > 0


def test_nothing_is_dropped_where_that_is_not_wanted():
    x, segments, _ = inputs()
    y, load = forward("gshard", drop=False)(x, segments)
    assert load.dropped == 0
    check(y, result("mixtral")[0])


# --- on meshes

MESHES = {
    "mixtral": ["ep8", "ep2,tp2,dp2", "fsdp2,ep2,tp2", "cp2,ep2", "dp2,fsdp2,cp2"],
    "deepseek-v3": ["ep4", "ep2,tp2,cp2"],
    "biased": ["ep2,tp2"],
    "capped-v3": ["ep4,tp2", "fsdp2,ep2,dp2"],
}


@pytest.mark.parametrize("name, mesh", [(name, mesh) for name, meshes in MESHES.items() for mesh in meshes])
def test_a_mesh_computes_what_one_device_does(name, mesh):
    check(result(name, mesh), result(name))


@pytest.mark.parametrize("mesh", ["dp1", "ep4,tp2"])
def test_all_tokens_may_choose_the_experts_of_one_device(mesh):
    """Nothing is dropped however uneven the choice: buffers have room for the worst."""
    _, params, _ = layer("deepseek-v3")
    bias = np.zeros(8, "f")
    bias[[2, 3, 5]] = 100.0
    params = params | {"routing_bias": bias}
    y, load, grads = jax.tree.map(
        np.asarray, (lambda run: run[0](*run[1]))(computed("deepseek-v3", runtime(mesh), params))
    )
    x, segments, g = inputs()
    tokens = (segments != 0).sum()
    np.testing.assert_array_equal(load.tokens_E, np.where(bias > 0, tokens, 0))

    def loss(params, x):
        y, loss = dense("deepseek-v3", params, x, segments)
        return (y * g).sum() + loss, y

    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        wanted_grads, wanted = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    check(y, wanted)
    check(grads, wanted_grads)


@pytest.mark.parametrize(
    "name, mesh", [("mixtral", "pp2,ep2,tp2"), ("mixtral", "fsdp2,ep2,tp2"), ("deepseek-v3", "ep2,cp2,tp2"),
                   ("biased", "dp2,tp4"), ("capped-v3", "pp2,ep4")],
)  # fmt: skip
def test_within_a_region_that_is_manual_but_for_tp(name, mesh):
    """As a stage of a pipeline runs it: each device has its own part of the loss, in a branch that only one stage
    takes, and gradients are summed over the devices that do not cut a parameter."""
    graph, params, dims = layer(name)
    how = runtime(mesh)
    manual = frozenset(how.layout.mesh.axis_names) - {"model"}
    inside = dataclasses.replace(how, layout=dataclasses.replace(how.layout, manual=manual))
    stage = how.layout.mesh.shape["pipeline"] - 1

    def spec(of) -> PartitionSpec:
        return PartitionSpec(*(tuple(set(how.layout.axes(dim)) & manual) or None for dim in of))

    def own_part(params, x, segments, g):
        def run(x):
            y, load = nnx.merge(graph, params)(x, segments, inside)
            return (y * g).sum() + load.loss, y, load

        def idle(x):
            return jnp.float32(0), jnp.zeros_like(x), Load.none(FAMILIES[name])

        loss, *rest = jax.lax.cond(jax.lax.axis_index("pipeline") == stage, run, idle, x)
        return loss, rest

    def region(params, x, segments, g):
        (_, (y, load)), (dparams, dx) = jax.value_and_grad(own_part, (0, 1), has_aux=True)(params, x, segments, g)
        everywhere = tuple(manual)
        summed = jax.tree.map(
            lambda d, of: jax.lax.psum(d, tuple(manual - {axis for dim in of for axis in how.layout.axes(dim)})),
            dparams,
            dims,
        )
        rows = tuple(manual - set(how.layout.axes("batch")) - set(how.layout.axes("sequence")))
        return jax.lax.psum(y, rows), jax.lax.psum(load, everywhere), (summed, jax.lax.psum(dx, rows))

    tokens, places = spec(("batch", "sequence")), jax.tree.map(lambda p, of: spec(of), params, dims)
    _, placed = computed(name, how)
    mapped = jax.shard_map(
        region, mesh=how.layout.mesh, in_specs=(places, tokens, tokens, tokens),
        out_specs=(tokens, PartitionSpec(), (places, tokens)), axis_names=manual, check_vma=False,
    )  # fmt: skip
    check(jax.jit(mapped)(*placed), result(name))


# --- how rows travel


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation describes it, from everybody's everything."""
    everything = jax.lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    for source in range(jax.lax.axis_size(axis_name)):
        sent, begins, sizes, places = (a[source] for a in everything)
        offset = rows - places[me]
        mine = (offset >= 0) & (offset < sizes[me])
        row = sent.at[begins[me] + offset].get(mode="fill", fill_value=np.nan)
        output = jnp.where(mine.reshape(-1, *[1] * (output.ndim - 1)), row, output)
    return output


@pytest.mark.parametrize("name, mesh", [("mixtral", "ep4,tp2"), ("deepseek-v3", "ep8"), ("biased", "dp2,ep2")])
def test_the_ragged_exchange_of_accelerators_is_the_padded_one(name, mesh, monkeypatch):
    """XLA has no ragged all-to-all on CPU: here its definition stands in for it."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    trips, of = [], dispatch.Trip.of
    monkeypatch.setattr(
        dispatch.Trip, "of", lambda *a, **keys: trips.append(of(*a, **keys | {"ragged": True})) or trips[-1]
    )
    run, arguments = computed(name, runtime(mesh))
    check(run(*arguments), result(name))
    assert trips and all(trip.ragged for trip in trips)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rows_travel_ragged_on_the_real_thing():
    """By CUDA's own compiler, without its hardware; `tests/train/test_tpu_compile.py` is for TPU."""
    if "jax-cuda12-plugin" not in {distribution.name for distribution in importlib.metadata.distributions()}:
        pytest.skip("not installed: jax-cuda12-plugin")
    script = Path(__file__).with_name("experts_aot.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["mixtral", "capped-v3"])
def test_rows_go_to_the_experts_and_no_expert_goes_to_the_rows(name):
    how = runtime("ep4,tp2")
    run, arguments = computed(name, how)
    compiled = run.lower(*arguments).compile()
    moved = {(c.kind, c.axes): c.bytes for c in collectives(compiled.as_text(), how.layout.mesh)}
    assert moved["all-to-all", "ep"] > 0
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(arguments[0]["experts"]))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0]["experts"]))
    assert held == whole / 8
    counts = 4 * 8 * 4
    assert moved.get(("all-gather", "ep"), 0) <= counts, "only how many rows each device has for each expert"


@pytest.mark.parametrize("capacity_factor", [0.0, 1.25])
def test_hidden_layers_are_not_kept_for_the_backward(capacity_factor):
    """Without a capacity they would take as much memory as if all tokens went to one device."""
    wide = dataclasses.replace(MIXTRAL, mlp=4096, capacity_factor=capacity_factor)
    graph, state = nnx.split(Experts(Keys(**words(seed=0, layers=1)), wide))
    x, segments, g = map(jnp.asarray, inputs())
    _, pull = jax.vjp(lambda p, x: nnx.merge(graph, p)(x, segments, runtime())[0], nnx.to_pure_dict(state), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.shape and leaf.shape[-1] == 4096]
    assert {leaf.shape for leaf in kept} <= {(8, 32, 4096)}, "parameters only"


def test_compute_in_bfloat16_leaves_gradients_in_float32():
    graph, params, _ = layer("deepseek-v3")
    x, segments, g = map(jnp.asarray, inputs())

    def loss(params, x):
        y, load = nnx.merge(graph, params)(x, segments, runtime(dtype=jnp.dtype("bfloat16")))
        return (y.astype(jnp.float32) * g).sum() + load.loss, y

    grads, y = jax.jit(jax.grad(loss, has_aux=True))(params, x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert 1e-4 < error(y, result("deepseek-v3")[0]) < 0.05
