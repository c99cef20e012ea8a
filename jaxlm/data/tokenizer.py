"""Text to token ids and back: bytes, Hugging Face `tokenizers` (trained here or given), and tiktoken rank files.

Every tokenizer encodes text as text: the name of a special token inside a document is spelled out, never obeyed, so
the end-of-document id stands nowhere but at ends of documents.
"""

import base64
import binascii
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited
from jaxlm.data.tokenizer_base import Ids, Tokenizer

INFO = "tokenizer_info.json"
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "[SEP]")
"""Names by which a tokenizer.json may call the end of a document, the likeliest first."""
MASK = "<|mask|>"
MASKS = (MASK, "[MASK]", "<mask>")
"""Names by which it may call what stands in the place of a hidden token."""
SENTINEL, THEIR_SENTINEL = "<|span_{}|>", "<extra_id_{}>"
"""Names of what stands in the places of hidden spans, by number: those added here, and T5's."""
START = "<pad>"
"""Name of what the input of T5's decoder begins with."""
MAX_FILE_BYTES = 256 * 2**20

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)
O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
TIKTOKEN = {
    50256: (GPT2_PATTERN, 50256),
    50280: (GPT2_PATTERN, 50256),
    100256: (CL100K_PATTERN, 100257),
    128000: (CL100K_PATTERN, 128001),
    199998: (O200K_PATTERN, 199999),
}
"""Ranks in the published files (gpt2, p50k, cl100k, Llama 3, o200k) -> split pattern, end-of-document id: a rank file
holds neither. Any other file gets the cl100k pattern and the first free id."""


def _is_byte(token: str) -> bool:
    return token.startswith("<0x") and len(token) == 6


def _behind(own: int, mask: bool, sentinels: int) -> tuple[int | None, tuple[int, ...]]:
    """Ids of the mask and the sentinels of a tokenizer that has `own` other ids."""
    return own if mask else None, tuple(range(own + mask, own + mask + sentinels))


def _added(tokenizer: Tokenizer) -> dict[str, object]:
    """What `files` says of the ids that stand behind a tokenizer's own."""
    mask = {} if tokenizer.mask_id is None else {"mask": True}
    return mask | ({"sentinels": len(tokenizer.sentinel_ids)} if tokenizer.sentinel_ids else {})


def _numbered(vocabulary: Mapping[str, int], name: str) -> tuple[int, ...]:
    """Ids of the tokens that are called `name` with 0, 1, … in it, as far as there are such."""
    names = itertools.takewhile(vocabulary.__contains__, map(name.format, itertools.count()))
    return tuple(vocabulary[each] for each in names)


class Bytes(Tokenizer):
    """UTF-8 bytes, 256 for the end of a document, and, where asked for, the mask for a hidden byte and sentinels for
    hidden spans."""

    vocabulary_size = 257
    eos_id = 256

    def __init__(self, mask: bool = False, sentinels: int = 0):
        self.mask_id, self.sentinel_ids = _behind(self.vocabulary_size, mask, sentinels)
        self.vocabulary_size += mask + sentinels

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0] * (self.vocabulary_size - 256), np.int32)

    def texts(self) -> list[str]:
        special = [""] * (self.vocabulary_size - 256)
        return [bytes([i]).decode(errors="replace") for i in range(256)] + special

    def with_mask(self) -> Tokenizer:
        return Bytes(True, len(self.sentinel_ids))

    def with_sentinels(self, count: int) -> Tokenizer:
        return Bytes(self.mask_id is not None, max(count, len(self.sentinel_ids)))

    def files(self) -> dict[str, bytes]:
        return {INFO: _json({"kind": "bytes"} | _added(self))}


class HuggingFace(Tokenizer):
    """A tokenizer.json."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos: str):
        tokenizer.no_truncation()  # a tokenizer.json may carry limits of the model it came from, which would drop text
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._eos = eos
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if eos not in vocabulary:
            raise UserError(f"tokenizer.json has no token {eos!r}, named as its end of a document")
        self.eos_id = vocabulary[eos]
        self.mask_id = next((vocabulary[name] for name in MASKS if name in vocabulary), None)
        self.sentinel_ids = _numbered(vocabulary, THEIR_SENTINEL) or _numbered(vocabulary, SENTINEL)
        # WordPiece (BERT) marks tokens that go on with a word; all others begin one.
        self._continuing: str | None = getattr(tokenizer.model, "continuing_subword_prefix", None) or None
        self.vocabulary_size = max(vocabulary.values()) + 1

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        return [e.ids for e in self._reader.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    @property
    def start_id(self) -> int:
        pad = self.id_of(START)
        return self.eos_id if pad is None else pad

    @property
    def prefix(self) -> tuple[int, ...]:
        encoded = self._tokenizer.encode("a", add_special_tokens=True)
        special = zip(encoded.ids, encoded.special_tokens_mask, strict=True)
        return tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], special))

    def encode_framed(self, texts: Sequence[str]) -> Sequence[Ids]:
        return [e.ids for e in self._reader.encode_batch_fast(list(texts), add_special_tokens=True)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        byte_level = self._byte_level
        lengths = np.zeros(self.vocabulary_size, np.int32)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # Each character of a byte-level token stands for one byte.
            lengths[i] = len(token) if byte_level else 1 if _is_byte(token) else len(self._text(token).encode())
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if added.special else len(added.content.encode())
        return lengths

    def texts(self) -> list[str]:
        texts, byte_level = [""] * self.vocabulary_size, self._byte_level
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            texts[i] = self._tokenizer.decode([i], skip_special_tokens=False) if byte_level else self._text(token)
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            texts[i] = "" if added.special else added.content
        return texts

    def joints(self) -> tuple[np.ndarray, np.ndarray]:
        if self._continuing is None:
            return super().joints()
        before = np.zeros(self.vocabulary_size, bool)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            before[i] = token.startswith(self._continuing)
        return before, self.byte_lengths() > 0

    @functools.cached_property
    def _reader(self) -> tokenizers.Tokenizer:
        """What reads documents: a Unigram (T5) has special tokens among the pieces that it looks for in any text."""
        if not isinstance(self._tokenizer.model, tokenizers.models.Unigram):
            return self._tokenizer
        content = json.loads(self._tokenizer.to_str())
        pieces, added = content["model"]["vocab"], content["added_tokens"]
        special = {token["content"] for token in added if token["special"]} & {piece for piece, _ in pieces}
        content["added_tokens"] = [token for token in added if token["content"] not in special]
        # Each keeps its place, for ids are places, and gets a name that is not in any text.
        content["model"]["vocab"] = [
            [f"\uffff{i}\uffff" if piece in special else piece, score] for i, (piece, score) in enumerate(pieces)
        ]
        reader = tokenizers.Tokenizer.from_str(json.dumps(content))
        reader.encode_special_tokens = True
        return reader

    @property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])

    def _text(self, token: str) -> str:
        """What a token stands for that is not of bytes; SentencePiece writes a space in its own way."""
        return "\ufffd" if _is_byte(token) else token.removeprefix(self._continuing or "").replace("\u2581", " ")

    def with_mask(self) -> Tokenizer:
        if self.mask_id is not None:
            return self
        other = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        other.add_special_tokens([MASK])
        return HuggingFace(other, self._eos)

    def with_sentinels(self, count: int) -> Tokenizer:
        own = len(self.sentinel_ids)
        if count <= own:
            return self
        if self.id_of(THEIR_SENTINEL.format(0)) is not None:
            raise UserError(
                f"the tokenizer has {own} ids for hidden spans ({THEIR_SENTINEL.format(own - 1)} is the last), and a "
                f"row may hide {count}; use a --data.sequence-length of at most {100 * own // count}% of this one"
            )
        other = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        other.add_special_tokens([SENTINEL.format(i) for i in range(own, count)])
        return HuggingFace(other, self._eos)

    def files(self) -> dict[str, bytes]:
        info = {"kind": "huggingface", "eos": self._eos}
        return {INFO: _json(info), "tokenizer.json": self._tokenizer.to_str().encode()}


class Tiktoken(Tokenizer):
    """A tiktoken rank file: a line for each token, base64 of its bytes and its rank."""

    def __init__(self, content: bytes, name: str, mask: bool = False, sentinels: int = 0):
        try:
            import tiktoken
        except ImportError:
            raise UserError(f"{name} needs tiktoken: pip install 'jaxlm[tiktoken]'") from None
        try:
            lines = [line.split() for line in content.splitlines() if line.strip()]
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        except (ValueError, binascii.Error):
            raise UserError(f"{name} is not a tiktoken file: each line is base64 and a number") from None
        if any(bytes([b]) not in ranks for b in range(256)) or sorted(set(ranks.values()))[0] < 0:
            raise UserError(f"{name} is not a whole tiktoken file: some of the 256 bytes have no rank")
        if len(set(ranks.values())) != len(lines):
            raise UserError(f"{name} is not a tiktoken file: a token or a rank stands twice")
        self._content, self._ranks = content, ranks
        taken = set(ranks.values())
        free = next(i for i in range(len(ranks) + 1) if i not in taken)
        pattern, self.eos_id = TIKTOKEN.get(len(ranks), (CL100K_PATTERN, free))
        own = max(*taken, self.eos_id) + 1
        self.mask_id, self.sentinel_ids = _behind(own, mask, sentinels)
        self.vocabulary_size = own + mask + sentinels
        self._name = name
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: self.eos_id}
        )

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        return self._encoding.encode_ordinary_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes.get(int(i), b"") for i in ids).decode(errors="replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([len(self._bytes.get(i, b"")) for i in range(self.vocabulary_size)], np.int32)

    def texts(self) -> list[str]:
        return [self._bytes.get(i, b"").decode(errors="replace") for i in range(self.vocabulary_size)]

    def with_mask(self) -> Tokenizer:
        return Tiktoken(self._content, self._name, True, len(self.sentinel_ids))

    def with_sentinels(self, count: int) -> Tokenizer:
        sentinels = max(count, len(self.sentinel_ids))
        return Tiktoken(self._content, self._name, self.mask_id is not None, sentinels)

    def files(self) -> dict[str, bytes]:
        return {INFO: _json({"kind": "tiktoken"} | _added(self)), "tokenizer.tiktoken": self._content}


def train_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al. 2016; the byte alphabet of GPT-2) of at most `vocabulary` tokens; the same
    texts give the same tokenizer, whatever the number of threads."""
    if vocabulary < 257:
        raise UserError(f"vocabulary={vocabulary} is under the 257 of bytes and the end of a document; raise it")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return HuggingFace(tokenizer, END)


def load(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder written by `save`, or of a tokenizer.json or tiktoken file (or a folder with one)."""
    path = Path(path).expanduser()
    if path.is_dir():
        if (path / INFO).is_file():
            return _load_saved(path)
        found = [path / name for name in ("tokenizer.json", "tokenizer.tiktoken") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no tokenizer.json or tokenizer.tiktoken (--data.tokenizer)")
        path = found[0]
    content = _read(path)
    if path.suffix == ".json":
        return _hugging_face(path, content, eos=None)
    if path.suffix == ".tiktoken" or (path.suffix == ".model" and content[:64].split(b" ")[0].isascii()):
        return Tiktoken(content, path.name)
    raise UserError(f"tokenizer {path}: use bytes, bpe, or the path of a tokenizer.json or .tiktoken file")


def _load_saved(folder: Path) -> Tokenizer:
    info = _parse(folder / INFO, _read(folder / INFO))
    kind, mask, sentinels = info.get("kind"), info.get("mask") is True, info.get("sentinels", 0)
    if not isinstance(sentinels, int):
        raise UserError(f"{folder / INFO} is damaged: its sentinels are no number; prepare the corpus again")
    if kind == "bytes":
        return Bytes(mask, sentinels)
    if kind == "huggingface" and isinstance(info.get("eos"), str):
        return _hugging_face(folder / "tokenizer.json", _read(folder / "tokenizer.json"), eos=info["eos"])
    if kind == "tiktoken":
        content = _read(folder / "tokenizer.tiktoken")
        return Tiktoken(content, "tokenizer.tiktoken", mask, sentinels)
    raise UserError(f"{folder / INFO} describes no tokenizer this version knows; prepare the corpus again")


def _hugging_face(path: Path, content: bytes, eos: str | None) -> Tokenizer:
    if not isinstance(_parse(path, content).get("model"), dict):
        raise UserError(f"{path} is not a tokenizer.json of Hugging Face tokenizers: it has no model")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing more particular
        raise UserError(f"{path} is no tokenizer.json that tokenizers reads: {str(error)[:200]}") from None
    if eos is None:
        beside = path.with_name("tokenizer_config.json")
        eos = _parse(beside, _read(beside)).get("eos_token") if beside.is_file() else None
        eos = eos.get("content") if isinstance(eos, Mapping) else eos
        eos = eos if isinstance(eos, str) else None
        eos = eos or next((end for end in ENDS if tokenizer.token_to_id(end) is not None), None)
    if eos is None:
        raise UserError(f"{path} has no end-of-document token; name it in a tokenizer_config.json beside (eos_token)")
    return HuggingFace(tokenizer, eos)


def _read(path: Path) -> bytes:
    cure = "use bytes, bpe, or the path of a tokenizer.json or .tiktoken file"
    return read_limited(path, MAX_FILE_BYTES, f"tokenizer file {path}", unreadable=cure, too_large="is it a tokenizer?")


def _parse(path: Path, content: bytes) -> dict:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; it is damaged or not a tokenizer")
    return found


def _json(content: Mapping[str, object]) -> bytes:
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
