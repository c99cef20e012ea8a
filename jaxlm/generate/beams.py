"""Beam search: of each prompt the likeliest N texts go on together, and the best of those that ended is the answer.

The device scores the next tokens of all beams, the host chooses among them, and the next step begins with putting the
cache in the order of the beams chosen. The choice is that of transformers 5 (`num_beams=N, early_stopping=False`).

Legend: R rows (N beams of each prompt, together), P prompts, N beams, C candidates of a row, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlm.config.errors import UserError
from jaxlm.generate.sampling import Sampling
from jaxlm.parallel.rules import Dims, Layout

STEEPEST = 10.0
"""Higher powers of the length of a text may leave float32."""


@dataclass(frozen=True, kw_only=True)
class Beams:
    """The rule by which a text is searched."""

    beams: int
    """Texts of a prompt that go on together."""
    length_penalty: float = 1.0
    """Texts that ended are ranked by their log-probability over their length to this power."""

    def __post_init__(self) -> None:
        if self.beams < 1:
            raise UserError(f"--beams={self.beams}: must be 1 (no search) or more")
        if not abs(self.length_penalty) <= STEEPEST:
            raise UserError(f"--length-penalty={self.length_penalty:g}: must be from {-STEEPEST:g} to {STEEPEST:g}")

    @property
    def scalars(self) -> dict[str, np.generic]:
        """As of `Sampling`; no program reads any."""
        return {}


def rule(sampling: Sampling, beams: int, length_penalty: float) -> Sampling | Beams:
    """What the options ask for: `sampling` with one beam, a search with more.

    Raises:
        UserError: a value out of range, or options of both.
    """
    search = Beams(beams=beams, length_penalty=length_penalty)
    if beams > 1 and not sampling.greedy:
        raise UserError(
            f"--beams={beams} searches the likeliest text and draws nothing, but --temperature="
            f"{sampling.temperature:g}; use --temperature=0, or --beams=1 to draw"
        )
    if beams == 1 and length_penalty != 1:
        raise UserError(f"--length-penalty={length_penalty:g} ranks texts of a search; add --beams=4, or leave it out")
    return search if beams > 1 else sampling


def best(logits_RV: Float[Array, "R V"], count: int, layout: Layout) -> dict[str, jax.Array]:
    """The `count` likeliest next tokens of each row [R, C], likeliest first, and their log-probabilities in float32."""

    def local(logits_RV: jax.Array) -> dict[str, jax.Array]:
        scores_RC, tokens_RC = jax.lax.top_k(jax.nn.log_softmax(logits_RV, axis=-1), min(count, logits_RV.shape[-1]))
        return {"scores": scores_RC, "tokens": tokens_RC}

    # By hand, for XLA would first give every device the logits of all rows.
    rows = layout.spec(("batch", None))
    return jax.shard_map(local, mesh=layout.mesh, in_specs=rows, out_specs=rows, check_vma=False)(logits_RV)


def repeated(arrays: Mapping[str, Array], dims: Mapping[str, Dims], beams: int) -> dict[str, jax.Array]:
    """Each row of the batch `beams` times, one after the other; arrays without a batch stay."""
    return {
        name: jnp.repeat(a, beams, axis=dims[name].index("batch")) if "batch" in dims[name] else a
        for name, a in arrays.items()
    }


def reordered(
    arrays: Mapping[str, Array], dims: Mapping[str, Dims], parents_R: Int[Array, "R"], beams: int
) -> dict[str, jax.Array]:
    """In each row what stood in the row of its parent, which `parents_R` counts among the beams of the prompt.

    The beams of a prompt share a device, so that nothing crosses the mesh.
    """
    parents_PN = parents_R.reshape(-1, beams)

    def one(name: str, a: jax.Array) -> jax.Array:
        if "batch" not in dims[name]:
            return a
        at = dims[name].index("batch")

        def of_a_prompt(rows: jax.Array, parents_N: jax.Array) -> jax.Array:
            return jnp.take(rows, parents_N, axis=at, mode="clip")

        grouped = a.reshape(*a.shape[:at], -1, beams, *a.shape[at + 1 :])
        return jax.vmap(of_a_prompt, in_axes=(at, 0), out_axes=at)(grouped, parents_PN).reshape(a.shape)

    return {name: one(name, a) for name, a in arrays.items()}


class Search:
    """The beams of one prompt, on the host."""

    def __init__(self, rule: Beams, ends: Collection[int], longest: int):
        self.beams, self._length_penalty, self._ends, self._longest = rule.beams, rule.length_penalty, ends, longest
        self._length = 0
        self._texts: list[list[int]] = [[] for _ in range(rule.beams)]
        self._scores_N = np.full(rule.beams, -np.inf, np.float32)
        self._scores_N[0] = 0  # the beams are all the bare prompt: one of them counts
        self._ended: list[tuple[np.float32, list[int]]] = []
        """Score and text, the best first; at most as many as beams."""
        self.done = False
        """Nothing better is looked for."""

    @property
    def text(self) -> list[int]:
        """The best that ended, with the id that ended it, if one did."""
        return self._ended[0][1]

    def advance(self, scores_NC: np.ndarray, tokens_NC: np.ndarray) -> tuple[list[int], list[int]]:
        """Extend the beams by the best candidates; the parent and the last token of each."""
        beams, candidates = self.beams, scores_NC.shape[1]
        totals_NC = self._scores_N[:, None] + scores_NC
        self._length += 1
        weight = np.float32(self._length**self._length_penalty)
        order = np.argsort(-totals_NC, axis=None, kind="stable")
        real = order[totals_NC.ravel()[order] != -np.inf]  # the others are of beams that do not exist
        going: list[tuple[np.float32, int, int]] = []
        for rank, place in enumerate(real.tolist()):
            parent, column = divmod(place, candidates)
            total, token = totals_NC[parent, column], int(tokens_NC[parent, column])
            if len(going) == beams:
                break
            if token not in self._ends and self._length < self._longest:
                going.append((total, parent, token))
            elif rank < beams:  # a text that ends has to be among the best of all that might go on
                self._ended.append((total / weight, [*self._texts[parent], token]))
        self._ended = sorted(self._ended, key=lambda one: -one[0])[:beams]
        full = len(self._ended) == beams
        self.done = not going or bool(full and going[0][0] / weight <= self._ended[-1][0])
        self._texts = [[*self._texts[parent], token] for _, parent, token in going]
        self._scores_N = np.full(beams, -np.inf, np.float32)
        self._scores_N[: len(going)] = [total for total, _, _ in going]
        unused = [0] * (beams - len(going))
        return [parent for _, parent, _ in going] + unused, [token for _, _, token in going] + unused


def stream(prefill, step, params, batch, scalars, searches: Sequence[Search]) -> Iterator[list[list[int]]]:
    """After each step the texts that are found with it, [] for the other prompts.

    Args:
        prefill, step: compiled programs of `Generator`, both of which give candidates [R, C].
        searches: of each prompt; rows that fill up the batch have none.
    """
    cache, found = prefill(params, batch, scalars)
    going = dict(enumerate(searches))
    while going:
        scores_RC, tokens_RC = jax.device_get((found["scores"], found["tokens"]))
        last = {name: np.zeros(len(tokens_RC), np.int32) for name in ("parents", "tokens")}
        for prompt, search in going.items():
            own = slice(prompt * search.beams, (prompt + 1) * search.beams)
            last["parents"][own], last["tokens"][own] = search.advance(scores_RC[own], tokens_RC[own])
        texts = {prompt: search.text for prompt, search in going.items() if search.done}
        going = {prompt: search for prompt, search in going.items() if not search.done}
        if going:  # the step is on its way before anybody hears of the texts
            cache, found = step(params, cache, last | {"positions": found["positions"]}, scalars)
        yield [texts.get(prompt, []) for prompt in range(len(searches))]
