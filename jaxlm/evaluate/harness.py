"""Tasks of lm-eval (EleutherAI's harness), by a run of ours. Imported only where tasks are asked for."""

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxlm.checkpoint.opened import Opened
from jaxlm.config.errors import UserError
from jaxlm.config.values import shown
from jaxlm.evaluate.likelihood import Scorer
from jaxlm.evaluate.options import Options
from jaxlm.evaluate.output import Say
from jaxlm.generate.chat import Chat
from jaxlm.generate.decode import Generator
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.text import TextStream

try:
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process that has JAX's threads
    import lm_eval
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(f"--tasks needs lm-eval ({error}): pip install 'jaxlm[lm-eval]'") from None

SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks")
"""What a task may ask of generation."""
RESAMPLES = 100
"""Of the examples, for the standard errors that have no formula."""


class RunLM(TemplateLM):
    """An opened run as lm-eval wants a model: the ids that its Hugging Face backend would make, batches of `rows`."""

    def __init__(self, run: Opened, rows: int, say: Say, progress: Any):
        super().__init__()
        self._run, self._rows, self._say, self._progress = run, rows, say, progress
        self._scorer = Scorer(run.model, run.runtime, rows)
        self._generator = Generator(run.model, run.runtime)

    @property
    def eot_token_id(self) -> int:
        return self._run.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._run.conventions.begun(self._run.tokenizer)

    @property
    def max_length(self) -> int:
        return self._run.conventions.max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """As a tokenizer of Hugging Face: names of special tokens are those tokens, and what its tokenizer.json says
        stands before a text does, unless the text begins with it already."""
        ids, prefix = self._run.tokenizer.encode_marked(string), list(self._run.conventions.prefix)
        if add_special_tokens is None:
            add_special_tokens = ids[: len(prefix)] != prefix
        return prefix + ids if add_special_tokens else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        cut = sum(len(context) + len(continuation) > longest for _, context, continuation in requests)
        if cut:
            self._say(f"{cut} texts of over {longest} tokens lose their beginning")
        pairs = [(context[-max(longest - len(end), 0) :], end) for _, context, end in requests]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with self._progress("likelihoods") as advance:
            for first in range(0, len(order), self._scorer.rows):
                part = order[first : first + self._scorer.rows]
                for i, result in zip(part, self._scorer(self._run.params, [pairs[i] for i in part]), strict=True):
                    found[i] = result
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], result)
                advance(first + len(part), len(order))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-probability, every token predicted once, in windows of `max_length`."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        found = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        return [sum(next(found)[0] for _ in each) for each in windows]

    def _windows(self, text: str) -> Iterator[tuple[None, list[int], list[int]]]:
        rolling = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return ((None, *utils.make_disjoint_window(window)) for window in rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context continued until one of its stops."""
        asked = [request.args for request in requests]
        prompts = [self.tok_encode(context) for context, _ in asked]
        order = sorted(range(len(asked)), key=lambda i: (str(asked[i][1]), -len(prompts[i])))
        found = [""] * len(asked)
        with self._progress("texts") as advance:
            done = 0
            for _, group in groupby(order, key=lambda i: str(asked[i][1])):
                rows = list(group)
                for first in range(0, len(rows), self._rows):
                    part = rows[first : first + self._rows]
                    for i, text in zip(part, self._texts([prompts[i] for i in part], asked[part[0]][1]), strict=True):
                        found[i] = text
                        self.cache_hook.add_partial("generate_until", asked[i], text)
                    done += len(part)
                    advance(done, len(order))
        return found

    def _texts(self, prompts: Sequence[list[int]], asked: dict[str, Any]) -> Iterator[str]:
        run = self._run
        settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, 256))
        unknown = sorted(settings.keys() - set(SAMPLING))
        if unknown:
            raise UserError(f"generation_kwargs of the task: {unknown[0]} is not known; known are {' '.join(SAMPLING)}")
        eos, count = run.conventions.names.get("eos_token"), settings["max_gen_toks"]
        until = handle_stop_sequences(settings["until"], eos=eos)
        room = self.max_length - count
        if room < 1:
            raise UserError(
                f"the task asks for {count} new tokens, which leave nothing of the model's {self.max_length} for a "
                "prompt; lower max_gen_toks in its generation_kwargs"
            )
        cut = sum(len(prompt) > room for prompt in prompts)
        if cut:
            self._say(f"{cut} prompts of over {room} tokens lose their beginning")
        prompts = [prompt[-room:] for prompt in prompts]
        streams = [TextStream(run.tokenizer.decode, prompt, until) for prompt in prompts]

        def ended(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].ended

        new = self._generator(
            run.params,
            prompts,
            max_new_tokens=count,
            rule=_rule(settings),
            eos_id=run.tokenizer.eos_id,
            stop_ids=run.conventions.stops,
            on_token=ended,
        )
        for ids in new:
            text = run.tokenizer.decode(ids)
            yield postprocess_generated_text(generation=text, stop=until, think_end_token=None)

    @property
    def tokenizer_name(self) -> str:
        return self._run.tokenizer.digest()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._run.conventions.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return _chat(self._run).render(chat_history, begin_reply=add_generation_prompt)


def _chat(run: Opened) -> Chat:
    return Chat(run.conventions.template, run.conventions.names)


def _rule(settings: dict[str, Any]) -> Sampling:
    if not settings.get("do_sample"):
        return Sampling()
    cuts = {name: settings[name] for name in ("temperature", "top_k", "top_p") if name in settings}
    return Sampling(**{"temperature": 1.0, **cuts})


class _Tasks(TaskManager):
    """What cannot be loaded is a mistake in a file or a name, or a download that failed: a line says which."""

    def load(self, *arguments: Any, **keywords: Any) -> Any:
        try:
            return super().load(*arguments, **keywords)
        except Exception as error:  # whatever a task file makes a library raise
            raise UserError(f"--tasks: lm-eval cannot load them: {type(error).__name__}: {str(error)[:300]}") from error


def _manager(options: Options) -> _Tasks:
    """Who knows the tasks: of the folder alone where that has all of them, as lm-eval takes long to read its own."""
    if options.include and not Path(options.include).expanduser().is_dir():
        raise UserError(f"--include={options.include}: no such folder")
    if options.include:
        manager = _Tasks(include_path=str(Path(options.include).expanduser()), include_defaults=False)
        if all(manager.match_tasks([name]) for name in options.tasks):
            return manager
    manager = _Tasks(include_path=options.include and str(Path(options.include).expanduser()))
    for name in options.tasks:
        if not manager.match_tasks([name]):
            near = get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)[0]
            raise UserError(
                f"--tasks={shown(name)[1:-1]}: no such task; nearest is {near} (--include names a folder of others)"
            )
    return manager


def measure(options: Options, run: Opened, rows: int, say: Say, progress: Any) -> dict[str, Any]:
    """What lm-eval says of the tasks: `results` by task and metric, `versions`, `samples`.

    Raises:
        UserError: a task that is not known or cannot be loaded; a chat template that the run has not.
    """
    manager = _manager(options)
    if options.chat:
        _chat(run)  # raises where there is none
    found = lm_eval.simple_evaluate(
        model=RunLM(run, rows, say, progress),
        tasks=manager.match_tasks(list(options.tasks)),
        num_fewshot=options.shots,
        limit=options.documents,
        task_manager=manager,
        apply_chat_template=options.chat,
        bootstrap_iters=RESAMPLES,
        log_samples=False,
    )
    assert found is not None  # it is for the first process, and there is one
    version = getattr(lm_eval, "__version__", None)
    return {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")} | {"lm_eval": version}


def rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A table of the results."""
    made: list[tuple[str, ...]] = [("task", "metric", "value", "standard error", "examples")]
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, int | float) or not kept or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{kept}")
            named = metric if kept == "none" else f"{metric} ({kept})"
            count = found["n-samples"].get(task, {}).get("effective", "")
            made.append((task, named, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "", str(count)))
    return made
