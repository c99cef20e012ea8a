"""A block: attention and feed-forward, each added to the residual stream.

Legend: B batch, T query length, S key length, D embed, N query heads, K kv heads, H head size.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlm.config.schema import ModelConfig
from jaxlm.models.attention import attend
from jaxlm.models.experts import Experts
from jaxlm.models.layers import Identity, Linear, Mlp, Noise, Norm, affine, dropout
from jaxlm.models.rope import Rotation, rotate
from jaxlm.models.router import Load
from jaxlm.models.runtime import Runtime


class Tokens(NamedTuple):
    """Where each query stands, and each key where they are in a cache rather than the queries' own; what is added to
    their logits; and the text that another stack has read."""

    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]
    kv_positions_BS: Int[Array, "B S"] | None = None
    kv_segments_BS: Int[Array, "B S"] | None = None
    bias_BNTS: Float[Array, "#B N T S"] | None = None
    source: "Source | None" = None


class Source(NamedTuple):
    """The text that a decoder sees all of, as its encoder has read it."""

    segments_BS: Int[Array, "B S"]
    x_BSD: Float[Array, "B S D"] | None
    """None where each layer has its keys and values in a cache."""


class LayerCache(NamedTuple):
    """Keys and values of one layer, and the slot at which the next ones are written; and those of the source."""

    k_BSKH: Float[Array, "B S K H"]
    v_BSKH: Float[Array, "B S K H"]
    start: Int[Array, ""]
    source: tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]] | None = None

    def append(self, k: jax.Array, v: jax.Array) -> "LayerCache":
        at = (jnp.zeros_like(self.start), self.start, jnp.zeros_like(self.start), jnp.zeros_like(self.start))
        return self._replace(
            k_BSKH=jax.lax.dynamic_update_slice(self.k_BSKH, k.astype(self.k_BSKH.dtype), at),
            v_BSKH=jax.lax.dynamic_update_slice(self.v_BSKH, v.astype(self.v_BSKH.dtype), at),
        )


OWN, WHOLE = (("batch", length, None, None) for length in ("residual", "sequence"))
"""Keys and values that `model` does not cut by heads: as computed of each device's own tokens, and as attended to."""


class Attention(nnx.Module):
    """Multi-head, grouped-query (Ainslie et al. 2023) or multi-query self-attention."""

    def __init__(self, rngs, config: ModelConfig):
        embed, heads, kv, size = config.embed, config.heads, config.key_value_heads, config.head_width
        std, bias = embed**-0.5, "qkv" in config.biases
        # Logits begin at the same size whatever queries are multiplied by.
        q_std = std if config.query_scale is None else std * size**-0.5 / config.query_scale
        self.config = config
        self.query = Linear(rngs, (embed, heads, size), ("embed", "heads", None), bias=bias, std=q_std)
        # A constant added to every key shifts all logits of a query alike, which softmax ignores: without rotation,
        # norm or cap in between, the key bias has gradient zero, and what rounding makes of it Adam would amplify.
        constant = config.positions != "rotary" and config.qk_norm == "none" and config.attention_softcap is None
        self.key = Linear(
            rngs, (embed, kv, size), ("embed", "kv_heads", None), bias=bias, std=std, learn_bias=not constant
        )
        self.value = Linear(rngs, (embed, kv, size), ("embed", "kv_heads", None), bias=bias, std=std)
        self.output = Linear(
            rngs,
            (heads, size, embed),
            ("heads", None, "embed"),
            inputs=2,
            bias="output" in config.biases,
            std=(heads * size) ** -0.5 / math.sqrt(2 * config.layers),
        )

        def norm(together: int) -> nnx.Module:
            if config.qk_norm == "none":
                return Identity()
            width = size if config.qk_norm == "head" else together * size
            return Norm(rngs, config, size=width, kind="rms", dim=None)

        self.query_norm, self.key_norm = norm(heads), norm(kv)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        tokens: Tokens,
        runtime: Runtime,
        *,
        window: int,
        turn: Rotation | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        config, layout = self.config, runtime.layout
        q, k, v = self._project(x_BTD, runtime)
        q, k = self._normed(self.query_norm, q, runtime), self._normed(self.key_norm, k, runtime)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        if cache is not None:
            cache = cache.append(k, v)
            k, v = cache.k_BSKH.astype(q.dtype), cache.v_BSKH.astype(q.dtype)
        o_BTNH = attend(
            q,
            k,
            v,
            q_segments_BT=tokens.segments_BT,
            kv_segments_BS=tokens.kv_segments_BS,
            q_positions_BT=tokens.positions_BT,
            kv_positions_BS=tokens.kv_positions_BS,
            scale=config.query_scale or config.head_width**-0.5,
            causal=config.causal,
            window=window,
            softcap=config.attention_softcap,
            bias_BNTS=tokens.bias_BNTS,
            backend=runtime.attention,
            mesh=layout.mesh,
            context=runtime.context,
        )
        return self.output(o_BTNH, runtime), cache

    def _normed(self, norm: nnx.Module, x: jax.Array, runtime: Runtime) -> jax.Array:
        """Queries or keys after their norm, of each head or of all of them together."""
        if self.config.qk_norm != "projection":
            return norm(x, runtime)
        return norm(x.reshape(*x.shape[:2], -1), runtime).reshape(x.shape)

    def _project(self, x_BTD: jax.Array, runtime: Runtime) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], keys and values [B, T, K, H]."""
        layout, parts = runtime.layout, (self.query, self.key, self.value)
        if layout.axis_size("kv_heads") == 1:
            q = runtime.project(lambda x: self.query(x, runtime), x_BTD)
            k, v = (layout.relay(part(x_BTD, runtime), OWN, WHOLE) for part in parts[1:])
        else:
            # One product, each kv head's queries beside its key and value: the backward then sums the gradient of x
            # over the devices of tp once, not three times.
            kv = self.config.key_value_heads
            group = self.config.heads // kv

            def joined(arrays: list[jax.Array]) -> jax.Array:
                lead, size = arrays[0].shape[:-2], arrays[0].shape[-1]
                return jnp.concatenate([a.reshape(*lead, kv, -1, size) for a in arrays], axis=-2)

            biases = [part.use_bias(runtime) for part in parts]
            y = runtime.project(
                lambda x: affine(
                    x,
                    lambda: joined([part.use_kernel(runtime) for part in parts]),
                    None if biases[0] is None else joined([bias for bias in biases if bias is not None]),
                    runtime,
                    cut="outputs",
                ),
                x_BTD,
            )
            y = layout.constrain(y, "batch", "sequence", "kv_heads", None, None)
            q, k, v = jnp.split(y, (group, group + 1), axis=-2)  # whose backward joins, where slices would pad and add
            q = q.reshape(*x_BTD.shape[:2], self.config.heads, -1)
            k, v = k.squeeze(-2), v.squeeze(-2)
        return (
            layout.constrain(q, "batch", "sequence", "heads", None),
            layout.constrain(k, "batch", "sequence", "kv_heads", None),
            layout.constrain(v, "batch", "sequence", "kv_heads", None),
        )


class CrossAttention(Attention):
    """Attention of a decoder to the text that its encoder has read (Vaswani et al. 2017), within a document. It knows
    no positions."""

    def keys(self, x_BSD: Float[Array, "B S D"], runtime: Runtime) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of what the encoder made of the text."""
        k, v = self._normed(self.key_norm, self.key(x_BSD, runtime), runtime), self.value(x_BSD, runtime)
        dims = ("batch", "sequence", "kv_heads", None)
        return runtime.layout.constrain(k, *dims), runtime.layout.constrain(v, *dims)

    def of_source(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, runtime: Runtime, cache: LayerCache | None
    ) -> Float[Array, "B T D"]:
        config, source, layout = self.config, tokens.source, runtime.layout
        assert source is not None
        if source.x_BSD is not None:
            k, v = self.keys(source.x_BSD, runtime)
        else:
            assert cache is not None and cache.source is not None
            k, v = cache.source
        q = self._normed(self.query_norm, self.query(x_BTD, runtime), runtime)
        q = layout.constrain(q, "batch", "sequence", "heads", None)
        o_BTNH = attend(
            q,
            k.astype(q.dtype),
            v.astype(q.dtype),
            q_segments_BT=tokens.segments_BT,
            kv_segments_BS=source.segments_BS,
            q_positions_BT=tokens.positions_BT,
            scale=config.query_scale or config.head_width**-0.5,
            causal=False,
            softcap=config.attention_softcap,
            backend=runtime.attention,
            mesh=layout.mesh,
        )
        return self.output(o_BTNH, runtime)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the norms stand before, after or around each, or around the sums.
    With an encoder, x + cross_attention(norm(x)) between the two.

    Beside x it returns the cache, and of a mixture of experts the load.
    """

    def __init__(self, rngs, config: ModelConfig):
        self.rate = config.dropout

        def norm(wanted: bool) -> nnx.Module:
            return Norm(rngs, config, size=config.embed) if wanted else Identity()

        before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement in ("post", "sandwich")
        of_sum = config.norm_placement == "sum"
        self.attention_norm, self.attention_post_norm = norm(before), norm(after)
        self.attention_sum_norm = norm(of_sum)
        self.attention = Attention(rngs, config)
        reads = config.architecture == "encoder_decoder"
        self.cross_norm, self.cross_post_norm = norm(reads and before), norm(reads and after)
        self.cross = CrossAttention(rngs, config) if reads else None
        self.mlp_norm, self.mlp_post_norm, self.mlp_sum_norm = norm(before), norm(after), norm(of_sum)
        self.mlp = Experts(rngs, config) if config.experts else Mlp(rngs, config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        tokens: Tokens,
        runtime: Runtime,
        *,
        window: int = 0,
        turn: Rotation | None = None,
        cache: LayerCache | None = None,
        noise: Noise | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, Load | None]:
        noises = [None if noise is None else noise.of(part) for part in range(3)]
        a, cache = self.attention(
            self.attention_norm(x, runtime), tokens, runtime, window=window, turn=turn, cache=cache
        )
        a = checkpoint_name(a, "attention_out")
        x = self.attention_sum_norm(x + dropout(self.attention_post_norm(a, runtime), self.rate, noises[0]), runtime)
        if self.cross is not None:
            a = self.cross.of_source(self.cross_norm(x, runtime), tokens, runtime, cache)
            a = checkpoint_name(a, "attention_out")
            x = x + dropout(self.cross_post_norm(a, runtime), self.rate, noises[2])
        m, load = self.mlp_norm(x, runtime), None
        if isinstance(self.mlp, Experts):
            m, load = self.mlp(m, tokens.segments_BT, runtime, drop=cache is None)
        else:
            m = self.mlp(m, runtime)
        m = checkpoint_name(m, "mlp_out")
        x = self.mlp_sum_norm(x + dropout(self.mlp_post_norm(m, runtime), self.rate, noises[1]), runtime)
        return runtime.layout.constrain(x, "batch", "residual", None), cache, load

    def source_keys(self, x_BSD: Float[Array, "B S D"], runtime: Runtime) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of what an encoder has read."""
        assert self.cross is not None
        return self.cross.keys(x_BSD, runtime)
