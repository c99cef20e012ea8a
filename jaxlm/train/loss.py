"""Cross-entropy straight from hidden states, in chunks of the vocabulary.

Logits [N, V] of a large vocabulary outweigh everything else in memory, so they are made a chunk at a time: forward with
an online log-sum-exp, backward once more, each chunk giving its part of both gradients (as in Cut Cross-Entropy,
https://arxiv.org/abs/2411.09009). Under tensor parallelism each shard walks through chunks of its own vocabulary and
shards are combined once, after the last chunk; neither the logits nor the output matrix ever leaves its device.

Legend: N tokens, D embed, V vocabulary with padding, S shards of the vocabulary, W vocabulary of one shard,
C one chunk of W.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIDDEN = -1e30
"""Logit of a padding column: finite, so that a shard of nothing but padding stays finite."""


class _Terms(NamedTuple):
    """What a loss is made of, as `cross_entropy` takes it."""

    vocabulary: int
    chunk: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    transposed: bool


def cross_entropy(
    x_ND: Float[Array, "N D"],
    head: Float[Array, "rows columns"],
    targets_N: Int[Array, "N"],
    mask_N: Float[Array, "N"],
    *,
    vocabulary: int,
    chunk: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    transposed: bool = False,
    shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the tokens' losses, number of tokens), float32; each token weighs `mask_N`, which has no gradient.

    A token's loss is -log p(target), with `label_smoothing` of the target's mass spread evenly over the vocabulary (as
    `torch.nn.CrossEntropyLoss`), plus `z_loss` * logsumexp(logits)^2 (PaLM, https://arxiv.org/abs/2204.02311).

    `head` is [D, V], or [V, D] if `transposed` (an embedding table, used as it lies); its columns from `vocabulary` on
    are padding and get neither probability nor gradient. Logits become softcap * tanh(logits / softcap) first.

    Logits of at most `chunk` columns exist at a time (0: all, and the backward pass keeps them); a last, smaller chunk
    takes what does not divide. `shards` is how many devices split the vocabulary; it must divide V.
    """
    width = head.shape[0] if transposed else head.shape[1]
    if width % shards or not 0 < vocabulary <= width:
        raise ValueError(f"cross_entropy: a head of {width} does not hold {vocabulary} in {shards} equal shards")
    local = width // shards
    split = (shards, local, head.shape[1]) if transposed else (head.shape[0], shards, local)
    columns = min(max(chunk // shards, 1), local) if chunk else local
    terms = _Terms(vocabulary, columns, z_loss, label_smoothing, softcap, transposed)
    return _loss_sum(x_ND, head.reshape(split), targets_N, mask_N, terms), mask_N.sum(dtype=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sum(x_ND, head, targets_N, mask_N, terms):
    return _forward(x_ND, head, targets_N, mask_N, terms)[0]


def _forward(x_ND, head, targets_N, mask_N, terms):
    tokens, (shards, local) = x_ND.shape[0], _split_shape(head, terms)

    def add_chunk(sums, start, size):
        logits_NSC = _capped(_raw_logits(x_ND, head, start, size, terms), terms)
        return _add_chunk(sums, logits_NSC, _ids(start, size, shards, local), targets_N, terms)

    zeros_NS = jnp.zeros((tokens, shards), jnp.float32)
    sums = (zeros_NS + HIDDEN, zeros_NS, zeros_NS, zeros_NS)
    kept = None
    if terms.chunk == local:
        kept = _raw_logits(x_ND, head, 0, local, terms)
        sums = _add_chunk(sums, _capped(kept, terms), _ids(0, local, shards, local), targets_N, terms)
    else:
        sums = _over_chunks(add_chunk, sums, local, terms.chunk)
    peak_NS, total_NS, target_NS, every_NS = sums
    peak_N = peak_NS.max(axis=1)
    lse_N = peak_N + jnp.log((total_NS * jnp.exp(peak_NS - peak_N[:, None])).sum(axis=1))
    smooth = terms.label_smoothing
    loss_N = lse_N - (1.0 - smooth) * target_NS.sum(axis=1)
    if smooth:
        loss_N -= smooth / terms.vocabulary * every_NS.sum(axis=1)
    if terms.z_loss:
        loss_N += terms.z_loss * lse_N * lse_N
    return (loss_N * mask_N).sum(), (x_ND, head, targets_N, mask_N, lse_N, kept)


def _add_chunk(sums, logits_NSC, ids_SC, targets_N, terms):
    """Running (largest logit, sum of exponentials relative to it, the target's logit, sum of logits) of each shard."""
    peak_NS, total_NS, target_NS, every_NS = sums
    real_SC, is_target_NSC = ids_SC < terms.vocabulary, ids_SC[None] == targets_N[:, None, None]
    masked_NSC = jnp.where(real_SC[None], logits_NSC, HIDDEN)
    new_NS = jnp.maximum(peak_NS, masked_NSC.max(axis=2))
    total_NS = total_NS * jnp.exp(peak_NS - new_NS) + jnp.exp(masked_NSC - new_NS[:, :, None]).sum(axis=2)
    # A comparison, because a gather along a sharded dim would move the logits (and abort XLA inside a shard_map).
    target_NS += jnp.where(is_target_NSC, logits_NSC, 0.0).sum(axis=2)
    if terms.label_smoothing:
        every_NS += jnp.where(real_SC[None], logits_NSC, 0.0).sum(axis=2)
    return new_NS, total_NS, target_NS, every_NS


def _backward(terms, residuals, cotangent):
    x_ND, head, targets_N, mask_N, lse_N, kept = residuals
    shards, local = _split_shape(head, terms)
    weight_N = mask_N * cotangent
    slope_N = weight_N * (1.0 + 2.0 * terms.z_loss * lse_N)
    logits_spec, dx_spec, dhead_spec = _specs(terms)

    def chunk_gradients(raw_NSC, start, size):
        ids_SC = _ids(start, size, shards, local)
        logits_NSC = _capped(raw_NSC, terms)
        wanted_NSC = jnp.where(ids_SC[None] == targets_N[:, None, None], 1.0 - terms.label_smoothing, 0.0)
        wanted_NSC += terms.label_smoothing / terms.vocabulary
        d_NSC = jnp.exp(logits_NSC - lse_N[:, None, None]) * slope_N[:, None, None]
        d_NSC -= wanted_NSC * weight_N[:, None, None]
        if terms.softcap is not None:
            d_NSC *= 1.0 - (logits_NSC / terms.softcap) ** 2
        d_NSC = jnp.where(ids_SC[None] < terms.vocabulary, d_NSC, 0.0).astype(x_ND.dtype)
        dx_SND = _matmul(dx_spec, d_NSC, _columns(head, start, size, terms))
        return dx_SND, _matmul(dhead_spec, d_NSC, x_ND).astype(head.dtype)

    def add_chunk(grads, start, size):
        dx_SND, dhead = grads
        more, columns = chunk_gradients(_raw_logits(x_ND, head, start, size, terms), start, size)
        return dx_SND + more, jax.lax.dynamic_update_slice_in_dim(dhead, columns, start, axis=_axis(terms))

    if kept is not None:
        dx_SND, dhead = chunk_gradients(kept, 0, local)
    else:
        # dx keeps the shards apart until the end: one all-reduce, where a sum would take one for each chunk.
        zeros = (jnp.zeros((shards, *x_ND.shape), jnp.float32), jnp.zeros_like(head))
        dx_SND, dhead = _over_chunks(add_chunk, zeros, local, terms.chunk)
    return dx_SND.sum(axis=0).astype(x_ND.dtype), dhead, None, None


_loss_sum.defvjp(_forward, _backward)


def _over_chunks(add_chunk, carry, local, chunk):
    """carry = add_chunk(carry, start, size) over the whole chunks in a loop, then over the rest."""
    whole = local // chunk
    carry, _ = jax.lax.scan(
        lambda carry, index: (add_chunk(carry, index * chunk, chunk), None), carry, jnp.arange(whole, dtype=jnp.int32)
    )
    return add_chunk(carry, whole * chunk, local % chunk) if local % chunk else carry


def _specs(terms):
    """Einsum specs of the logits, of dx by shard, and of the head's gradient."""
    columns = "scd" if terms.transposed else "dsc"
    return f"nd,{columns}->nsc", f"nsc,{columns}->snd", f"nsc,nd->{columns}"


def _axis(terms):
    return 1 if terms.transposed else 2


def _split_shape(head, terms):
    return head.shape[:2] if terms.transposed else head.shape[1:]


def _columns(head, start, size, terms):
    return jax.lax.dynamic_slice_in_dim(head, start, size, axis=_axis(terms))


def _ids(start, size, shards, local):
    return (jnp.arange(shards, dtype=jnp.int32) * local)[:, None] + (start + jnp.arange(size, dtype=jnp.int32))[None, :]


def _raw_logits(x_ND, head, start, size, terms):
    return _matmul(_specs(terms)[0], x_ND, _columns(head, start, size, terms))


def _capped(logits, terms):
    return logits if terms.softcap is None else terms.softcap * jnp.tanh(logits / terms.softcap)


def _matmul(spec, left, right):
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
