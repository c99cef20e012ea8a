"""A token folder: what `python -m jaxlm.data prepare` writes and training reads.

    index.json                what is inside, with the SHA-256 of every shard file
    tokenizer/                the tokenizer, as `tokenizer.load` reads it
    shard-00000.tokens        token ids, little-endian uint16 (uint32 from a vocabulary of 65537), eos after documents
    shard-00000.documents     a row for each document: uint64 end of it in the shard, uint64 hash of its text

Nothing in a folder is trusted: names, sizes and counts are checked when it is opened, contents by `verify`.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited, write_atomically
from jaxlm.data import tokenizer as tokenizers

INDEX = "index.json"
FORMAT = "jaxlm-tokens-1"
MAX_INDEX_BYTES = 64 * 2**20
COUNTS = ("vocabulary", "eos_id", "documents", "tokens", "source_bytes")
CURE = "prepare the corpus again"


@dataclass(frozen=True)
class Shard:
    """One pair of shard files, as index.json describes it."""

    name: str
    tokens: int
    documents: int
    source_bytes: int
    tokens_sha256: str
    documents_sha256: str


class TokenFolder:
    """An opened token folder. Documents and tokens are numbered through all shards."""

    document_ends: Int64[np.ndarray, "documents"]
    """End of each document, in tokens from the start of the folder; each includes its eos."""
    document_hashes: UInt64[np.ndarray, "documents"]
    """Hash of each document's text."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        index = _read_index(self.path / INDEX)
        self.vocabulary, self.eos_id, self.documents, self.tokens, self.source_bytes = (index[key] for key in COUNTS)
        self.request: dict[str, Any] = index["request"]
        self.notes: dict[str, int] = index["notes"]
        self.dtype = np.dtype(index["dtype"])
        self.tokenizer_sha256: str = index["tokenizer_sha256"]
        self.shards = tuple(_shard(self.path, entry) for entry in index["shards"])
        for total in ("tokens", "documents", "source_bytes"):
            if sum(getattr(shard, total) for shard in self.shards) != getattr(self, total):
                raise UserError(f"{self.path / INDEX}: the {total} of its shards do not add up; {CURE}")
        self._maps = [self._map(shard) for shard in self.shards]
        self._shard_starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._read_documents()

    @property
    def checksums(self) -> list[tuple[str, str]]:
        """SHA-256 of each shard's tokens and documents, as its index has them."""
        return [(shard.tokens_sha256, shard.documents_sha256) for shard in self.shards]

    @cached_property
    def tokenizer(self) -> tokenizers.Tokenizer:
        found = tokenizers.load(self.path / "tokenizer")
        if found.digest() != self.tokenizer_sha256:
            raise UserError(f"{self.path / 'tokenizer'} is not the tokenizer of its index.json; {CURE}")
        if (found.vocabulary_size, found.eos_id) != (self.vocabulary, self.eos_id):
            raise UserError(
                f"{self.path / INDEX} says vocabulary {self.vocabulary} and end of document {self.eos_id}, "
                f"its tokenizer {found.vocabulary_size} and {found.eos_id}; {CURE}"
            )
        return found

    def read(self, start: int, stop: int, out: Int32[np.ndarray, "n"]) -> None:
        """Copy tokens [start, stop) into `out`."""
        shard = int(self._shard_starts.searchsorted(start, "right")) - 1
        done = 0
        while done < stop - start:
            first = start + done - self._shard_starts[shard]
            piece = self._maps[shard][first : first + stop - start - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1

    def file_of(self, token: int) -> Path:
        """The shard file that holds token number `token`."""
        shard = int(self._shard_starts.searchsorted(token, "right")) - 1
        return self.path / f"{self.shards[shard].name}.tokens"

    def verify(self, announce: Callable[[str], None] = lambda line: None) -> None:
        """Read every file: checksums and ids; raise UserError naming the first file that is damaged."""
        announce(f"tokenizer: {self.tokenizer.vocabulary_size:,} tokens")  # loading it compares it with index.json
        for shard, ids in zip(self.shards, self._maps, strict=True):
            for kind, expected in (("tokens", shard.tokens_sha256), ("documents", shard.documents_sha256)):
                path = self.path / f"{shard.name}.{kind}"
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != expected:
                    raise UserError(f"{path}: SHA-256 {found[:12]}... is not {expected[:12]}... of index.json; {CURE}")
            self.check_ids(int(ids.max()), self.path / f"{shard.name}.tokens")
            announce(f"{shard.name}: {shard.tokens:,} tokens in {shard.documents:,} documents")

    def check_ids(self, largest: int, path: Path) -> None:
        if largest >= self.vocabulary:
            raise UserError(f"{path} holds token {largest}, outside its vocabulary of {self.vocabulary}; {CURE}")

    def _map(self, shard: Shard) -> np.ndarray:
        path = _checked(self.path, shard, "tokens", shard.tokens * self.dtype.itemsize)
        return np.asarray(np.memmap(path, self.dtype, "r", shape=(shard.tokens,)))

    def _read_documents(self) -> None:
        ends, hashes = [], []
        for shard, start in zip(self.shards, self._shard_starts[:-1], strict=True):
            path = _checked(self.path, shard, "documents", shard.documents * 16)
            table = np.fromfile(path, "<u8").reshape(-1, 2)
            lengths = np.diff(table[:, 0].astype(np.int64), prepend=0)
            if lengths.min() < 1 or table[-1, 0] != shard.tokens:
                raise UserError(f"{path} does not cut its {shard.tokens} tokens into documents; {CURE}")
            ends.append(table[:, 0].astype(np.int64) + start)
            hashes.append(table[:, 1].astype(np.uint64))
        self.document_ends, self.document_hashes = np.concatenate(ends), np.concatenate(hashes)


def is_token_folder(path: str | Path) -> bool:
    """Whether `path` is, or once was, a token folder: a damaged one must not pass for a folder of source files."""
    path = Path(path).expanduser()
    return (path / "tokenizer" / tokenizers.INFO).is_file() or any(path.glob("shard-*.tokens"))


def dtype_for(vocabulary: int) -> np.dtype:
    """The smallest type of token files that holds every id."""
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json so that it is there whole or not at all."""
    content = json.dumps({"format": FORMAT, **index}, indent=1, sort_keys=True) + "\n"
    write_atomically(folder / INDEX, content)


def _checked(folder: Path, shard: Shard, kind: str, expected_bytes: int) -> Path:
    """The path of a shard's file, which exists inside the folder with the size that index.json says."""
    path = folder / f"{shard.name}.{kind}"
    if not path.is_file():
        raise UserError(f"{path} is missing; {CURE}")
    if path.resolve().parent != folder.resolve():
        raise UserError(f"{path} is a link out of its folder; copy the file itself there")
    size = path.stat().st_size
    if size != expected_bytes:
        what = "empty" if size == 0 else "truncated" if size < expected_bytes else "too long"
        raise UserError(f"{path} is {what}: {size} bytes where index.json says {expected_bytes}; {CURE}")
    return path


def _read_index(path: Path) -> dict[str, Any]:
    unreadable = "name a folder made by jaxlm.data prepare"
    content = read_limited(path, MAX_INDEX_BYTES, str(path), unreadable=unreadable, too_large=CURE)
    try:
        index = json.loads(content)
    except (ValueError, RecursionError):
        index = None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path} is not the index of a token folder of this version ({FORMAT}); {CURE}")
    wrong = [key for key in COUNTS if not _is_count(index.get(key))]
    wrong += [key for key in ("request", "notes") if not isinstance(index.get(key), dict)]
    wrong += [key for key in ("tokenizer_sha256",) if not isinstance(index.get(key), str)]
    wrong += [] if isinstance(index.get("shards"), list) and index["shards"] else ["shards"]
    if not wrong and index.get("dtype") != dtype_for(index["vocabulary"]).str:
        wrong = ["dtype"]
    if wrong:
        raise UserError(f"{path}: {wrong[0]}={str(index.get(wrong[0]))[:80]} cannot be; {CURE}")
    return index


def _shard(folder: Path, entry: Any) -> Shard:
    kinds = {"name": str, "tokens": int, "documents": int, "source_bytes": int}
    kinds |= {"tokens_sha256": str, "documents_sha256": str}
    good = isinstance(entry, dict) and entry.keys() == kinds.keys()
    good = good and all(type(entry[key]) is kind for key, kind in kinds.items())
    good = good and all(_is_count(entry[key]) for key in ("tokens", "documents", "source_bytes"))
    # The name becomes a path: nothing but our own pattern, so that an index cannot point out of its folder.
    if not good or not re.fullmatch(r"shard-\d{5,9}", entry["name"]) or not 0 < entry["documents"] <= entry["tokens"]:
        raise UserError(f"{folder / INDEX}: shard {str(entry)[:80]} cannot be; {CURE}")
    return Shard(**entry)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53
