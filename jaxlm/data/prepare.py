"""Raw corpus to token folder, in parallel and restartable, byte-identical whatever the number of workers.

One process reads documents in order and decides which go to which shard, by characters alone; workers turn chunks of
them into tokens; the results are written in order. Work happens in OUTPUT.partial: after a kill, the same command keeps
its finished shards. The folder gets its own name at the end, so that OUTPUT is whole or absent. Imports no jax, and
nothing that does: workers start fast.
"""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from jaxlm.config import faultpoints
from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.files import write_atomically
from jaxlm.data import sources, store
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.sources import Source
from jaxlm.data.tokenizer import Tokenizer

SHARD_CHARACTERS = 64 * 2**20
CHUNK_CHARACTERS = 2**20
BPE_CHARACTERS = 256 * 2**20
Encoded = tuple[np.ndarray, np.ndarray, int]
"""Tokens of a chunk with an eos after each document; uint64 [documents, 2] of length and hash; bytes of text."""


def prepare(
    inputs: Sequence[Source],
    output: str | Path,
    make_tokenizer: Callable[[], Tokenizer],
    settings: dict[str, Any],
    *,
    text_key: str = "text",
    workers: int = 1,
    shard_characters: int = SHARD_CHARACTERS,
) -> Path:
    """Write the token folder `output`; a folder already there that was made from the same request is kept.

    Args:
        make_tokenizer: called when no earlier, killed call has left its tokenizer.
        settings: what decides the tokenizer; a folder made with others is not reused.
        workers: processes; 1 works in this process (and the tokenizer's own threads).

    Raises:
        UserError: `output` holds something else, or an input is empty or damaged.
    """
    output = Path(output).expanduser()
    request = {**settings, "inputs_sha256": sources.fingerprint(inputs, times=False), "files": len(inputs)}
    request |= {"text_key": text_key, "shard_characters": shard_characters}
    staging = output.with_name(output.name + ".partial")
    lock = _lock(staging, output)
    with lock or nullcontext():
        if output.exists():
            if lock:  # another process finished between our look and our lock
                shutil.rmtree(staging)
            if store.is_token_folder(output) and store.TokenFolder(output).request == request:
                return output
            raise UserError(f"{output} exists and was not made by this command; remove it or name another --output")
        _start_or_resume(staging, {**request, "times": sources.fingerprint(inputs, times=True)})
        kept = len(list(staging.glob("shard-*.json")))
        megabytes = sum(source.size_bytes for source in inputs) / 1e6
        after = f", after {kept} finished shards" if kept else ""
        _say(f"preparing {output} from {megabytes:,.1f} MB of files{after}")
        tokenizer = _tokenizer(staging / "tokenizer", make_tokenizer)
        shards, notes = _write_shards(staging, inputs, tokenizer, text_key, workers, shard_characters)
        index = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "source_bytes")}
        index |= {"vocabulary": tokenizer.vocabulary_size, "eos_id": tokenizer.eos_id, "notes": notes}
        index |= {"dtype": store.dtype_for(tokenizer.vocabulary_size).str, "tokenizer_sha256": tokenizer.digest()}
        store.write_index(staging, index | {"request": request, "shards": shards})
        store.TokenFolder(staging).verify()
        for left in (*(f"{shard['name']}.json" for shard in shards), "request.json"):
            (staging / left).unlink()
        staging.rename(output)
        (output / "lock").unlink()  # only now: who still waits for it must find that it guards nothing
    return output


def train_bpe(inputs: Sequence[Source], text_key: str, vocabulary: int) -> Tokenizer:
    """A BPE of the corpus: of all of it, or of every n-th document where it is over BPE_CHARACTERS."""
    every = -(-sum(source.size_bytes for source in inputs) // BPE_CHARACTERS) or 1
    texts = sources.documents(inputs, text_key, Counter())
    return tokenizers.train_bpe((text for i, text in enumerate(texts) if i % every == 0), vocabulary)


def _lock(staging: Path, output: Path) -> io.TextIOBase | None:
    """The lock of `staging`, once it is ours, or None where `output` is there: one process at a time prepares a folder.
    The system frees the lock of a killed one."""
    while not output.exists():
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError):
            raise UserError(f"{output} cannot be made: {output.parent} is not a folder; name another") from None
        except FileNotFoundError as error:  # where nobody can make one, such as /proc
            raise UserError(f"{output} cannot be made: {error.strerror}: {error.filename}; name another") from None
        try:
            file = (staging / "lock").open("a")
        except FileNotFoundError:
            continue  # renamed under our hands
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that prepares {output}")
            fcntl.flock(file, fcntl.LOCK_EX)
        # The holder before us may have renamed the folder, lock and all: then this one guards nothing.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), (staging / "lock").stat()):
                return file
        file.close()
    return None


def _start_or_resume(staging: Path, request: dict[str, Any]) -> None:
    """Empty `staging` unless a killed call left it with the same request."""
    content = (json.dumps(request, sort_keys=True) + "\n").encode()
    marker = staging / "request.json"
    if marker.is_file() and marker.read_bytes() == content:
        return
    for path in staging.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    write_atomically(marker, content)


def _tokenizer(folder: Path, make: Callable[[], Tokenizer]) -> Tokenizer:
    if not folder.is_dir():
        temporary = folder.with_name("tokenizer.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        make().save(temporary)
        temporary.rename(folder)
    return tokenizers.load(folder)


def _write_shards(
    staging: Path, inputs: Sequence[Source], tokenizer: Tokenizer, text_key: str, workers: int, shard_characters: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    tally: Counter[str] = Counter()
    done = {path.stem: json.loads(path.read_bytes()) for path in staging.glob("shard-*.json")}
    shards: list[dict[str, Any]] = []
    writer: _ShardWriter | None = None
    total = None if any(source.compressed for source in inputs) else sum(source.size_bytes for source in inputs)
    with _pool(staging / "tokenizer", tokenizer, workers) as submit, _progress(total) as advance:
        chunks = _chunks(sources.documents(inputs, text_key, tally), shard_characters)
        for name, encoded in _in_order(chunks, submit, done, limit=4 * workers):
            if writer and writer.name != name:
                shards.append(writer.close())
                writer = None
            if encoded is None:
                if not shards or shards[-1]["name"] != name:
                    shards.append(done[name])
                    advance(done[name]["source_bytes"])
                continue
            writer = writer or _ShardWriter(staging, name, store.dtype_for(tokenizer.vocabulary_size))
            writer.write(*encoded)
            advance(encoded[2])
        if writer:
            shards.append(writer.close())
    if not shards:
        raise UserError(f"{inputs[0].path.parent if len(inputs) > 1 else inputs[0].path} holds no text")
    return shards, dict(tally)


def _chunks(documents: Iterator[str], shard_characters: int) -> Iterator[tuple[str, list[str]]]:
    """(shard, documents) in order; a shard starts once the one before has `shard_characters`."""
    shard = filled = size = 0
    chunk: list[str] = []
    for text in documents:
        chunk.append(text)
        size += len(text)
        full = filled + size >= shard_characters
        if full or size >= CHUNK_CHARACTERS:
            yield f"shard-{shard:05}", chunk
            shard, filled = (shard + 1, 0) if full else (shard, filled + size)
            chunk, size = [], 0
    if chunk:
        yield f"shard-{shard:05}", chunk


def _in_order(
    chunks: Iterator[tuple[str, list[str]]],
    submit: Callable[[list[str]], "Future[Encoded]"],
    done: dict[str, Any],
    limit: int,
) -> Iterator[tuple[str, Encoded | None]]:
    """Results in the order of `chunks`, with at most `limit` in flight (memory); None for those of finished shards."""
    waiting: deque[tuple[str, Future[Encoded] | None]] = deque()
    for name, texts in chunks:
        waiting.append((name, None if name in done else submit(texts)))
        if len(waiting) >= limit:
            name, future = waiting.popleft()
            yield name, future.result() if future else None
    for name, future in waiting:
        yield name, future.result() if future else None


@contextmanager
def _pool(folder: Path, tokenizer: Tokenizer, workers: int) -> Iterator[Callable[[list[str]], "Future[Encoded]"]]:
    if workers == 1:

        def submit(texts: list[str]) -> "Future[Encoded]":
            future: Future[Encoded] = Future()
            future.set_result(_encode(tokenizer, texts))
            return future

        yield submit
        return
    context = multiprocessing.get_context("spawn")  # fork would copy the tokenizer's and jax's threads half dead
    with ProcessPoolExecutor(workers, context, _start_worker, (str(folder),)) as executor:
        try:
            yield lambda texts: executor.submit(_work, texts)
        except BrokenProcessPool:
            cure = "run the same command again with fewer --workers; finished shards are kept"
            raise CommandError(f"a tokenizing process died (out of memory?); {cure}") from None
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise


_worker_tokenizer: Tokenizer


def _start_worker(folder: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us
    # A worker holds both ends of its queue, so the death of a killed parent would go unnoticed.
    threading.Thread(target=follow_parent, daemon=True).start()
    _worker_tokenizer = tokenizers.load(folder)


def _work(texts: list[str]) -> Encoded:
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    eos = np.array([tokenizer.eos_id], np.uint32)
    documents = [np.asarray(ids, np.uint32) for ids in tokenizer.encode_batch(texts)]
    utf8 = [text.encode() for text in texts]
    hashes = [hashlib.blake2b(text, digest_size=8, person=b"jaxlm split").digest() for text in utf8]
    table = np.empty((len(texts), 2), "<u8")
    table[:, 0] = [len(document) + 1 for document in documents]
    table[:, 1] = np.frombuffer(b"".join(hashes), "<u8")
    tokens = np.concatenate([part for document in documents for part in (document, eos)])
    return tokens, table, sum(map(len, utf8))


class _ShardWriter:
    """The two files of a shard; NAME.json appears when both are on the disk."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.name, self._folder, self._dtype = name, folder, dtype
        self._files = {kind: (folder / f"{name}.{kind}").open("wb") for kind in ("tokens", "documents")}
        self._sha = {kind: hashlib.sha256() for kind in self._files}
        self._counts = {"tokens": 0, "documents": 0, "source_bytes": 0}

    def write(self, tokens: np.ndarray, table: np.ndarray, source_bytes: int) -> None:
        ends = table.copy()
        ends[:, 0] = np.cumsum(table[:, 0]) + np.uint64(self._counts["tokens"])
        for kind, content in (("tokens", tokens.astype(self._dtype).tobytes()), ("documents", ends.tobytes())):
            self._files[kind].write(content)
            faultpoints.point("tokenization")
            self._sha[kind].update(content)
        for key, count in (("tokens", len(tokens)), ("documents", len(table)), ("source_bytes", source_bytes)):
            self._counts[key] += count

    def close(self) -> dict[str, Any]:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        entry = {"name": self.name, **self._counts}
        entry |= {f"{kind}_sha256": sha.hexdigest() for kind, sha in self._sha.items()}
        write_atomically(self._folder / f"{self.name}.json", json.dumps(entry))
        return entry


@contextmanager
def _progress(total_bytes: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, a line every ten seconds in a log."""
    if sys.stderr.isatty():
        columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=total_bytes)
            yield lambda count: bar.advance(task, count)
        return
    started = shown = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown > 10:
            shown = now
            of = f" of {total_bytes / 1e6:,.0f}" if total_bytes else ""
            rate = done / 1e6 / (now - started)
            _say(f"tokenized {done / 1e6:,.0f}{of} MB ({rate:.1f} MB/s)")

    yield advance


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
