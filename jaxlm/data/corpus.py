"""The corpora of a run, opened: raw ones prepared into the cache on first use, documents split for validation."""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64

from jaxlm.config.errors import UserError
from jaxlm.config.schema import DataConfig, Objective
from jaxlm.data import sources, spans, tokenizer
from jaxlm.data.prepare import prepare, train_bpe
from jaxlm.data.sources import Source
from jaxlm.data.store import TokenFolder, is_token_folder
from jaxlm.data.tokenizer import Tokenizer

SplitName = Literal["train", "validation"]
BLOCK_TOKENS = 2**22


class Split:
    """Some documents of a folder, in stored order, as one stream of tokens; each document ends with eos."""

    def __init__(self, folder: TokenFolder, documents: Int64[np.ndarray, "documents"]):
        ends = folder.document_ends
        starts = np.where(documents > 0, ends[documents - 1], 0)
        self.folder = folder
        self.documents = documents
        """Numbers of the documents in their folder."""
        self.lengths = ends[documents] - starts
        self.ends = np.cumsum(self.lengths)
        """End of each document in the stream."""
        self.tokens = int(self.ends[-1]) if len(documents) else 0
        # Neighbours in the folder are one run: a read is then a few slices, not one for each document.
        first = np.flatnonzero(np.diff(documents, prepend=-2) != 1)
        self._run_starts = (self.ends - self.lengths)[first]
        self._run_stops = np.append(self._run_starts[1:], self.tokens)
        self._run_offsets = starts[first] - self._run_starts

    def read(self, start: int, stop: int, out: Int32[np.ndarray, "n"]) -> None:
        """Copy tokens [start, stop) of the stream into `out`."""
        run = int(self._run_starts.searchsorted(start, "right")) - 1
        done = 0
        while done < stop - start:
            end = min(stop, int(self._run_stops[run]))
            offset = int(self._run_offsets[run])
            self.folder.read(start + done + offset, end + offset, out[done : end - start])
            done = end - start
            run += 1

    def file_of(self, token: int) -> Path:
        """The shard file that holds token number `token` of the stream."""
        run = int(self._run_starts.searchsorted(token, "right")) - 1
        return self.folder.file_of(token + int(self._run_offsets[run]))

    def counts(self, most: int | None = None) -> Int64[np.ndarray, "V"]:
        """How often each id stands in the stream, or in about `most` tokens of it, evenly spread blocks."""
        counts = np.zeros(self.folder.vocabulary, np.int64)
        blocks = range(0, self.tokens, BLOCK_TOKENS)
        every = 1 if most is None else -(-self.tokens // max(most, BLOCK_TOKENS))
        for start in blocks[::every]:
            out = np.empty(min(BLOCK_TOKENS, self.tokens - start), np.int32)
            self.read(start, start + len(out), out)
            counts += np.bincount(out, minlength=len(counts))
        return counts


@dataclass(frozen=True)
class Corpus:
    """One entry of data.path."""

    name: str
    weight: float | None
    """Its share of data.weights, which are by size where None."""
    folder: TokenFolder
    train: Split
    validation: Split

    def split(self, name: SplitName) -> Split:
        return self.train if name == "train" else self.validation


class Corpora:
    """All corpora of a run; they share one tokenizer, which has the ids that `objective` needs besides the text's."""

    def __init__(
        self, corpora: Sequence[Corpus], tokenizer: Tokenizer, objective: Objective = "next", notes: Sequence[str] = ()
    ):
        self.corpora, self.notes = tuple(corpora), tuple(notes)
        self.tokenizer, self.objective = tokenizer, objective

    def tokens(self, split: SplitName) -> int:
        return sum(corpus.split(split).tokens for corpus in self.corpora)

    def documents(self, split: SplitName) -> int:
        return sum(len(corpus.split(split).documents) for corpus in self.corpora)

    def digest(self) -> str:
        """SHA-256 that is equal for equal tokens in equal documents, in the same order: what a position counts in."""
        return hashlib.sha256(json.dumps([corpus.folder.checksums for corpus in self.corpora]).encode()).hexdigest()

    def unigram_entropy(self, split: SplitName = "train", most: int = 50_000_000) -> float:
        """Entropy of the token frequencies in nats a token, corpora weighted as in training: the loss of the best model
        that sees no context. Reads about `most` tokens of each corpus, so that a large one does not delay the start."""
        shares = np.zeros(self.tokenizer.vocabulary_size)
        for corpus in self.corpora:
            part = corpus.split(split)
            weight = part.tokens if corpus.weight is None else corpus.weight
            counts = part.counts(most)
            shares[: len(counts)] += weight * counts / max(counts.sum(), 1)  # what stands for hidden text is in none
        return entropy(shares)

    def describe(self) -> str:
        """A line for each corpus: its documents and tokens in each split; and one for each key that had no effect."""
        lines = [*self.notes]
        for corpus in self.corpora:
            parts = (f"{name} {len(s.documents):,} documents, {s.tokens:,} tokens" for name, s in _splits(corpus))
            lines.append(f"{corpus.name}: {'; '.join(parts)}")
        return "\n".join(lines)


def open_corpora(config: DataConfig, objective: Objective | None = None) -> Corpora:
    """Open the corpora of `config`; raw ones are prepared into config.cache on first use.

    Args:
        objective: what is to be predicted (default: words that config.noise hid, or else the next token).

    Raises:
        UserError: a path, a shard or a tokenizer is missing or damaged, tokenizers differ, or theirs has too few ids
            for hidden spans.
    """
    if config.weights and len(config.weights) != len(config.path):
        counts = f"{len(config.weights)} numbers and --data.path {len(config.path)} corpora"
        raise UserError(f"--data.weights has {counts}; give one for each, or none")
    folders = _prepare_raw(config)
    first = folders[0]
    for folder in folders[1:]:
        if folder.tokenizer_sha256 != first.tokenizer_sha256:
            cure = "prepare both with one --tokenizer (--data.path)"
            raise UserError(f"{folder.path} and {first.path} have different tokenizers; {cure}")
    names = [Path(path).name or path for path in config.path]
    names = [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names)]
    weights: Sequence[float | None] = config.weights or [None] * len(folders)
    corpora = [_split(*entry, config.validation) for entry in zip(names, weights, folders, strict=True)]
    objective = objective or ("mask" if config.noise else "next")
    return Corpora(corpora, _hiding(first.tokenizer, config, objective), objective, list(_without_effect(config)))


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of the distribution that `counts` is proportional to."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def make_tokenizer(spec: str, vocabulary: int, inputs: Sequence[Source], text_key: str) -> Tokenizer:
    """The tokenizer that data.tokenizer names, trained on `inputs` where it is bpe."""
    if spec == "bpe":
        return train_bpe(inputs, text_key, vocabulary)
    return tokenizer.Bytes() if spec == "bytes" else tokenizer.load(spec)


def tokenizer_settings(spec: str, vocabulary: int) -> dict[str, Any]:
    """What decides the tokenizer besides the text: settings for `prepare`."""
    if spec == "bpe":
        return {"tokenizer": "bpe", "vocabulary": vocabulary}
    return {"tokenizer": make_tokenizer(spec, vocabulary, (), "").digest()}


def _hiding(tokenizer: Tokenizer, config: DataConfig, objective: Objective) -> Tokenizer:
    """`tokenizer` with ids for what is hidden: as many as the configuration says, so that every host has the same."""
    if objective == "spans":
        return tokenizer.with_sentinels(spans.sentinels(config.sequence_length, config.noise))
    return tokenizer.with_mask() if objective == "mask" else tokenizer


def _prepare_raw(config: DataConfig) -> list[TokenFolder]:
    opened = {path: TokenFolder(path) for path in config.path if is_token_folder(path)}
    raw = {path: sources.find(path) for path in config.path if path not in opened}
    inputs = [source for path in raw for source in raw[path]]
    trained = functools.cache(lambda: make_tokenizer(config.tokenizer, config.vocabulary, inputs, config.text_key))
    make: Callable[[], Tokenizer] = trained
    settings = tokenizer_settings(config.tokenizer, config.vocabulary)
    for path, folder in opened.items():
        if config.tokenizer != "bpe" and folder.tokenizer_sha256 != settings["tokenizer"]:
            cure = "leave --data.tokenizer out or prepare the corpus again"
            raise UserError(f"{path} was not prepared with --data.tokenizer={config.tokenizer}; {cure}")
    if opened:
        folder = next(iter(opened.values()))
        make, settings = (lambda: folder.tokenizer), {"tokenizer": folder.tokenizer_sha256}
    elif config.tokenizer == "bpe":
        settings["trained_on"] = sources.fingerprint(inputs, times=True)
    cache = Path(config.cache).expanduser()
    for path, found in raw.items():
        key = json.dumps([sources.fingerprint(found, times=True), settings, config.text_key], sort_keys=True)
        name = "".join(c if c.isalnum() else "-" for c in Path(path).name)[:40] or "corpus"
        output = cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        opened[path] = TokenFolder(prepare(found, output, make, settings, text_key=config.text_key))
    return [opened[path] for path in config.path]


def _without_effect(config: DataConfig) -> Iterator[str]:
    """A line for each key that is set and that these corpora leave without effect: a recipe may name others."""
    defaults, prepared = DataConfig(), [path for path in config.path if is_token_folder(path)]
    if prepared and config.tokenizer == "bpe" and config.vocabulary != defaults.vocabulary:
        yield f"--data.vocabulary={config.vocabulary} has no effect: {prepared[0]} brings its tokenizer"
    if config.text_key != defaults.text_key:
        raw = (source for path in config.path if path not in prepared for source in sources.find(path))
        if all(source.format == "text" for source in raw):
            yield f"--data.text-key={config.text_key} has no effect: no JSONL or Parquet is read here"


def _split(name: str, weight: float | None, folder: TokenFolder, validation: float) -> Corpus:
    """Documents are held out by the hash of their text: the same ones whatever is added, and equal ones together."""
    hashes = folder.document_hashes
    held_out = hashes < np.uint64(min(math.ldexp(validation, 64), 2**64 - 1))
    if validation and (held_out.all() or not held_out.any()):
        # Chance left one side empty: hold out the lowest hash, unless that is everything and nothing can be split.
        held_out = (hashes == hashes.min()) & (hashes.min() != hashes.max())
    chosen = {True: np.flatnonzero(held_out), False: np.flatnonzero(~held_out)}
    return Corpus(name, weight, folder, Split(folder, chosen[False]), Split(folder, chosen[True]))


def _splits(corpus: Corpus) -> tuple[tuple[str, Split], ...]:
    return ("train", corpus.train), ("validation", corpus.validation)
