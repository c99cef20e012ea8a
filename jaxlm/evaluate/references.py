"""How much the text that a model writes is like references: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

Imported only where references are given.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.checkpoint.opened import Opened
from jaxlm.config.errors import UserError
from jaxlm.config.files import read_limited
from jaxlm.config.values import shown
from jaxlm.evaluate.options import Options
from jaxlm.evaluate.output import Say
from jaxlm.generate.chat import Chat
from jaxlm.generate.decode import Generator
from jaxlm.generate.prompts import Prompts
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.text import TextStream

try:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF
except ImportError as error:
    raise UserError(f"--references needs sacrebleu and rouge-score ({error}): pip install 'jaxlm[scores]'") from None

MAX_BYTES = 2**30
ROUGE = ("rouge1", "rouge2", "rougeL")


class Pair(NamedTuple):
    """One line of the file."""

    prompt: str
    reference: str


def measure(options: Options, run: Opened, rows: int, say: Say, progress: Any) -> dict[str, Any]:
    """The scores, how they were computed, and the texts.

    Raises:
        UserError: the file is not what it should be, a prompt is too long, or the run has no chat template.
    """
    assert options.references is not None
    pairs = read(Path(options.references).expanduser())[: options.documents]
    prompts = Prompts(model=run.config.model, tokenizer=run.tokenizer, prefix=run.conventions.prefix)
    ids = _prompts(options, run, prompts, [pair.prompt for pair in pairs])
    with progress("texts") as advance:
        texts = _texts(options, run, prompts, ids, rows, advance)
    return score(texts, [pair.reference for pair in pairs]) | {"texts": texts}


def score(texts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF of all texts together, from 0 to 100; the mean of each pair's ROUGE F, from 0 to 1."""
    found: dict[str, Any] = {"examples": len(texts)}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        found[name] = metric.corpus_score(list(texts), [list(references)]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    scorer = RougeScorer(list(ROUGE), use_stemmer=False)
    each = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return found | {name: sum(one[name].fmeasure for one in each) / len(each) for name in ROUGE}


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table of the result."""
    names = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    made: list[tuple[str, ...]] = [("score", "value", "of", "examples")]
    for key, name in names.items():
        made.append((name, f"{found[key]:.4f}", "1" if key in ROUGE else "100", str(found["examples"])))
    return made


def read(path: Path) -> list[Pair]:
    """The pairs of a JSONL file, an object with prompt and reference on each line.

    Raises:
        UserError: naming the file and the line.
    """
    name = f"--references={path}"
    raw = read_limited(path, MAX_BYTES, name, unreadable="name a JSONL file", too_large="split it")
    pairs = []
    for number, line in enumerate(raw.decode(errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
        except (ValueError, RecursionError):
            given = None
        found = [given.get(key) for key in Pair._fields] if isinstance(given, dict) else [None]
        if not all(isinstance(value, str) for value in found):
            raise UserError(f'{name} line {number} is {shown(line)}; write {{"prompt": "text", "reference": "text"}}')
        pairs.append(Pair(*map(str, found)))
    if not pairs:
        raise UserError(f'{name} is empty; write {{"prompt": "text", "reference": "text"}} on each line')
    return pairs


def _prompts(options: Options, run: Opened, prompts: Prompts, texts: Sequence[str]) -> list[list[int]]:
    if not options.chat:
        return [prompts.encode(text) for text in texts]
    chat = Chat(run.conventions.template, run.conventions.names)
    return [run.tokenizer.encode_marked(chat.render([{"role": "user", "content": text}])) for text in texts]


def _texts(
    options: Options, run: Opened, prompts: Prompts, ids: Sequence[list[int]], rows: int, advance: Any
) -> list[str]:
    """What the model writes, greedily, to each of `ids`."""
    generator, texts = Generator(run.model, run.runtime), [""] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        streams = [prompts.stream(ids[i], options.stop) for i in part]

        def heard(row: int, token: int, streams: list[TextStream] = streams, part: list[int] = part) -> bool:
            texts[part[row]] += streams[row].push(token)
            return streams[row].ended

        generator(
            run.params,
            [ids[i] for i in part],
            max_new_tokens=options.max_tokens,
            rule=Sampling(),
            eos_id=run.tokenizer.eos_id,
            stop_ids=run.conventions.stops,
            start_id=prompts.start_id,
            on_token=heard,
        )
        for i, stream in zip(part, streams, strict=True):
            texts[i] += stream.finish()
        advance(first + len(part), len(order))
    return texts
