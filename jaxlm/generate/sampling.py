"""How the next token is chosen from logits: the greatest, or drawn at a temperature from the top k or the nucleus.

Legend: B batch, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlm.config.errors import UserError
from jaxlm.parallel import keys

LARGEST = 2**31 - 1
COLDEST = 1e-30
"""Lower temperatures would be zero in float32."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The rule by which every token is chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that hold this much probability; 1 is all."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature:g}: must be 0 (the likeliest token) or more")
        if not 0 <= self.top_k <= LARGEST:
            raise UserError(f"--top-k={self.top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p={self.top_p:g}: must be more than 0, and at most 1 (all tokens)")
        if not 0 <= self.seed <= LARGEST:
            raise UserError(f"--seed={self.seed}: must be from 0 to {LARGEST}")

    @property
    def scalars(self) -> dict[str, np.generic]:
        """What a program reads at run time: another value does not recompile it."""
        return {
            "temperature": np.float32(max(self.temperature, COLDEST)),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "seed": np.int32(self.seed),
        }

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are never drawn, which takes a sort to know."""
        return self.top_k > 0 or self.top_p < 1


def allowed(logits_BV: Float[Array, "B V"], top_k: Int[Array, ""], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """Which tokens may be drawn.

    Tokens are ranked by logit, equal logits by id, the smaller first. top_k keeps the first k (0: all). The
    probabilities of those are made to sum to 1; then top_p (nucleus sampling, Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751) keeps a token if those ranked before it hold less than `top_p` together. So the
    first token is always kept, and so is the one that crosses `top_p`.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    rank_1V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)[None]
    in_k_1V = (rank_1V < top_k) | (top_k == 0)
    probability_BV = jax.nn.softmax(jnp.where(in_k_1V, ranked_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # With top_p 1 nothing is cut, though rounding can bring the sum to 1 before the last token.
    kept_BV = in_k_1V & ((before_BV < top_p) | (top_p >= 1) | (rank_1V == 0))
    return jnp.take_along_axis(kept_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


def draw(
    logits_BV: Float[Array, "B V"], rows_B: Int[Array, "B"], positions_B: Int[Array, "B"], seed: Int[Array, ""]
) -> Int[Array, "B"]:
    """A token for each row with probability softmax(logits), as the argmax of logits plus Gumbel noise.

    The noise depends on the seed, the row, the token's position in the row and its id: not on other rows, on padding
    or on the mesh.
    """
    root = keys.key(seed)

    def noise(row: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, row), position)
        return jax.random.gumbel(key, logits_BV.shape[-1:], jnp.float32)

    return jnp.argmax(logits_BV + jax.vmap(noise)(rows_B, positions_B), axis=-1).astype(jnp.int32)


def choose(
    logits_BV: Float[Array, "B V"],
    rows_B: Int[Array, "B"],
    positions_B: Int[Array, "B"],
    scalars: dict[str, jax.Array],
    *,
    greedy: bool,
    cuts: bool,
) -> Int[Array, "B"]:
    """The next token of each row, to stand at `positions_B`.

    Args:
        scalars, greedy, cuts: of `Sampling`; the last two decide the program.
    """
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # From the greatest down, so that a tiny temperature overflows to -inf rather than to several +inf.
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / scalars["temperature"]
    if cuts:
        logits_BV = jnp.where(allowed(logits_BV, scalars["top_k"], scalars["top_p"]), logits_BV, -jnp.inf)
    return draw(logits_BV, rows_B, positions_B, scalars["seed"])
