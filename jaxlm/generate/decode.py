"""Text from a model: one call reads the prompts into a KV cache, then one small program writes token after token.

Legend: B batch (prompts, then rows that fill up the data axes), T prompt length (padded), V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.config.errors import UserError
from jaxlm.config.schema import ModelConfig
from jaxlm.generate import beams as searching
from jaxlm.generate.beams import Beams, Search
from jaxlm.generate.sampling import Sampling, choose
from jaxlm.models.build import Model, Params
from jaxlm.models.decoder import Cache, empty_cache
from jaxlm.models.runtime import Runtime

OnToken = Callable[[int, int], bool | None]
"""Told (row, token) as soon as a token is known, of a beam search when its row is done; True ends the row with it."""

SHORTEST = 16
"""Prompt lengths and numbers of new tokens are rounded up to powers of two from here on: few programs compile."""
CHUNK = 512
"""Prompt tokens that meet the cache at a time: attention weights of size T x cache would not fit for long prompts."""

CACHE_DIMS = {
    "k": (None, "batch", None, "kv_heads", None),
    "v": (None, "batch", None, "kv_heads", None),
    "positions": ("batch", None),
    "segments": ("batch", None),
    "length": (),
}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the last call of a Generator took, compilation apart."""

    compile_seconds: float
    prompt_tokens: int
    prefill_seconds: float
    """Until the first new token of every row was known."""
    decoded_tokens: int
    """New tokens after the first of each row."""
    decode_seconds: float


def generate(
    model: Model,
    params: Params,
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
    eos_id: int | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each of `prompts` (token ids) by up to `max_new_tokens`; use a `Generator` to do so repeatedly.

    Args:
        params: as training holds them, on `runtime.layout.mesh` (rep, dp, fsdp and tp axes).
        runtime: its `attention` counts if it is reference or xla; the others cannot read a cache, and xla is used.
        temperature, top_k, top_p, seed: see `sampling`. The same seed gives row i the same text in any batch and on
            any mesh, but for logits so close that rounding decides.
        beams, length_penalty: with more than one beam the likeliest text is searched, see `beams`.
        eos_id: ends a row; an empty prompt starts behind it.
        stop_ids: others that end a row.
        on_token: called in order of time.

    Returns:
        The new tokens of each row, without the prompt and without the id that ended it.

    Raises:
        UserError: a prompt that is empty or holds ids unknown to the model, more tokens than learned positions, a
            sampling value out of range.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return Generator(model, runtime)(
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        rule=searching.rule(sampling, beams, length_penalty),
        eos_id=eos_id,
        stop_ids=stop_ids,
        on_token=on_token,
    )


def check(config: ModelConfig) -> None:
    """Raise UserError where a model does not continue text."""
    if not config.causal:
        raise UserError(
            "an encoder finds hidden tokens and continues no text; use a run with model.architecture=decoder"
        )


class Generator:
    """`generate` for one model and mesh: its programs are compiled once for each shape that it meets."""

    def __init__(self, model: Model, runtime: Runtime):
        check(model.config)
        attention = "reference" if runtime.attention == "reference" else "xla"
        self.model, self.runtime = model, replace(runtime, attention=attention, remat="none")
        self.programs: dict[tuple, Any] = {}
        """Compiled programs by what tells them apart."""
        self.speed: Speed | None = None
        """Of the last call that made tokens."""

    def __call__(
        self,
        params: Params,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        rule: Sampling | Beams,
        eos_id: int | None = None,
        stop_ids: Collection[int] = (),
        on_token: OnToken | None = None,
    ) -> list[list[int]]:
        """See `generate`."""
        given = [list(prompt) or ([] if eos_id is None else [eos_id]) for prompt in prompts]
        self._check(given, max_new_tokens)
        new: list[list[int]] = [[] for _ in given]
        if not given or not max_new_tokens:
            return new
        params = self._in_compute_dtype(params)
        batch = self._place(left_padded(given, rows=self._rows(len(given))))
        scalars = self._place(rule.scalars)
        times = [time.perf_counter()]
        ends = {*stop_ids, *(() if eos_id is None else (eos_id,))}
        prefill, step = self._programs(params, batch, scalars, max_new_tokens, _mode(rule, ends))
        times.append(time.perf_counter())
        if isinstance(rule, Beams):
            searches = [Search(rule, ends, max_new_tokens) for _ in given]
            stream = searching.stream(prefill, step, params, batch, scalars, searches)
        else:
            stream = _stream(prefill, step, params, batch, scalars, max_new_tokens)
        live = set(range(len(given)))
        for told in stream:
            times.append(time.perf_counter())
            for row in sorted(live):
                for token in told[row]:
                    if token not in ends:
                        new[row].append(token)
                    if token in ends or (on_token and on_token(row, token)):
                        live.remove(row)
                        break
            if not live:
                break
        self.speed = Speed(
            compile_seconds=times[1] - times[0],
            prompt_tokens=sum(map(len, given)),
            prefill_seconds=times[2] - times[1],
            decoded_tokens=sum(max(len(row) - 1, 0) for row in new),
            decode_seconds=times[-1] - times[2],
        )
        return new

    def _check(self, prompts: list[list[int]], max_new_tokens: int) -> None:
        config = self.model.config
        if max_new_tokens < 0:
            raise UserError(f"--max-tokens={max_new_tokens}: must be 0 or more")
        for number, prompt in enumerate(prompts, 1):
            if not prompt:
                raise UserError(f"prompt {number} is empty; give it at least one token")
            bad = next((token for token in prompt if not 0 <= token < self.model.vocabulary), None)
            if bad is not None:
                raise UserError(f"prompt {number}: token {bad} is not one of the model's {self.model.vocabulary}")
            total = len(prompt) + max_new_tokens
            if config.positions == "learned" and total > config.max_positions:
                raise UserError(
                    f"prompt {number}: {len(prompt)} tokens and {max_new_tokens} new ones are {total}, more than the "
                    f"model's {config.max_positions} learned positions; shorten the prompt or --max-tokens"
                )

    def _rows(self, prompts: int) -> int:
        """Rows of a batch that the data axes divide."""
        ways = self.runtime.layout.axis_size("batch")
        return -(-prompts // ways) * ways

    def _in_compute_dtype(self, params: Params) -> Params:
        """Matrices cast once rather than for every token; vectors and routers stay as they are, for norms and the
        choice of experts compute in float32."""
        dtype = self.runtime.dtype

        def one(path: tuple, p: jax.Array, dims: tuple[str | None, ...]) -> jax.Array:
            matrix = len([dim for dim in dims if dim != "layers"]) > 1
            return p.astype(dtype) if matrix and "router" not in [key.key for key in path] else p

        def cast(params: Params) -> Params:
            return jax.tree_util.tree_map_with_path(one, params, self.model.dims)

        if all(leaf.dtype == dtype for leaf in jax.tree.leaves(params)):
            return params
        return jax.jit(cast, out_shardings=jax.tree.map(lambda p: p.sharding, params))(params)

    def _place(self, arrays: dict[str, Any]) -> dict[str, jax.Array]:
        """Host arrays onto the mesh: the first dim of those that have one is the batch."""
        layout = self.runtime.layout
        return {
            name: jax.device_put(a, layout.sharding(("batch", None)[: np.ndim(a)], np.shape(a), name))
            for name, a in arrays.items()
        }

    def _abstract_cache(self, rows: int, slots: int) -> Cache:
        layout = self.runtime.layout
        cache = jax.eval_shape(
            partial(empty_cache, self.model.config, batch=rows, slots=slots, dtype=self.runtime.dtype)
        )
        return {
            name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.sharding(CACHE_DIMS[name], a.shape, name))
            for name, a in cache.items()
        }

    def _programs(self, params, batch, scalars, max_new_tokens: int, mode: dict[str, Any]):
        """The compiled prefill and step."""
        prompts, length = batch["tokens"].shape
        rows, slots = prompts * mode.get("beams", 1), length + bucket(max_new_tokens)
        cache = self._abstract_cache(rows, slots)
        whole = self.runtime.layout.sharding(())  # every host reads the tokens
        names = ("tokens", "positions", *(("parents",) if "beams" in mode else ()))
        last = {name: jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=whole) for name in names}
        out = (jax.tree.map(lambda leaf: leaf.sharding, cache), whole)
        key = (rows, slots, *mode.items(), *(leaf.sharding for leaf in jax.tree.leaves(params)))
        if ("prefill", length, *key) not in self.programs:
            prefill = jax.jit(partial(self._prefill, slots=slots, **mode), out_shardings=out)
            self.programs["prefill", length, *key] = prefill.lower(params, batch, scalars).compile()
        if ("step", *key) not in self.programs:
            step = jax.jit(partial(self._step, **mode), out_shardings=out, donate_argnums=1)
            self.programs["step", *key] = step.lower(params, cache, last, scalars).compile()
        return self.programs["prefill", length, *key], self.programs["step", *key]

    def _prefill(self, params, batch, scalars, *, slots: int, beams: int = 0, **mode):
        """Prompts into an empty cache, CHUNK tokens at a time, and the first new token of each row; of a search its
        candidates, all in one row for each beam."""
        rows, length = batch["tokens"].shape
        cache = empty_cache(self.model.config, batch=rows, slots=slots, dtype=self.runtime.dtype)

        def read(cache: Cache, part: dict[str, jax.Array]) -> tuple[Cache, jax.Array]:
            x_BTD, cache = self.model.decode(params, part, self.runtime, cache)
            return cache, x_BTD[:, -1:]

        if length <= CHUNK:
            cache, x_B1D = read(cache, batch)
        else:
            parts = {name: a.reshape(rows, -1, CHUNK).swapaxes(0, 1) for name, a in batch.items()}
            cache, ends = jax.lax.scan(read, cache, parts)
            x_B1D = ends[-1]
        last = self._choose(params, x_B1D, batch["positions"][:, -1] + 1, scalars, **mode)
        if beams:
            last = jax.tree.map(lambda a: jnp.repeat(a, beams, axis=0), last)
            cache = searching.repeated(cache, CACHE_DIMS, beams)
        return cache, last

    def _step(self, params, cache: Cache, last, scalars, *, beams: int = 0, **mode):
        """The last token of each row into the cache, and the next one; of a search its candidates."""
        if beams:
            cache = searching.reordered(cache, CACHE_DIMS, last["parents"], beams)
        positions_B1 = last["positions"][:, None]
        batch = {"tokens": last["tokens"][:, None], "positions": positions_B1}
        batch |= {"segment_ids": jnp.ones_like(positions_B1)}
        x_B1D, cache = self.model.decode(params, batch, self.runtime, cache)
        return cache, self._choose(params, x_B1D, last["positions"] + 1, scalars, **mode)

    def _choose(self, params, x_B1D, positions_B, scalars, *, candidates: int = 0, **mode) -> dict[str, jax.Array]:
        logits_BV = self.model.logits(params, x_B1D, self.runtime)[:, 0]
        logits_BV = self.runtime.layout.constrain(logits_BV, "batch", None)  # ranks need a whole row
        if candidates:
            return {"positions": positions_B} | searching.best(logits_BV, candidates, self.runtime.layout)
        rows_B = jnp.arange(len(logits_BV), dtype=jnp.int32)
        return {"tokens": choose(logits_BV, rows_B, positions_B, scalars, **mode), "positions": positions_B}


def _mode(rule: Sampling | Beams, ends: Collection[int]) -> dict[str, Any]:
    """What of a rule tells programs apart."""
    if isinstance(rule, Beams):
        # Of a row's candidates `beams` may all go on, and before them may stand as many as there are ids that end.
        return {"beams": rule.beams, "candidates": rule.beams + max(rule.beams, len(ends))}
    return {"greedy": rule.greedy, "cuts": rule.cuts and not rule.greedy}


def bucket(count: int) -> int:
    """`count` rounded up to a power of two, SHORTEST at the least."""
    return max(SHORTEST, 1 << (count - 1).bit_length())


def left_padded(prompts: Sequence[Sequence[int]], *, rows: int) -> dict[str, np.ndarray]:
    """A batch [rows, T] whose rows end in the prompts; before them padding, segment 0. Rows without a prompt hold one
    token."""
    length = bucket(max(map(len, prompts)))
    batch = {name: np.zeros((rows, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else [0]
        start = length - len(prompt)
        batch["tokens"][row, start:] = prompt
        batch["segment_ids"][row, start:] = 1
        batch["positions"][row, start:] = np.arange(len(prompt))
    return batch


def _stream(prefill, step, params, batch, scalars, count: int) -> Iterator[list[list[int]]]:
    """`count` times a list of the next token of each row; a step is dispatched before its forerunner's tokens are
    read."""
    cache, last = prefill(params, batch, scalars)
    for remaining in reversed(range(count)):
        tokens = last["tokens"]
        if remaining:
            cache, last = step(params, cache, last, scalars)
        yield np.asarray(tokens)[:, None].tolist()
