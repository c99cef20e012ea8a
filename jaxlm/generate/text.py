"""From tokens back to text while they arrive, and where that text goes."""

import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited

UNFINISHED = "\ufffd"
"""How bytes that are not (yet) a character decode."""
CONTROL = {code: UNFINISHED for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""A model may write escape sequences, which a terminal would obey."""
MAX_PROMPT_BYTES = 2**24


class TextStream:
    """Decodes one row token by token: what `push` and `finish` return adds up to the decoded row.

    A character may take several tokens, and a tokenizer may treat the first token of a text differently; so each piece
    is what the decoding of a few tokens gains from the newest ones, held back while it ends inside a character, or
    in what may become one of `stops`. The text ends before the first of those.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Collection[str] = ()):
        self._decode, self._ids, self._stops = decode, list(prompt), tuple(filter(None, stops))
        self._start, self._told, self._held = max(len(self._ids) - 8, 0), len(self._ids), ""
        self.ended = False
        """One of `stops` has come."""

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        piece = self._piece()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return self._before_stops(piece)

    def finish(self) -> str:
        """The text held back."""
        piece = self._before_stops(self._piece()) + self._held
        self._start, self._told, self._held = len(self._ids), len(self._ids), ""
        return piece

    def _before_stops(self, piece: str) -> str:
        """What of the text held back and `piece` stands before any stop, now or later."""
        if self.ended:
            return ""
        text, self._held = self._held + piece, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        begun = (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        kept = len(text) - max(begun, default=0)
        self._held = text[kept:]
        return text[:kept]

    def _piece(self) -> str:
        before = self._decode(self._ids[self._start : self._told])
        return self._decode(self._ids[self._start :])[len(before) :]


class Output:
    """Writes rows of text to stdout: one alone as it comes, several when they are done, of which a terminal sees the
    first one as it comes."""

    def __init__(self, prompts: Sequence[str], streams: Sequence[TextStream]):
        self._texts = list(prompts)
        self._streams, self._live = streams, len(streams) == 1 or sys.stdout.isatty()
        self._shown = False

    def push(self, row: int, token: int) -> bool:
        """`Generator`'s on_token."""
        stream = self._streams[row]
        piece = stream.push(token)
        if row == 0 and self._live:
            written(piece if self._shown else self._head(0) + self._texts[0] + piece)
            self._shown = True
        self._texts[row] += piece
        return stream.ended

    def finish(self) -> None:
        """Whatever was not written yet; every row ends its line."""
        for row, stream in enumerate(self._streams):
            rest = stream.finish()
            written(f"{rest}\n" if row == 0 and self._shown else f"{self._head(row)}{self._texts[row]}{rest}\n")

    def _head(self, row: int) -> str:
        return f"--- {row + 1} of {len(self._streams)} ---\n" if len(self._streams) > 1 else ""


def written(text: str) -> None:
    """Write to stdout at once; a terminal gets no escape sequences."""
    sys.stdout.write(text.translate(CONTROL) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; in a .jsonl file each line is a JSON string, which may hold line ends.

    Raises:
        UserError: naming the file and the line.
    """
    name = f"--prompt-file={path}"
    raw = read_limited(path, MAX_PROMPT_BYTES, name, unreadable="name a file of prompts", too_large="split it")
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise UserError(f"--prompt-file={path} is not UTF-8 text") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--prompt-file={path} holds no prompt; write one a line")
    return [_parse(path, number, line) if path.suffix == ".jsonl" else line.rstrip("\r") for number, line in lines]


def _parse(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)
    except (ValueError, RecursionError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'--prompt-file={path} line {number} is not a JSON string; write "text"')
    return prompt
