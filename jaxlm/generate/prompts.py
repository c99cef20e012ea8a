"""What a model reads of a text that somebody gives it, and where its own text begins."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from jaxlm.config.schema import ModelConfig
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.text import TextStream


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Of one model: a decoder goes on with a text, and an encoder-decoder reads it to its end and answers it."""

    model: ModelConfig
    tokenizer: Tokenizer
    prefix: Sequence[int] = ()
    """Ids before a text."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text. An encoder-decoder's ends as a document does, and names of sentinels in it are those."""
        if self.answers:
            return [*self.prefix, *self.tokenizer.encode_marked(text), self.tokenizer.eos_id]
        return [*self.prefix, *self.tokenizer.encode(text)]

    def stream(self, ids: Sequence[int], stops: Collection[str] = ()) -> TextStream:
        """What decodes the model's text, as it comes."""
        return TextStream(self.tokenizer.decode, () if self.answers else ids, stops)

    @property
    def answers(self) -> bool:
        """Whether the model's text is one of its own, rather than more of what it was given."""
        return self.model.architecture == "encoder_decoder"

    @property
    def start_id(self) -> int | None:
        """What an answer begins behind."""
        return self.tokenizer.start_id if self.answers else None
