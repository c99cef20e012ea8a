"""Rows by position, and device batches made ahead of the step.

Position counts the samples consumed and is the loader's whole state: row i of a batch is sample position + i, whatever
the batch size, the number of hosts and the mesh. B batch, T sequence length, W window = T + 1; where spans are hidden S
is the sequence length, and T that of the targets.
"""

import bisect
import functools
import hashlib
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxlm.config.errors import UserError
from jaxlm.config.schema import DataConfig
from jaxlm.data.corpus import Corpora, SplitName
from jaxlm.data.noise import Noise
from jaxlm.data.packing import Packing
from jaxlm.data.spans import Spans, target_length

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
"""tokens, targets, segment_ids, positions: int32 [B, T]; loss_mask: float32 [B, T]. A target is the next token, or with
masked words the token itself, which counts where it is hidden. With hidden spans these are the decoder's, T is
`target_length`, and the encoder's are source_tokens, source_segment_ids, source_positions: int32 [B, S]."""

NAMES = ("tokens", "targets", "segment_ids", "positions", "loss_mask")
SOURCE_NAMES = ("source_tokens", "source_segment_ids", "source_positions")

PREFETCH = 2
"""Batches made ahead of the step."""


class Loader:
    """The samples of a split in the order of training. Holds no state: every method is a pure function."""

    def __init__(self, corpora: Corpora, config: DataConfig, split: SplitName = "train"):
        self.config, self.split, self.corpora = config, split, corpora
        _check_length(corpora, split, config)
        used = [corpus for corpus in corpora.corpora if corpus.split(split).tokens > 1]
        self._names = [corpus.name for corpus in used]
        self._packings = [Packing(corpus.split(split), config.sequence_length, config.packing) for corpus in used]
        self._first_rows = np.cumsum([0, *(packing.rows for packing in self._packings)]).tolist()
        self.samples_per_epoch: int = self._first_rows[-1]
        """Rows of all corpora together; an epoch has each once (with data.weights: as many, in those shares)."""
        # Held-out order is not the seed's business: runs with other seeds are evaluated on the same samples.
        seed = config.seed if split == "train" else 0
        self._weights, self._seed = [c.weight for c in used if c.weight is not None], seed
        hiding, length = (corpora.tokenizer, config.noise, f"{split} {seed}"), config.sequence_length
        self._noise = Noise(*hiding) if corpora.objective == "mask" else None
        self._spans = Spans(*hiding) if corpora.objective == "spans" else None
        width = target_length(length, config.noise) if self._spans else length
        self.widths = dict.fromkeys(SOURCE_NAMES if self._spans else (), length) | dict.fromkeys(NAMES, width)
        """Columns of the arrays of a batch, by name."""

    def rows(self, position: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the batch whose first sample is number `position`."""
        length = self.config.sequence_length
        tokens_BW = np.full((stop - start, length + 1), self.corpora.tokenizer.eos_id, np.int32)
        starts_BW = np.zeros((stop - start, length + 1), bool)
        written_B1 = np.zeros((stop - start, 1), np.int64)
        for i, row in enumerate(self._rows(position + start, stop - start)):
            corpus = bisect.bisect_right(self._first_rows, row) - 1
            packing = self._packings[corpus]
            written_B1[i] = packing.fill(row - self._first_rows[corpus], tokens_BW[i], starts_BW[i])
        index_W = np.arange(length + 1, dtype=np.int32)
        if not self.config.document_mask:
            starts_BW[:] = index_W == 0
        segments_BW = np.where(index_W < written_B1, np.cumsum(starts_BW, axis=1, dtype=np.int32), 0)
        begins_BW = np.maximum.accumulate(np.where(starts_BW | (index_W == written_B1), index_W, 0), axis=1)
        tokens, targets, segments = tokens_BW[:, :-1].copy(), tokens_BW[:, 1:].copy(), segments_BW[:, :-1].copy()
        counted_BT = (segments_BW[:, 1:] == segments_BW[:, :-1]) & (segments_BW[:, 1:] > 0)
        samples = range(position + start, position + stop)
        if self._spans:
            return self._spans.hide(tokens, segments, samples)
        if self._noise:
            targets = tokens
            tokens, counted_BT = self._noise.hide(targets, segments, samples)
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": segments,
            "positions": (index_W - begins_BW)[:, :-1].copy(),
            "loss_mask": counted_BT.astype(np.float32),
        }

    def sample_ids(self, position: int, count: int) -> list[str]:
        """A name for each sample, equal for equal samples: its corpus and the row of its packing."""
        rows = self._rows(position, count)
        corpora = [bisect.bisect_right(self._first_rows, row) - 1 for row in rows]
        return [f"{self._names[c]}:{row - self._first_rows[c]}" for c, row in zip(corpora, rows, strict=True)]

    @functools.cached_property
    def _order(self) -> "grain.MapDataset":
        return _order(self._first_rows, self._weights, self._seed)

    def _rows(self, position: int, count: int) -> list[int]:
        return [int(self._order[i]) for i in range(position, position + count)]


class Batches(Iterator[tuple[int, dict[str, jax.Array], float]]):
    """What `batches` returns; `close` it (or use it in a `with`) to stop its thread."""

    def __init__(self, make: Callable[[int], dict[str, jax.Array]], positions: range, prefetch: int):
        self._make, self._positions, self._after = make, iter(positions), positions.step
        self._thread: _Thread | None = None
        if prefetch:
            self._thread = _Thread(make, positions, prefetch)
            self._thread.start()
            # The thread knows nothing of this object, so that forgetting it stops the thread too.
            self._stop = weakref.finalize(self, self._thread.stop)

    def __next__(self) -> tuple[int, dict[str, jax.Array], float]:
        began = time.perf_counter()
        if self._thread is None:
            position = next(self._positions)
            batch = self._make(position)
        else:
            item = self._thread.get()
            if item is None or isinstance(item, BaseException):
                self.close()
                raise item or StopIteration
            position, batch = item
        return position + self._after, batch, time.perf_counter() - began

    def close(self) -> None:
        """Stop the thread and wait for it; nothing comes after."""
        self._positions = iter(())
        if self._thread is not None:
            self._stop()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def batches(
    loader: Loader,
    position: int,
    batch_size: int,
    sharding_for: Callable[[str], Sharding],
    prefetch: int = PREFETCH,
    stop: int | None = None,
) -> Batches:
    """Global batches on the device, `prefetch` of them made ahead by a thread (0: made when asked for).

    Args:
        position: of the first sample.
        sharding_for: array name -> sharding of it, [B, `Loader.widths`]; this process reads only the rows its devices
            hold.
        stop: no batch begins at or after this position.

    Yields:
        (position after the batch, arrays by name, seconds waited for it). Errors of the thread are raised here.
    """
    positions = range(position, 2**62 if stop is None else stop, batch_size)
    return Batches(lambda first: batch_at(loader, first, batch_size, sharding_for), positions, prefetch)


def batch_at(
    loader: Loader, position: int, batch_size: int, sharding_for: Callable[[str], Sharding]
) -> dict[str, jax.Array]:
    """The global batch whose first sample is number `position`, made now; arguments as those of `batches`."""
    read = functools.cache(lambda start, stop: loader.rows(position, start, stop))

    def part(name: str, index: tuple[slice, slice]) -> np.ndarray:
        start, stop, _ = index[0].indices(batch_size)
        return read(start, stop)[name][:, index[1]]

    return {
        name: jax.make_array_from_callback((batch_size, width), sharding_for(name), functools.partial(part, name))
        for name, width in loader.widths.items()
    }


def _check_length(corpora: Corpora, split: SplitName, config: DataConfig) -> None:
    tokens, documents = corpora.tokens(split), corpora.documents(split)
    if not documents:
        one = "they are one document (or copies of it), which cannot be split; give more documents or --eval.every=0"
        cure = one if config.validation else f"--data.validation={config.validation:g} holds nothing out; raise it"
        raise UserError(f"no {split} split of {', '.join(config.path)}: {cure}")
    if tokens <= config.sequence_length:
        raise UserError(
            f"--data.sequence-length={config.sequence_length} is too long for the {split} split, which has {tokens} "
            f"tokens in {documents} documents; use at most {max(tokens - 1, 1)}, or give more text"
        )


class _Thread(threading.Thread):
    """Makes batches while at most `ahead` of them wait to be taken."""

    def __init__(self, make: Callable[[int], dict[str, jax.Array]], positions: range, ahead: int):
        super().__init__(name="jaxlm-data", daemon=True)
        self._make, self._positions = make, positions
        self._room, self._closed = threading.Semaphore(ahead), False
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            for position in self._positions:
                self._room.acquire()
                if self._closed:
                    break
                self._ready.put((position, self._make(position)))
            self._ready.put(None)
        except BaseException as error:  # whatever it is, it is the consumer's, who would wait for ever otherwise
            self._ready.put(error)

    def get(self) -> Any:
        """(position, batch), an error, or None at the end."""
        item = None if self._closed else self._ready.get()
        self._room.release()
        return item

    def stop(self) -> None:
        self._closed = True
        self._room.release()
        self.join()


class _Shuffled:
    """Every row of `rows`, epoch after epoch, each in its own order; like Grain's shuffle, for few rows.

    Grain's walks through a block of 2^16 whatever the number of rows: milliseconds a sample where there are few.
    """

    def __init__(self, rows: range, seed: int):
        self._rows = rows
        # RandomState is the generator whose stream NumPy promises never to change.
        self._epoch = functools.lru_cache(8)(lambda n: np.random.RandomState(_seed(seed, n)).permutation(len(rows)))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, i = divmod(index, len(self._rows))
        return self._rows[self._epoch(epoch)[i]]


def _order(first_rows: list[int], weights: Sequence[float], seed: int) -> "grain.MapDataset":
    """Sample number -> row, counted through all corpora. Each epoch has its own order."""
    import grain

    ranges = [range(*pair) for pair in zip(first_rows[:-1], first_rows[1:], strict=True)]
    if not weights:
        ranges = [range(first_rows[0], first_rows[-1])]
    datasets = [
        grain.MapDataset.source(_Shuffled(rows, _seed(seed, i)))
        if len(rows) < 2**16
        else grain.MapDataset.range(rows.start, rows.stop).shuffle(seed=_seed(seed, i)).repeat()
        for i, rows in enumerate(ranges)
    ]
    return grain.MapDataset.mix(datasets, weights=weights) if len(datasets) > 1 else datasets[0]


def _seed(seed: int, of: int) -> int:
    """32 bits for corpus or epoch number `of`. Hashed, because Grain counts epochs on from its seed: epoch 1 of seed 0
    must not be epoch 0 of seed 1, nor two corpora run in step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {of}".encode(), digest_size=4).digest(), "little")
