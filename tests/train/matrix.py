"""`make parity`: the parity battery in full, and docs/parity.md, the page that shows it.

A row whose result the file holds is not measured again, so a stopped run goes on where it was; one that failed is. Rows
are measured in other processes, so that one in which XLA aborts is a row that failed and not the end.
"""

import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from jaxlm.checkpoint.provenance import git_revision
from jaxlm.config.cli import run
from jaxlm.config.errors import UserError
from jaxlm.config.files import write_atomically
from jaxlm.config.load import load
from tests.train.battery import GRADIENT, LOSS, PARAMETER
from tests.train.parity_page import page
from tests.train.rows import ROWS, Row

Result = dict[str, Any]
"""A row as JSON: what it is, and its errors or how it failed."""

RESULT = "result "
"""Begins the line in which a worker answers."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m tests.train.matrix: compare every row of tests/train/rows.py with one device."""

    out: str | None = None
    """JSON file of the results, a row a line; what it holds already is not measured again."""
    page: str | None = None
    """Markdown page to write from it."""
    only: str = ""
    """Only rows with this in their name, which is mesh, decoder and schedule (pp2,dp2,tp2 llama zb)."""
    again: bool = False
    """Measure rows again that the file holds."""
    jobs: int = 1
    """Processes that measure."""
    limit: float = 900.0
    """Seconds that a row may take."""


def main(argv: list[str]) -> int:
    """Measure what is missing, write it row by row, then the page. Exit code 1 where a row is not as promised."""
    options, _ = load(Options, argv)
    wanted = [row for row in ROWS if options.only in str(row)]
    if not wanted:
        raise UserError(f"--only={options.only}: no row has that in its name, as {ROWS[-1]} has")
    results = read(Path(options.out)) if options.out else {}
    missing = [row for row in wanted if options.again or not sound(results.get(row))]
    for row, result in measured(missing, options.jobs, lambda: Worker(options.limit)):
        results[row] = result
        print(describe(row, result), flush=True)
        if options.out:
            write(Path(options.out), results)
    if options.page:
        write_atomically(Path(options.page), page(ordered(results)))
    good = sum(sound(results[row]) for row in wanted)
    print(f"{good} of {len(wanted)} rows equal one device")
    return 0 if good == len(wanted) else 1


def read(path: Path) -> dict[Row, Result]:
    """The results in a file, of the rows as they are now; nothing where there is no file."""
    held = {(r["mesh"], r["style"], r["schedule"]): r for r in json.loads(path.read_text())} if path.exists() else {}
    found = {row: held.get((row.mesh, row.style, row.schedule)) for row in ROWS}
    return {row: result for row, result in found.items() if result and result["keys"] == row.spelled}


def write(path: Path, results: dict[Row, Result]) -> None:
    """A row a line."""
    write_atomically(path, "[\n" + ",\n".join(map(json.dumps, ordered(results))) + "\n]\n")


def ordered(results: dict[Row, Result]) -> list[Result]:
    """The results in the order of ROWS."""
    return [results[row] for row in ROWS if row in results]


def sound(result: Result | None) -> bool:
    """Whether a row was measured and is within what is promised."""
    if result is None or "failed" in result:
        return False
    return result["loss"] <= LOSS and result["gradient"][0] <= GRADIENT and result["parameter"][0] <= PARAMETER


def describe(row: Row, result: Result) -> str:
    if "failed" in result:
        return f"{row}: FAILED: {result['failed']}"
    errors = f"loss {result['loss']:.1e}, gradient {result['gradient'][0]:.1e}, parameter {result['parameter'][0]:.1e}"
    return f"{row}: {'' if sound(result) else 'TOO FAR: '}{errors} ({result['seconds']:.0f} s)"


def measured(rows: Sequence[Row], jobs: int, make: Callable[[], "Worker"]) -> Iterator[tuple[Row, Result]]:
    """The rows with their results, as they come from `jobs` workers that `make` makes."""
    # Rows of one decoder come one after the other: a worker measures one device once for them all.
    by_decoder = sorted(rows, key=lambda row: (row.style, row.keys.get("model__layers", 0)))
    workers = [make() for _ in range(min(jobs, len(rows)))]
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(row: Row) -> tuple[Row, Result]:
        worker = free.get()
        try:
            return row, worker.measure(row)
        finally:
            free.put(worker)

    try:
        with ThreadPoolExecutor(max(len(workers), 1)) as pool:
            for future in as_completed([pool.submit(one, row) for row in by_decoder]):
                yield future.result()
    finally:
        for worker in workers:
            worker.close()


class Worker:
    """A process that measures rows, one after the other; where it dies or hangs, the next row gets a new one."""

    command = (sys.executable, "-m", "tests.train.worker")

    def __init__(self, limit: float):
        self.limit = limit
        """Seconds that a row may take."""
        self.process: subprocess.Popen[str] | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  close() closes it

    def measure(self, row: Row) -> Result:
        began = time.perf_counter()
        process = self.process = self.process or self._start()
        timer = threading.Timer(self.limit, process.kill)
        timer.start()
        try:
            process.stdin.write(f"{row}\n")
            process.stdin.flush()
            answer = next((line for line in process.stdout if line.startswith(RESULT)), None)
        except BrokenPipeError:
            answer = None
        timer.cancel()
        seconds = time.perf_counter() - began
        found = json.loads(answer.removeprefix(RESULT)) if answer else {"failed": self._ending(seconds)}
        return asdict(row) | {"keys": row.spelled} | found | {"seconds": round(seconds, 1)} | software()

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None
        self.errors.close()

    def _start(self) -> subprocess.Popen[str]:
        self.errors.seek(0)
        self.errors.truncate()
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def _ending(self, seconds: float) -> str:
        """How the process ended that gave no answer."""
        assert self.process
        code = self.process.wait()
        self.process = None
        if seconds >= self.limit:
            return f"not done after {self.limit:g} s"
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()] or ["nothing on stderr"]
        return f"the process ended with {code}: {said[-1][:300]}"


def software() -> dict[str, str | None]:
    """What a result was measured with, and when."""
    versions = f"Python {platform.python_version()}, jax {version('jax')}, flax {version('flax')}"
    return {"software": versions, "revision": git_revision(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}


if __name__ == "__main__":
    run(main)
