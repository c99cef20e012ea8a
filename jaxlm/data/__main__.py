"""`python -m jaxlm.data`: make token folders, check them, look into them."""

import math
import os
import sys
from dataclasses import dataclass

import numpy as np

from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.load import load
from jaxlm.data import sources
from jaxlm.data.corpus import Split, entropy, make_tokenizer, tokenizer_settings
from jaxlm.data.prepare import SHARD_CHARACTERS, prepare
from jaxlm.data.store import TokenFolder

USAGE = """python -m jaxlm.data prepare --input=PATH --output=FOLDER   text, JSONL, Parquet, source code to token shards
python -m jaxlm.data verify FOLDER                        check every shard against its SHA-256
python -m jaxlm.data show FOLDER                          counts, unigram entropy, the first documents
Each takes --help."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """python -m jaxlm.data prepare: a raw corpus to a token folder. After a kill, run the same command again."""

    input: str
    """stdlib, a text, JSONL (also .gz and .zst) or Parquet file, or a folder of such files and of source code."""
    output: str
    """The folder to make; until it is whole it is called OUTPUT.partial."""
    tokenizer: str = "bpe"
    """bytes, bpe (trained on the input), or a path: tokenizer.json, a .tiktoken file, a token folder's tokenizer/."""
    vocabulary: int = 2048
    """Tokens of a bpe tokenizer trained on the input."""
    text_key: str = "text"
    """The field that holds the text in JSONL and Parquet."""
    workers: int = 0
    """Processes; the result is the same for any number (0: one for each core)."""
    shard_characters: int = SHARD_CHARACTERS
    """Characters of text after which a new shard begins."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """python -m jaxlm.data show FOLDER: what a token folder holds."""

    documents: int = 2
    """Documents to print the beginning of."""
    characters: int = 400
    """Characters to print of each."""


def main(argv: list[str]) -> None:
    verbs = {"prepare": _prepare, "show": _show, "verify": _verify}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] not in verbs:
        raise UserError(f"unknown command {argv[0][:40]!r}; use prepare, verify or show (python -m jaxlm.data --help)")
    else:
        verbs[argv[0]](argv[1:])


def _prepare(argv: list[str]) -> None:
    options, _ = load(Prepare, argv)
    if options.workers < 0 or options.shard_characters < 1:
        raise UserError(f"--workers={options.workers} --shard-characters={options.shard_characters}: too small")
    inputs = sources.find(options.input)
    folder = prepare(
        inputs,
        options.output,
        lambda: make_tokenizer(options.tokenizer, options.vocabulary, inputs, options.text_key),
        tokenizer_settings(options.tokenizer, options.vocabulary),
        text_key=options.text_key,
        workers=options.workers or _cores(),
        shard_characters=options.shard_characters,
    )
    print(_summary(TokenFolder(folder)))


def _verify(argv: list[str]) -> None:
    folder, rest = _folder(argv, "verify")
    if rest:
        raise UserError(f"unexpected argument {rest[0][:80]!r}; verify takes only the folder")
    folder.verify(print)
    print(f"{folder.path}: whole")


def _show(argv: list[str]) -> None:
    folder, rest = _folder(argv, "show")
    options, _ = load(Show, rest)
    print(_summary(folder))
    everything = Split(folder, np.arange(folder.documents))
    nats = entropy(everything.counts())
    bits = nats / math.log(2) * folder.tokens / folder.source_bytes
    print(f"unigram entropy: {nats:.3f} nats/token = {bits:.3f} bits/byte of source text")
    for document in range(min(options.documents, folder.documents)):
        length = int(everything.lengths[document])
        end = int(everything.ends[document])
        tokens = np.empty(min(length, options.characters), np.int32)  # a token is a character or more, or a part of one
        everything.read(end - length, end - length + len(tokens), tokens)
        print(f"--- document {document}: {length:,} tokens")
        print(folder.tokenizer.decode(tokens.tolist())[: options.characters])


def _folder(argv: list[str], verb: str) -> tuple[TokenFolder, list[str]]:
    if argv and argv[0] in ("-h", "--help"):
        if verb == "show":
            load(Show, argv)
        print(USAGE)
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name the token folder: python -m jaxlm.data {verb} FOLDER")
    return TokenFolder(argv[0]), argv[1:]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _summary(folder: TokenFolder) -> str:
    name = type(folder.tokenizer).__name__
    lines = [
        f"{folder.path}: {folder.documents:,} documents, {folder.tokens:,} tokens; shards: {len(folder.shards)}",
        f"tokenizer: {name}, vocabulary {folder.vocabulary:,}, stored as {folder.dtype.name}",
        f"source: {folder.source_bytes:,} bytes, {folder.source_bytes / folder.tokens:.2f} bytes/token",
    ]
    return "\n".join(lines + [f"note: {count:,} {what}" for what, count in folder.notes.items()])


if __name__ == "__main__":
    run(main)
