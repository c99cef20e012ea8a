"""A person at the keyboard and a model: message, reply, message, until the person has enough."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from jaxlm.config.errors import UserError
from jaxlm.generate.chat import Chat
from jaxlm.generate.decode import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import LARGEST, Sampling
from jaxlm.models.build import Params

Write = Callable[[str], None]

QUOTES = '"""'
HELP = f"Enter sends; {QUOTES} begins and ends a message of several lines. Ctrl-C stops a reply, Ctrl-D ends."


@dataclass(kw_only=True)
class Talk:
    """With a chat template the messages are a conversation; without one each is a text to continue or to answer."""

    generator: Generator
    params: Params
    prompts: Prompts
    """Their prefix is of a text; a template brings its own."""
    rule: Sampling
    max_new_tokens: int
    stop_ids: Sequence[int] = ()
    stops: Sequence[str] = ()
    chat: Chat | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    """Said so far, where there is a template."""
    turns: int = 0

    def answer(self, text: str, write: Write, note: Write) -> None:
        """Write the reply to `text`, as it comes; Ctrl-C ends it.

        Raises:
            UserError: the text is too long for the model, or its template refuses it.
        """
        if self.chat is None:
            self._reply(self.prompts.encode(text), write)
            return
        said, asked = list(self.messages), {"role": "user", "content": text}
        while True:
            try:
                prompt = self.prompts.tokenizer.encode_marked(self.chat.render([*said, asked]))
                reply = self._reply(prompt, write)
                break
            except UserError:
                if not said:
                    raise
            note("the model cannot take the whole conversation: it begins anew with this message")
            said = []
        self.messages = [*said, asked, {"role": "assistant", "content": reply}]

    def _reply(self, prompt: Sequence[int], write: Write) -> str:
        rule = replace(self.rule, seed=(self.rule.seed + self.turns) % (LARGEST + 1))
        stream, pieces = self.prompts.stream(prompt, self.stops), list[str]()

        def told(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        def heard(_: int, token: int) -> bool:
            told(stream.push(token))
            return stream.ended

        with contextlib.suppress(KeyboardInterrupt):
            self.generator(
                self.params,
                [prompt],
                max_new_tokens=self.max_new_tokens,
                rule=rule,
                eos_id=self.prompts.tokenizer.eos_id,
                stop_ids=self.stop_ids,
                start_id=self.prompts.start_id,
                on_token=heard,
            )
        told(stream.finish())
        write("\n")
        self.turns += 1
        return "".join(pieces)


def messages() -> Iterator[str]:
    """What the person types, until Ctrl-D; a message of several lines stands between lines of three quotes."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # which gives `input` its editing and its history
    while True:
        try:
            text = _line("> ")
            if text.lstrip().startswith(QUOTES):
                text = _quoted(text.lstrip()[len(QUOTES) :])
        except EOFError:
            return
        except KeyboardInterrupt:  # the line is dropped, as in a shell
            print(file=sys.stderr)
            continue
        if text.strip():
            yield text


def _quoted(line: str) -> str:
    """The rest of a message that three quotes began."""
    lines = [line]
    while QUOTES not in line:
        line = _line(". ")
        lines.append(line)
    return "\n".join(lines).partition(QUOTES)[0].strip("\n")


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")
