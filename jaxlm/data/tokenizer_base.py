"""What the rest of jaxlm knows of a tokenizer, whatever its kind."""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jaxlm.config.files import write_atomically

Ids = Sequence[int] | np.ndarray


class Tokenizer(ABC):
    """Text to token ids and back."""

    vocabulary_size: int
    """Ids run from 0 to vocabulary_size - 1; some may stand for nothing."""
    eos_id: int
    """Ends a document."""
    mask_id: int | None = None
    """Stands in the place of a hidden token."""
    sentinel_ids: tuple[int, ...] = ()
    """Stand in the places of hidden spans, the first of them for the first span."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> Sequence[Ids]:
        """Ids of each text, without special tokens; uses the machine's cores where the library can."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special ids and ids that stand for nothing add nothing."""

    @abstractmethod
    def byte_lengths(self) -> np.ndarray:
        """int32 [V]: bytes of text each id stands for, 0 for special ids."""

    @abstractmethod
    def texts(self) -> list[str]:
        """What each id stands for: a space before it is there, bytes that are no character are U+FFFD, and special ids
        stand for nothing."""

    @abstractmethod
    def with_mask(self) -> "Tokenizer":
        """This tokenizer, with one id more for hidden tokens where it has none."""

    @abstractmethod
    def with_sentinels(self, count: int) -> "Tokenizer":
        """This tokenizer, with ids more for hidden spans where it has fewer than `count`.

        Raises:
            UserError: it has some of its makers' own, and fewer: a model that learned them knows no others.
        """

    def joints(self) -> tuple[np.ndarray, np.ndarray]:
        """bool [V] twice: whether a word may go on from before an id into it, and from it into what follows.

        Two neighbours are of one word where both are so on the side of the other. A word is of letters, digits and
        underscores: spaces and punctuation stand for themselves.
        """
        texts = self.texts()
        ends = ([text[:1] for text in texts], [text[-1:] for text in texts])
        before, behind = (np.array([bool(c) and _in_word(c) for c in side]) for side in ends)
        return before, behind

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """File name -> content, everything `load` needs."""

    def encode_framed(self, texts: Sequence[str]) -> Sequence[Ids]:
        """As `encode_batch`, with the special tokens around that this tokenizer has for a text of its own (BERT's [CLS]
        and [SEP])."""
        return self.encode_batch(texts)

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.encode_batch([text])[0]]

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but the names of special tokens are those tokens: for what a chat template wrote, not for
        documents."""
        return self.encode(text)

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name, if there is such a token."""
        return None

    @property
    def start_id(self) -> int:
        """What the input of a decoder behind an encoder begins with."""
        return self.eos_id

    @property
    def prefix(self) -> tuple[int, ...]:
        """Special ids that the tokenizer's makers put before a text; our documents begin without."""
        return ()

    def save(self, folder: str | Path) -> None:
        """Write its files, each whole or not at all; those that are there already stay as they are."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            path = Path(folder) / name
            if not path.is_file() or path.read_bytes() != content:
                write_atomically(path, content)

    def digest(self) -> str:
        """SHA-256 that is equal for equal tokenizers."""
        sha = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            sha.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return sha.hexdigest()


def _in_word(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN" or character in ("_", "\ufffd")
