"""Raw corpora: which files they are, and their documents in a fixed order. Formats go by name:

*.jsonl and *.ndjson (a document a line), *.parquet (a document a row), anything else is text (a document a file); text
and JSONL may end in .gz or .zst.
"""

import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxlm.config.errors import UserError

STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
SEPARATOR = "<|endoftext|>"
LONGEST = 16 * 2**20
ALONE_LONGEST = 64 * 2**10


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    path: Path
    name: str
    """Path inside the corpus, with / between the parts."""
    size_bytes: int
    mtime_ns: int
    alone: bool
    """It is the only file of its corpus."""

    @property
    def compressed(self) -> bool:
        return self.name.endswith((".gz", ".zst", ".parquet"))

    @property
    def format(self) -> str:
        """jsonl, parquet or text."""
        name = self.name.removesuffix(".gz").removesuffix(".zst")
        return "parquet" if name.endswith(".parquet") else "jsonl" if name.endswith((".jsonl", ".ndjson")) else "text"


def find(spec: str) -> list[Source]:
    """The files of the corpus `spec`: "stdlib", a file, or a folder (without hidden files), sorted by name."""
    root = Path(sysconfig.get_path("stdlib")) if spec == "stdlib" else Path(spec).expanduser()
    if root.is_file():
        return [_source(root, root.name, alone=True)]
    if not root.is_dir():
        raise UserError(f"corpus {spec!r} does not exist; name a file, a folder or stdlib (--data.path)")
    found = []
    for folder, folders, files in os.walk(root):
        skipped = STDLIB_SKIPPED if spec == "stdlib" else ()
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__" and f not in skipped]
        found += [Path(folder, file) for file in files if not file.startswith(".")]
    if spec == "stdlib":
        found = [path for path in found if path.suffix == ".py"]
    names = sorted((path.relative_to(root).as_posix(), path) for path in found if path.is_file())
    if not names:
        raise UserError(f"corpus {spec!r} has no files in {root}; name a folder with text (--data.path)")
    return [_source(path, name, alone=len(names) == 1) for name, path in names]


def fingerprint(sources: Sequence[Source], times: bool) -> str:
    """SHA-256 of the names and sizes of the files; `times` adds where they are and when they changed."""
    sha = hashlib.sha256()
    for source in sources:
        where = (str(source.path.resolve()), source.mtime_ns) if times else ()
        sha.update(json.dumps([source.name, source.size_bytes, *where]).encode())
    return sha.hexdigest()


def documents(sources: Sequence[Source], text_key: str, tally: Counter[str]) -> Iterator[str]:
    """The non-empty documents of `sources` in order; `tally` counts what was skipped or mended, and why."""
    for source in sources:
        for text in _documents(source, text_key, tally):
            if "\ufffd" in text:
                tally["documents with U+FFFD (bytes that are not UTF-8 become it)"] += 1
            if text:
                yield text
            else:
                tally["empty documents skipped"] += 1


def _source(path: Path, name: str, alone: bool) -> Source:
    stat = path.stat()
    return Source(path, name, stat.st_size, stat.st_mtime_ns, alone)


def _documents(source: Source, text_key: str, tally: Counter[str]) -> Iterator[str]:
    if source.format == "parquet":
        yield from _parquet(source, text_key)
        return
    with source.path.open("rb") as file:
        try:
            stream = _decompressed(source, file)
            if source.format == "jsonl":
                yield from _jsonl(source, io.TextIOWrapper(stream, "utf-8", errors="replace", newline="\n"), text_key)
            elif b"\0" in stream.peek(4096)[:4096]:
                if source.alone:
                    raise UserError(f"{source.path} is binary; use text, JSONL or Parquet (named .parquet)")
                tally["binary files skipped"] += 1
            else:
                yield from _text(source, io.TextIOWrapper(stream, "utf-8", errors="replace", newline=""))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{source.path} is truncated or damaged ({error}); fetch it again") from None


def _text(source: Source, file: io.TextIOBase) -> Iterator[str]:
    """One document a file, but: SEPARATOR ends one in a .txt file, and a very long one (the only file of a corpus: a
    long one, for else nothing could be held out) is cut at a line end, because documents are held in memory whole."""
    longest = ALONE_LONGEST if source.alone else LONGEST
    separated = ".txt" in Path(source.name).suffixes
    rest = ""
    while piece := file.read(longest):
        rest += piece
        if separated and SEPARATOR in rest:
            *whole, rest = rest.split(SEPARATOR)
            yield from whole
        while len(rest) > longest:
            cut = rest.rfind("\n", 0, longest) + 1 or longest
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def _jsonl(source: Source, file: io.TextIOBase, text_key: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{source.path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            keys = ", ".join(map(str, row))[:80] if isinstance(row, dict) else "none"
            raise UserError(f"{where} has no text in field {text_key!r} (it has: {keys}); name the field (text_key)")
        yield _mended(row[text_key])


def _parquet(source: Source, text_key: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{source.path} needs pyarrow: pip install 'jaxlm[parquet]'") from None
    try:
        with parquet.ParquetFile(source.path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names or not _holds_text(schema.field(text_key).type, pyarrow):
                keys = ", ".join(schema.names)[:80]
                raise UserError(f"{source.path} has no text column {text_key!r} (it has: {keys}); name it (text_key)")
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source.path} is not a whole Parquet file ({reason}); fetch it again") from None


def _holds_text(kind, pyarrow) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _mended(text: str) -> str:
    """`text` without lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _decompressed(source: Source, file: io.BufferedReader) -> io.BufferedReader:
    if source.name.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if source.name.endswith(".zst"):
        return io.BufferedReader(_Zstd(source, file), 2**20)
    return file


class _Zstd(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's own reader, a truncated file is an error, not an end."""

    def __init__(self, source: Source, file: io.BufferedReader):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{source.path} needs zstandard: pip install 'jaxlm[zstd]'") from None
        self._file, self._left, self._ready = file, b"", memoryview(b"")
        self._new_frame = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError
        self._frame: zstandard.ZstdDecompressionObj | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            self._left = self._left or self._file.read(2**17)
            if not self._left and self._frame is None:
                return 0
            if not self._left:
                raise EOFError("it ends inside a zstd frame")
            frame = self._frame or self._new_frame()
            try:
                self._ready = memoryview(frame.decompress(self._left))
            except self._error as error:
                raise EOFError(str(error)) from None
            self._left, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
