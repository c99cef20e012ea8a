"""Cross-entropy straight from hidden states: the logits [N, V] of a batch never exist whole.

Two orders of work, by `chunk`:

- Blocks of tokens, where all columns of a block fit (chunk 0, or no smaller than the vocabulary): the gradient of a
  block is taken while its logits are at hand, so nothing is computed twice and a block stays in a CPU's cache.
- Chunks of the vocabulary: forward with an online log-sum-exp, backward from each chunk's logits made once more. Its
  memory does not grow with the vocabulary (as in Cut Cross-Entropy, https://arxiv.org/abs/2411.09009).

On a mesh each device walks through blocks of its own tokens or chunks of its own columns. What it must add to that of
others is kept apart by shard (dims G and S) and summed after the walk, that of x where its copies were made; only the
head's gradient is summed chunk by chunk in the second order, so that no device holds it whole under fsdp. Neither
logits nor a vocabulary shard ever move.

Legend: N tokens, G shards of the tokens, L tokens of one shard, R one block of L, D embed, V vocabulary with padding,
S shards of the vocabulary, W columns of one shard, C one chunk of W.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxlm.config.schema import RunConfig
from jaxlm.models.build import Model, Params
from jaxlm.models.runtime import Runtime
from jaxlm.parallel.rules import Layout

HIDDEN = -1e30
"""Logit of a padding column: finite, so that a shard of nothing but padding stays finite."""

BLOCK_LOGITS = 1 << 20
"""Logits of one block of tokens on one device (4 MiB), which a CPU's cache holds ..."""

BLOCK_WIDTHS = 4
"""... but no fewer tokens than this many times D: a block rewrites the [D, V] gradient of the head, which must stay
cheap beside its passes over [R, V] logits."""


def token_losses(
    model: Model,
    params: Params,
    x_BTD: Float[Array, "B T D"],
    batch: dict[str, jax.Array],
    runtime: Runtime,
    config: RunConfig,
    *,
    plain: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """`cross_entropy` of a model's final hidden states, as `config` wants it: loss sum and counted tokens.

    With `plain`, without z-loss and label smoothing: what evaluation reports.
    """
    matrix, transposed, bias = model.output_layer(params, runtime)
    x_BTD = model.before_output(params, x_BTD, runtime)
    return cross_entropy(
        by_device(runtime.copies(x_BTD), runtime.layout),
        matrix,
        by_device(batch["targets"], runtime.layout),
        by_device(batch["loss_mask"], runtime.layout),
        bias,
        vocabulary=model.vocabulary,
        chunk=config.train.loss_chunk,
        z_loss=0.0 if plain else config.train.z_loss,
        label_smoothing=0.0 if plain else config.train.label_smoothing,
        softcap=model.config.logit_softcap,
        transposed=transposed,
        shards=runtime.layout.axis_size("vocab"),
        token_shards=runtime.layout.axis_size("batch", "sequence"),
    )


def by_device(x_BT: Shaped[Array, "B T ..."], layout: Layout) -> Shaped[Array, "N ..."]:
    """The tokens of a batch in one row, those of a device together: where the sequence is cut, B * T is not so."""
    rows, columns = layout.axis_size("batch"), layout.axis_size("sequence")
    if columns == 1:
        return x_BT.reshape(-1, *x_BT.shape[2:])
    lengths = (x_BT.shape[0] // rows, x_BT.shape[1] // columns)
    x = x_BT.reshape(rows, lengths[0], columns, lengths[1], *x_BT.shape[2:]).swapaxes(1, 2)
    rest = ("shards", None) if x_BT.ndim == 4 else (None,) * (x_BT.ndim - 2)
    return layout.constrain(x, "batch", "sequence", None, None, *rest).reshape(-1, *x_BT.shape[2:])


class _Terms(NamedTuple):
    """What the loss is made of and how the work is cut."""

    vocabulary: int
    chunk: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    transposed: bool


def cross_entropy(
    x_ND: Float[Array, "N D"] | Float[Array, "N S D"],
    head: Float[Array, "rows columns"],
    targets_N: Int[Array, "N"],
    mask_N: Float[Array, "N"],
    bias: Float[Array, "V"] | None = None,
    *,
    vocabulary: int,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    transposed: bool = False,
    shards: int = 1,
    token_shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the tokens' losses, number of tokens), float32; each token weighs `mask_N`, which has no gradient.

    A token's loss is -log p(target), with `label_smoothing` of the target's mass spread evenly over the vocabulary (as
    `torch.nn.CrossEntropyLoss`), plus `z_loss` * logsumexp(logits)^2 (PaLM, https://arxiv.org/abs/2204.02311).

    `head` is [D, V], or [V, D] if `transposed` (an embedding table, used as it lies); its columns from `vocabulary` on
    are padding and get neither probability nor gradient. Logits get the `bias` and become softcap * tanh(logits /
    softcap) first, and are float32, as the bias, whatever the dtype of `x_ND` and `head`, which must agree.

    Logits of at most `chunk` columns exist at a time (0: all columns, of some tokens at a time); a last, smaller chunk
    takes what does not divide. `shards` and `token_shards` say over how many devices V and N are split; `x_ND` may come
    as copies, one for each of `shards`.

    Raises:
        ValueError: shards that do not divide, or more true columns than the head has.
    """
    width = head.shape[0] if transposed else head.shape[1]
    if width % shards or x_ND.shape[0] % token_shards or not 0 < vocabulary <= width:
        raise ValueError(
            f"cross_entropy: {x_ND.shape[0]} tokens in {token_shards} shards and "
            f"{vocabulary} of {width} columns in {shards} shards do not fit"
        )
    local = width // shards
    split = (shards, local, head.shape[1]) if transposed else (head.shape[0], shards, local)
    columns = min(max(chunk // shards, 1), local) if chunk else local
    terms = _Terms(vocabulary, columns, z_loss, label_smoothing, softcap, transposed)
    x_NSD = jnp.broadcast_to(x_ND[:, None], (len(x_ND), shards, x_ND.shape[1])) if x_ND.ndim == 2 else x_ND
    x_GLSD, targets_GL, mask_GL = (a.reshape(token_shards, -1, *a.shape[1:]) for a in (x_NSD, targets_N, mask_N))
    run = _by_tokens if columns == local else _by_vocabulary
    bias_SW = None if bias is None else bias.reshape(shards, local)
    return run(x_GLSD, head.reshape(split), bias_SW, targets_GL, mask_GL, terms), mask_N.sum(dtype=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_tokens(x_GLSD, head, bias_SW, targets_GL, mask_GL, terms):
    def add_block(loss_G, start, size):
        x_GRSD, targets_GR, mask_GR = _slices((x_GLSD, targets_GL, mask_GL), start, size, axis=1)
        sums, _ = _add_chunk(None, _logits(x_GRSD, head, bias_SW, terms), 0, targets_GR, terms)
        return loss_G + (_combined(sums, terms)[1] * mask_GR).sum(axis=1)

    loss_G = jnp.zeros(x_GLSD.shape[0], jnp.float32)
    return _walk(add_block, loss_G, x_GLSD.shape[1], _block(x_GLSD, terms)).sum()


def _by_tokens_forward(x_GLSD, head, bias_SW, targets_GL, mask_GL, terms):
    """The loss, and its gradients as if the cotangent were 1: a scalar can be multiplied in later."""

    def add_block(carry, start, size):
        loss_G, dx_GLSD, dhead_GDSW, dbias_GSW = carry
        x_GRSD, targets_GR, mask_GR = _slices((x_GLSD, targets_GL, mask_GL), start, size, axis=1)
        logits_GRSW = _logits(x_GRSD, head, bias_SW, terms)
        sums, powers_GRSW = _add_chunk(None, logits_GRSW, 0, targets_GR, terms)
        lse_GR, loss_GR = _combined(sums, terms)
        shares_GRSW = powers_GRSW * jnp.exp(sums[0] - lse_GR[..., None])[..., None]
        d_GRSW = _logits_gradient(shares_GRSW, logits_GRSW, 0, lse_GR, targets_GR, mask_GR, terms)
        dbias_GSW = None if bias_SW is None else dbias_GSW + d_GRSW.sum(axis=1)
        d_GRSW = d_GRSW.astype(x_GLSD.dtype)
        dx_GLSD = jax.lax.dynamic_update_slice_in_dim(dx_GLSD, _dx(d_GRSW, head, terms), start, axis=1)
        return (
            loss_G + (loss_GR * mask_GR).sum(axis=1),
            dx_GLSD,
            dhead_GDSW + _matmul("grsd,grsc->gdsc", x_GRSD, d_GRSW),
            dbias_GSW,
        )

    (groups, length, shards, embed), local = x_GLSD.shape, _split_shape(head, terms)[1]
    zeros = [(groups,), x_GLSD.shape, (groups, embed, shards, local)]
    no_bias = None if bias_SW is None else jnp.zeros((groups, shards, local), jnp.float32)
    carry = (*(jnp.zeros(shape, jnp.float32) for shape in zeros), no_bias)
    loss_G, dx_GLSD, dhead_GDSW, dbias_GSW = _walk(add_block, carry, length, _block(x_GLSD, terms))
    dbias_SW = None if dbias_GSW is None else dbias_GSW.sum(axis=0)
    return loss_G.sum(), (dx_GLSD, dhead_GDSW.sum(axis=0), dbias_SW, jnp.zeros((), x_GLSD.dtype))


def _by_tokens_backward(terms, residuals, cotangent):
    dx_GLSD, dhead_DSW, dbias_SW, like = residuals
    dhead = _as_head(dhead_DSW * cotangent, terms)
    dbias_SW = None if dbias_SW is None else dbias_SW * cotangent
    return (dx_GLSD * cotangent).astype(like.dtype), dhead.astype(like.dtype), dbias_SW, None, None


_by_tokens.defvjp(_by_tokens_forward, _by_tokens_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_vocabulary(x_GLSD, head, bias_SW, targets_GL, mask_GL, terms):
    return _by_vocabulary_forward(x_GLSD, head, bias_SW, targets_GL, mask_GL, terms)[0]


def _by_vocabulary_forward(x_GLSD, head, bias_SW, targets_GL, mask_GL, terms):
    def add_chunk(sums, start, size):
        columns, bias_SC = _columns(head, bias_SW, start, size, terms)
        logits_GLSC, local = _logits(x_GLSD, columns, bias_SC, terms), _split_shape(head, terms)[1]
        return _add_chunk(sums, logits_GLSC, start, targets_GL, terms, local)[0]

    shards, local = _split_shape(head, terms)
    zeros_GLS = jnp.zeros((*targets_GL.shape, shards), jnp.float32)
    sums = _walk(add_chunk, (zeros_GLS + HIDDEN, zeros_GLS, zeros_GLS, zeros_GLS), local, terms.chunk)
    lse_GL, loss_GL = _combined(sums, terms)
    return (loss_GL * mask_GL).sum(), (x_GLSD, head, bias_SW, targets_GL, mask_GL, lse_GL)


def _by_vocabulary_backward(terms, residuals, cotangent):
    x_GLSD, head, bias_SW, targets_GL, mask_GL, lse_GL = residuals
    local = _split_shape(head, terms)[1]
    weight_GL = mask_GL * cotangent

    def add_chunk(grads, start, size):
        dx_GLSD, dhead, dbias_SW = grads
        columns, bias_SC = _columns(head, bias_SW, start, size, terms)
        logits_GLSC = _logits(x_GLSD, columns, bias_SC, terms)
        shares_GLSC = jnp.exp(logits_GLSC - lse_GL[..., None, None])
        d_GLSC = _logits_gradient(shares_GLSC, logits_GLSC, start, lse_GL, targets_GL, weight_GL, terms, local)
        if dbias_SW is not None:
            dbias_SW = jax.lax.dynamic_update_slice_in_dim(dbias_SW, d_GLSC.sum(axis=(0, 1)), start, axis=1)
        d_GLSC = d_GLSC.astype(x_GLSD.dtype)
        more = _as_head(_matmul("glsd,glsc->dsc", x_GLSD, d_GLSC), terms).astype(head.dtype)
        dhead = jax.lax.dynamic_update_slice_in_dim(dhead, more, start, axis=_axis(terms))
        return dx_GLSD + _dx(d_GLSC, columns, terms), dhead, dbias_SW

    grads = (jnp.zeros(x_GLSD.shape, jnp.float32), jnp.zeros_like(head), jax.tree.map(jnp.zeros_like, bias_SW))
    dx_GLSD, dhead, dbias_SW = _walk(add_chunk, grads, local, terms.chunk)
    return dx_GLSD.astype(x_GLSD.dtype), dhead, dbias_SW, None, None


_by_vocabulary.defvjp(_by_vocabulary_forward, _by_vocabulary_backward)


def _add_chunk(sums, logits_GRSC, start, targets_GR, terms, local=None):
    """Running [G, R, S] of: largest logit, sum of exponentials relative to it, the target's logit, sum of logits; and
    those exponentials of this chunk."""
    shards, size = logits_GRSC.shape[2:]
    ids_SC, padded = _ids(shards, local or size, start, size), shards * (local or size) > terms.vocabulary
    masked = jnp.where(_wide(ids_SC < terms.vocabulary), logits_GRSC, HIDDEN) if padded else logits_GRSC
    peak = masked.max(axis=3) if sums is None else jnp.maximum(sums[0], masked.max(axis=3))
    powers_GRSC = jnp.exp(masked - peak[..., None])
    total = powers_GRSC.sum(axis=3)
    if local is None and shards == 1:
        target = jnp.take_along_axis(logits_GRSC[:, :, 0], targets_GR[..., None], axis=2)
    else:
        # A comparison, because a gather along a sharded dim would move the logits (and abort XLA inside a shard_map).
        target = jnp.where(_wide(ids_SC) == targets_GR[..., None, None], logits_GRSC, 0.0).sum(axis=3)
    every = jnp.zeros_like(target)
    if terms.label_smoothing:
        every = (jnp.where(_wide(ids_SC < terms.vocabulary), logits_GRSC, 0.0) if padded else logits_GRSC).sum(axis=3)
    if sums is None:
        return (peak, total, target, every), powers_GRSC
    return (peak, sums[1] * jnp.exp(sums[0] - peak) + total, sums[2] + target, sums[3] + every), powers_GRSC


def _combined(sums, terms):
    """(log-sum-exp, loss) of each token, [G, R] each, from the sums of each shard."""
    peak_GRS, total_GRS, target_GRS, every_GRS = sums
    peak_GR = peak_GRS.max(axis=2)
    lse_GR = peak_GR + jnp.log((total_GRS * jnp.exp(peak_GRS - peak_GR[..., None])).sum(axis=2))
    loss_GR = lse_GR - (1.0 - terms.label_smoothing) * target_GRS.sum(axis=2)
    if terms.label_smoothing:
        loss_GR -= terms.label_smoothing / terms.vocabulary * every_GRS.sum(axis=2)
    if terms.z_loss:
        loss_GR += terms.z_loss * lse_GR * lse_GR
    return lse_GR, loss_GR


def _logits_gradient(shares_GRSC, logits_GRSC, start, lse_GR, targets_GR, weight_GR, terms, local=None):
    """Gradient of the weighted loss with respect to the raw logits (before the soft cap), float32; `shares_GRSC` are
    the probabilities."""
    shards, size = logits_GRSC.shape[2:]
    ids_SC = _ids(shards, local or size, start, size)
    slope_GR = weight_GR * (1.0 + 2.0 * terms.z_loss * lse_GR) if terms.z_loss else weight_GR
    is_target = _wide(ids_SC) == targets_GR[..., None, None]
    wanted = jnp.where(is_target, ((1.0 - terms.label_smoothing) * weight_GR)[..., None, None], 0.0)
    if terms.label_smoothing:
        wanted += (terms.label_smoothing / terms.vocabulary * weight_GR)[..., None, None]
    d_GRSC = shares_GRSC * slope_GR[..., None, None] - wanted
    if terms.softcap is not None:
        d_GRSC *= 1.0 - (logits_GRSC / terms.softcap) ** 2
    if shards * (local or size) > terms.vocabulary:
        d_GRSC = jnp.where(_wide(ids_SC < terms.vocabulary), d_GRSC, 0.0)
    return d_GRSC


def _walk(add, carry, length, size):
    """carry = add(carry, start, size) along `length`: whole pieces in a loop, then the rest."""
    whole = length // size
    if whole == 1:
        carry = add(carry, 0, size)
    else:
        starts = jnp.arange(whole, dtype=jnp.int32) * size
        carry, _ = jax.lax.scan(lambda carry, start: (add(carry, start, size), None), carry, starts)
    return add(carry, whole * size, length % size) if length % size else carry


def _block(x_GLSD, terms):
    """Tokens of one block on one device."""
    length, embed = x_GLSD.shape[1], x_GLSD.shape[3]
    blocks = -(-length // max(BLOCK_LOGITS // terms.chunk, BLOCK_WIDTHS * embed))
    return -(-length // blocks)


def _columns(head, bias_SW, start, size, terms):
    """A chunk of the head, and of the bias where there is one."""
    bias_SC = None if bias_SW is None else _slices((bias_SW,), start, size, axis=1)[0]
    return _slices((head,), start, size, axis=_axis(terms))[0], bias_SC


def _logits(x_GRSD, columns, bias_SC, terms):
    logits = _matmul("grsd,scd->grsc" if terms.transposed else "grsd,dsc->grsc", x_GRSD, columns)
    logits = logits if bias_SC is None else logits + _wide(bias_SC)
    return logits if terms.softcap is None else terms.softcap * jnp.tanh(logits / terms.softcap)


def _dx(d_GRSC, columns, terms):
    """dx of each vocabulary shard, [G, R, S, D]."""
    return _matmul("grsc,scd->grsd" if terms.transposed else "grsc,dsc->grsd", d_GRSC, columns)


def _as_head(dhead_DSC, terms):
    # Computed as [D, S, C] even where the head is [S, C, D]: turning the result costs less than turning d's [N, C].
    return dhead_DSC.transpose(1, 2, 0) if terms.transposed else dhead_DSC


def _axis(terms):
    return 1 if terms.transposed else 2


def _split_shape(head, terms):
    return head.shape[:2] if terms.transposed else head.shape[1:]


def _slices(arrays, start, size, axis):
    return [a if a.shape[axis] == size else jax.lax.dynamic_slice_in_dim(a, start, size, axis=axis) for a in arrays]


def _ids(shards, local, start, size):
    return (jnp.arange(shards, dtype=jnp.int32) * local)[:, None] + (start + jnp.arange(size, dtype=jnp.int32))[None, :]


def _wide(mask_SC):
    return mask_SC[None, None]


def _matmul(spec, left, right):
    # `jnp.einsum` begins with the last operand. Begun with `right`, XLA:CPU would compute the logits of a shard of the
    # vocabulary turned around, and turn them back wherever they are read.
    names, out = spec.split("->")
    swapped = f"{','.join(reversed(names.split(',')))}->{out}"

    def multiply(left, right):
        return jnp.einsum(swapped, right, left, preferred_element_type=jnp.float32)

    def multiply_wide(left, right):
        return multiply(left.astype(jnp.float32), right.astype(jnp.float32))

    if left.dtype == jnp.float32:
        return multiply(left, right)
    # XLA:CPU refuses some products of bfloat16 with a float32 result.
    return jax.lax.platform_dependent(left, right, cpu=multiply_wide, default=multiply)
