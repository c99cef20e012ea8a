"""Where the numbers of a run go: metrics.jsonl always; TensorBoard and Weights & Biases where asked for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxlm.config.errors import UserError
from jaxlm.metrics.jsonl import JsonLines, rewind

FILES = ("metrics.jsonl", "eval.jsonl")
"""What a run logs by step; on resume their later lines are set aside."""


class Sink(Protocol):
    """One more place for the numbers."""

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Writes the numbers of a run into its folder, on one process (`write`) of many.

    `step` is where the run continues from (0: from the beginning): lines of later steps, logged before a kill, are
    moved to `metrics.superseded.jsonl`, so that every step stands once in `metrics.jsonl`. `config` goes to W&B.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        step: int = 0,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        write: bool = True,
    ) -> None:
        self._folder, self._write = Path(folder), write
        self._files: dict[str, JsonLines] = {}
        self._sinks: list[Sink] = []
        if not write:
            return
        if tensorboard:
            self._sinks.append(TensorBoard(self._folder / "tensorboard", step))
        if wandb:
            self._sinks.append(WeightsAndBiases(self._folder, wandb, config or {}))
        for name in FILES:
            rewind(self._folder / name, step)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Any], file: str = "metrics.jsonl") -> None:
        """One line `{"step": step, ...}` of Python or NumPy numbers, None where unknown; NaN becomes null."""
        if not self._write:
            return
        if file not in self._files:
            self._files[file] = JsonLines(self._folder / file)
        self._files[file].append({"step": step, **values})
        group = "train" if file == "metrics.jsonl" else Path(file).stem
        known = {key: float(value) for key, value in values.items() if value is not None}
        for sink in self._sinks:
            sink.log(step, group, known)

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: lines of later ones are set aside, as when it is continued."""
        for file in self._files.values():
            file.close()
        self._files = {}
        for name in FILES if self._write else ():
            rewind(self._folder / name, step)

    def close(self) -> None:
        """Flush and close everything; harmless twice."""
        for file in self._files.values():
            file.close()
        for sink in self._sinks:
            sink.close()
        self._files, self._sinks = {}, []


class TensorBoard:
    """Event files for `tensorboard --logdir`; steps after `step` of an earlier attempt are hidden there."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise UserError("metrics.tensorboard=true needs tensorboardX: pip install 'jaxlm[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(f"{group}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of a Weights & Biases project, continued when the training run is resumed."""

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"metrics.wandb={project} needs wandb: pip install 'jaxlm[wandb]'") from error
        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "wandb_run.txt"
        known = identity.read_text(encoding="utf-8").strip() if identity.exists() else None
        self._run = wandb.init(
            project=project, name=folder.name, dir=str(folder), config=dict(config), id=known, resume="allow"
        )
        identity.write_text(self._run.id + "\n", encoding="utf-8")
        self._run.define_metric("*", step_metric="step")  # their own step counter cannot go back after a resume

    def log(self, step: int, group: str, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{f"{group}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self._run.finish()
