"""The training loop: config -> mesh -> data -> model -> state -> step -> checkpoints and metrics."""

import gc
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.checkpoint.store import Store
from jaxlm.config import faultpoints
from jaxlm.config.checks import check, profile_window
from jaxlm.config.errors import Diverged, Preempted
from jaxlm.config.files import write_atomically
from jaxlm.config.load import check_run_folder, dump
from jaxlm.config.mesh_spec import parse
from jaxlm.config.schema import RunConfig
from jaxlm.data.corpus import Corpora, open_corpora
from jaxlm.data.loader import Loader, batches
from jaxlm.metrics import goodput, heartbeat
from jaxlm.metrics.events import Events
from jaxlm.metrics.goodput import Goodput
from jaxlm.metrics.jsonl import read
from jaxlm.metrics.progress import Progress
from jaxlm.metrics.trackers import Tracker
from jaxlm.parallel import mesh as meshes
from jaxlm.train import forensics, resume
from jaxlm.train.assemble import Assembly, assemble
from jaxlm.train.beside import beside, import_later_needs
from jaxlm.train.evaluate import Evaluator
from jaxlm.train.faults import StopRequest, alone, not_waiting_for_others
from jaxlm.train.meter import Meter
from jaxlm.train.profiler import Profiler
from jaxlm.train.replicas import Differing, Replicas
from jaxlm.train.sample import write_sample
from jaxlm.train.saving import Saver
from jaxlm.train.state import State
from jaxlm.train.step import Batch, Metrics
from jaxlm.train.watch import BadNumbers, Watch

Say = Callable[[str], None]
Step = Callable[[State, Batch], tuple[State, Metrics]]


def run(config: RunConfig) -> None:
    """Train as `config` says, continuing what its run folder holds, and leave the result there.

    Raises:
        UserError: the configuration cannot run. Diverged, NoValidCheckpoint, Preempted: see `config.errors`.
    """
    leader = Progress(config.train.steps)
    mesh, spec = meshes.build(
        parse(config.mesh), simulate=config.simulate, distributed=config.distributed, announce=leader.say
    )
    check(config, spec, leader.say)
    folder = check_run_folder(config, leader.say)
    with alone(folder, leader.say), not_waiting_for_others():
        try:
            _run(config, mesh, str(spec), folder)
        finally:
            gc.unfreeze()


def _run(config: RunConfig, mesh: Mesh, spec: str, folder: Path) -> None:
    first = jax.process_index() == 0
    corpora = open_corpora(config.data, config.objective)
    resume.check_tokenizer(folder, corpora.tokenizer)
    loader = Loader(corpora, config.data)
    say = Progress(config.train.steps, show=first).say
    say(corpora.describe())
    entropy = corpora.unigram_entropy()
    say(f"unigram entropy {entropy:.3f} nats a token: the loss of guessing by frequency alone")
    assembly = assemble(config, mesh, corpora.tokenizer.vocabulary_size, say)
    with Store(folder / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every, say) as store:
        step = resume.choose(store, config.resume, say)
        resume.check_data(store, step, corpora)
        heartbeat.phase("compile")
        # XLA compiles the step on one core while the state is made, or read, on another. Python's part comes first: it
        # holds the others up.
        compiling = None if (step or 0) >= config.train.steps else beside(assembly.compile, say, assembly.lower())
        beside(import_later_needs)
        start = resume.begin(assembly, store, step)
        gc.freeze()  # a collection that looks at all that training needs would hold a step up for a third of a second
        gc.enable()
        events = Events(folder, write=first)
        tracker = Tracker(
            folder,
            step=start.step,
            tensorboard=config.metrics.tensorboard,
            wandb=config.metrics.wandb,
            config=asdict(config),
            write=first,
        )
        with tracker, events, Progress(config.train.steps, start=start.step, show=first) as progress:
            Run(assembly, corpora, loader, store, tracker, events, progress, folder, spec).train(start, compiling)


class Run:
    """One run under way: what the loop needs at every step, and what it counts."""

    def __init__(
        self,
        assembly: Assembly,
        corpora: Corpora,
        loader: Loader,
        store: Store,
        tracker: Tracker,
        events: Events,
        progress: Progress,
        folder: Path,
        mesh: str,
    ):
        self.assembly, self.config, self.corpora, self.loader = assembly, assembly.config, corpora, loader
        self.store, self.tracker, self.events, self.progress = store, tracker, events, progress
        self.folder, self.mesh = folder, mesh
        self.meter, self.clock = Meter(assembly), Goodput()
        self.furthest = max((line["step"] for line in read(folder / "metrics.superseded.jsonl")), default=0)
        self.position = self.seen_tokens = 0
        self.profiler = Profiler(folder, self.config.profile.steps, progress.say)
        waits = self.config.checkpoint.on_failure == "wait"
        self.saver = Saver(store, Replicas(assembly.plan.abstract), events, progress.say, waits)
        self.watch, self.rewinds, self.rewound_to = Watch(self.config.train.max_skipped), 0, -1
        self.evaluate: Evaluator | None = None
        if self.config.eval.every and not corpora.documents("validation"):
            progress.say("no evaluation: a corpus of one document (or copies of it) leaves nothing to hold out")
        elif self.config.eval.every:
            held_out = Loader(corpora, self.config.data, "validation")
            self.evaluate = Evaluator(assembly, held_out)

    def train(self, start: resume.Start, compiling: Future[Any] | None) -> None:
        """From `start` to the last step, then the final save, evaluation and sample.

        `compiling` will be the compiled step and the seconds that took; None where all steps are done.
        """
        config, progress = self.config, self.progress
        state, step, self.position = start.state, start.step, start.position
        self.seen_tokens, self.rewinds = start.seen_tokens, start.rewinds
        self.watch.recall(start.watch)
        if start.step:
            progress.say(f"continuing from step {start.step}, {self.position:,} samples in, on mesh {self.mesh}")
        if compiling is None:
            progress.say(f"{start.step} steps are done, --train.steps={config.train.steps}; raise it to go on")
            self._claim(start.step)
            if not self._ended(start.step):  # stopped after the last save, before the rest of the end
                self._close(state, start.step)
            return
        if config.profile.steps and profile_window(config.profile.steps)[1] <= start.step:
            progress.say(f"--profile.steps={config.profile.steps} is over before step {start.step + 1}: no profile")
        with self.clock.within("compile"):
            compiled, seconds = compiling.result()
        progress.say(f"compiled in {seconds:.1f} s; {self.meter.formula}")
        self._claim(start.step)
        with StopRequest() as stop, self._accounted():
            if start.step and config.eval.every and start.step % config.eval.every == 0:
                self._evaluate_once(start.step, state)  # which a stop right after that step's save left out
            while True:
                try:
                    state = self._steps(compiled, state, step, stop)
                    self._finish(state)
                    return
                except (BadNumbers, Differing) as error:
                    bad = error.with_traceback(None)  # which would keep the state alive
                state, step = self._rewind(bad) if isinstance(bad, BadNumbers) else self._redo(bad)

    def _claim(self, step: int) -> None:
        """Make the folder this run's, once nothing but training can fail: a mistake that shows only while compiling
        must not leave a folder that refuses the corrected command."""
        if jax.process_index() == 0:
            # Never half a file: a kill or a full disk here must not make the folder one that cannot be continued.
            write_atomically(self.folder / "config.yaml", dump(self.config))
            self.corpora.tokenizer.save(self.folder / "tokenizer")
        self.events.record("resume" if step else "start", step=step, mesh=self.mesh)

    def _rewind(self, bad: BadNumbers) -> tuple[State, int]:
        """Go back to a checkpoint before the bad steps, and past their data (PaLM, https://arxiv.org/abs/2204.02311):
        the state and step to go on with. Bad again at once, it goes further back."""
        most, say = self.config.train.max_rewinds, self.progress.say
        self.rewinds += 1
        cure = "lower --optimizer.learning-rate, or look at the data around that step"
        if self.rewinds > most:
            raise self._diverged(bad, f"{bad}; it went back {most} times (--train.max-rewinds): {cure}")
        self.saver.settle(bad.step)
        before = bad.first if bad.first > self.rewound_to + 1 else self.rewound_to
        step = self.store.latest_valid(say, before)
        if step is None:
            raise self._diverged(bad, f"{bad}, and there is no checkpoint before them to go back to: {cure}")
        self.store.forget_after(step)
        self.furthest = max(self.furthest, bad.step)
        start = resume.begin(self.assembly, self.store, step)
        self.tracker.rewind(step)
        self.watch.recall({})
        samples = [start.position, bad.position]
        self.position, self.seen_tokens, self.rewound_to = bad.position, start.seen_tokens, step
        self.events.record("fault", step=bad.step, kind="rewind", to=step, skipped_samples=samples)
        say(f"{bad}; going back to step {step}, without samples {samples[0]:,} to {samples[1]:,}")
        return start.state, step

    def _redo(self, bad: Differing) -> tuple[State, int]:
        """Go back to where a restart would begin, and on with the same data: the state and step to go on with."""
        most, say = self.config.train.max_rewinds, self.progress.say
        self.rewinds += 1
        self.saver.settle(bad.step)
        if self.rewinds > most:
            last = max(self.store.steps(), default=None)
            where = "from the beginning" if last is None else f"from checkpoint {last}"
            cure = f"look for a faulty device; the same command continues {where}, which was saved before"
            raise self._diverged(bad, f"{bad}; it went back {most} times (--train.max-rewinds): {cure}")
        start = resume.begin(self.assembly, self.store, resume.choose(self.store, "auto", say))
        self.tracker.rewind(start.step)
        self.watch.recall(start.watch)
        self.furthest, self.rewound_to = max(self.furthest, bad.step), -1
        self.position, self.seen_tokens = start.position, start.seen_tokens
        self.events.record("fault", step=bad.step, kind="redo", to=start.step)
        say(f"{bad}; doing the steps after {start.step} again, with the same data")
        return start.state, start.step

    def _diverged(self, bad: BadNumbers | Differing, line: str) -> Diverged:
        self.events.record("fault", step=bad.step, kind="diverged")
        return Diverged(line)

    def _enter(self, phase: heartbeat.Phase, step: int) -> None:
        """The loop is in `phase` now: for whoever watches it, and for the sums of where the time goes."""
        heartbeat.phase(phase, step)
        again = phase == "step" and step <= self.furthest
        self.clock.switch("rework" if again else goodput.OF_PHASE[phase])

    def _account(self) -> None:
        """Write where the seconds of this process went, so that a kill loses little of that."""
        self.events.record("goodput", began=self.clock.began, spent=self.clock.read())

    @contextmanager
    def _accounted(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._account()

    def _steps(self, compiled: Step, state: State, step: int, stop: StopRequest) -> State:
        """Dispatch step after step. A step's metrics are read once the next one is under way, never sooner."""
        config = self.config
        size, length = config.data.batch_size, config.data.sequence_length
        end = self.position + (config.train.steps - step) * size
        sharding = self.assembly.batch
        pending: _Pending | None = None
        with batches(self.loader, self.position, size, lambda name: sharding[name].sharding, stop=end) as stream:
            self.meter.restart()
            self._enter("data", step + 1)
            for self.position, batch, waited in stream:
                step += 1
                self._enter("step", step)
                self.profiler.before(step, state)
                state, metrics = compiled(state, batch)
                faultpoints.point("step")
                self.seen_tokens += size * length
                if pending:
                    self._read(pending, state)
                pending = _Pending(step, metrics, self.position, self.seen_tokens, waited)
                self.progress.advance(step)
                stopping = step < config.train.steps and stop.due(step)
                if stopping or (step < config.train.steps and self._due(step)):
                    self._read(pending, state)
                    pending = None
                    self._between(step, state, stop.name if stopping else None)
                self._enter("data", step + 1)
        self._enter("step", step)
        if pending:
            self._read(pending, state)
        self.profiler.before(None, state)
        return state

    def _due(self, step: int) -> bool:
        every = (self.config.checkpoint.every, self.config.eval.every)
        return self.saver.must or any(n and step % n == 0 for n in every)

    def _between(self, step: int, state: State, stopped_by: str | None) -> None:
        """What happens between two steps: evaluation, a save, or the end that a signal asked for."""
        config = self.config
        began = time.perf_counter()
        if stopped_by:
            self.profiler.before(None, state)
            try:
                self._save(step, state, whole=True)
            except Differing as bad:
                raise Preempted(f"{stopped_by}: {bad}, so nothing was saved; the same command continues") from None
            self.events.record("fault", step=step, kind=stopped_by)
            raise Preempted(f"{stopped_by}: saved step {step} to {self.folder}; the same command continues from there")
        due = self.saver.must or (config.checkpoint.every > 0 and step % config.checkpoint.every == 0)
        # What is saved while numbers are bad would take the place of what the run may have to go back to.
        if due and not self.watch.in_row:
            with self.saver.survived(step):
                self._save(step, state, whole=self.saver.must)
        if self.evaluate and step % config.eval.every == 0:
            self._evaluate(step, state)
        self.meter.pause(time.perf_counter() - began)

    def _read(self, pending: "_Pending", state: State) -> None:
        """Fetch a step's metrics, wait for it if need be, and log it where it is due."""
        step = pending.step
        values = {name: np.asarray(value).item() for name, value in pending.metrics.items()}
        self.meter.count(pending.waited)
        try:
            self.watch.see(step, pending.position, values["loss"], values.pop("streak") == 0)
        except BadNumbers as bad:
            self._enter("compile", step)  # of the program that measures, and maybe a restore: longer than any step
            path = forensics.record(self.folder, self.assembly, self.loader, state, bad)
            self.progress.say(f"what is known of step {bad.first} is in {path}")
            raise
        self.saver.look(step)
        every = self.config.train.log_every
        if step % every == 0 or step in (1, self.config.train.steps):
            counted = values.pop("tokens")
            logged = {**values, "tokens": pending.seen_tokens, "loss_tokens": counted, **self.meter.read()}
            self.tracker.log(step, logged)
            self.progress.report(step, logged)

    def _save(self, step: int, state: State, whole: bool = False) -> None:
        """Begin a save; `whole`: and go on once it is on disk. Raises Differing, SaveFailed."""
        self._enter("save", step)
        meta = {
            "step": step,
            "position": self.position,
            "seen_tokens": self.seen_tokens,
            "rewinds": self.rewinds,
            "watch": self.watch.memory(),
            "data": self.corpora.digest(),
            "mesh": self.mesh,
            "config": dump(self.config),
        }
        save = self.saver.whole if whole else self.saver.begin
        save(step, state, meta)
        self._account()

    def _evaluate(self, step: int, state: State) -> None:
        if not self.evaluate:
            return
        self._enter("eval", step)
        values = self.evaluate(state["params"])
        self.tracker.log(step, values, file="eval.jsonl")
        self.progress.say(
            f"step {step} held out: loss {values['loss']:.4f}, perplexity {values['perplexity']:.2f}, "
            f"{values['bits_per_byte']:.3f} bits per byte"
        )

    def _evaluate_once(self, step: int, state: State) -> None:
        """Evaluate, unless that was done and logged."""
        if not any(line["step"] == step for line in read(self.folder / "eval.jsonl")):
            self._evaluate(step, state)

    def _finish(self, state: State) -> None:
        self._save(self.config.train.steps, state, whole=self.saver.waits)
        self._close(state, self.config.train.steps)

    def _ended(self, step: int) -> bool:
        """Whether an earlier process wrote the end of this run at `step` or later."""
        return any(e["event"] == "end" and e["step"] >= step for e in read(self.folder / "events.jsonl"))

    def _close(self, state: State, step: int) -> None:
        """What a run leaves beside its last checkpoint."""
        self._evaluate_once(step, state)
        self._enter("end", step)
        if self.config.eval.sample_tokens and self.config.model.architecture == "decoder":
            with self.clock.within("eval"):
                text = write_sample(self.assembly, self.corpora.tokenizer, state["params"], self.folder, step)
            self.progress.say(f"sample after step {step}:\n{text}\n")
        with self.clock.within("save"):
            self.saver.end(step)
        self.events.record("end", step=step)
        self._account()
        if jax.process_index() == 0:
            self.progress.say(goodput.describe(goodput.of_run(read(self.folder / "events.jsonl"))))
        self.progress.say(f"done: {step} steps in {self.folder}")


class _Pending(NamedTuple):
    """A dispatched step whose metrics were not read yet."""

    step: int
    metrics: Metrics
    position: int
    """Samples consumed up to and with it."""
    seen_tokens: int
    """Tokens consumed up to and with it."""
    waited: float
    """Seconds spent waiting for its data."""
