"""What the command is asked. Imports no jax."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text to measure the perplexity of."""

    path: tuple[str, ...] = ()
    """Corpora in any format that training reads, encoded by the run's tokenizer (default: the run's own)."""
    split: Literal["validation", "train", "all"] | None = None
    """Which of their documents: held out as in training, the others, or all (default: validation of the run's own
    corpora, all of others)."""
    text_key: str | None = None
    """The field that holds the text in JSONL and Parquet (default: the run's)."""
    sequence_length: int | None = None
    """Tokens of a sequence (default: the run's)."""
    batch_size: int | None = None
    """Sequences, or prompts, that are computed together (default: the run's)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m jaxlm.evaluate: perplexity of text, tasks, or likeness to references, by a checkpoint of a run."""

    run: str = "runs/default"
    """The run folder that training wrote."""
    step: int | None = None
    """The checkpoint (default: the newest valid one)."""
    mesh: str = "dp1"
    """Devices by axis, as in training (one size may be -1); dp1 is one device, whatever is there."""
    documents: int | None = None
    """Measure only the first documents of the split; of each task, only the first (default: all)."""
    batches: int | None = None
    """Measure only the first batches of the split; eval.batches of them are what training measures (default: all)."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval instead, by name; * stands for anything (extra: lm-eval)."""
    include: str | None = None
    """Folder of further task files of lm-eval."""
    shots: int | None = None
    """Worked examples before each question of a task (default: the task's)."""
    chat: bool = False
    """Ask tasks and prompts in the chat template of the run's tokenizer."""
    references: str | None = None
    """JSONL file of prompts and references instead: BLEU, chrF and ROUGE of greedy text (extra: scores)."""
    max_tokens: int = 128
    """Most new tokens of a text that is compared with a reference."""
    stop: tuple[str, ...] = ()
    """Texts that end it, comma-separated (default: none)."""
    out: str | None = None
    """JSON file to write the result to."""
    data: Data = field(default_factory=Data)
