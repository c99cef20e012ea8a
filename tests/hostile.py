"""`make hostile`: inputs that nobody should send, many thousands of each kind. Each works, or is one line.

Every input is a sound one with bytes flipped, cut, doubled, moved or replaced by words that mean something elsewhere,
drawn from a seed. An error that is not ours, a message of several lines, more than SECONDS, or more memory than
MORE_BYTES above where it began is a failure, and is printed with the number that makes the same input again.
"""

import json
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxlm.checkpoint import manifest
from jaxlm.checkpoint.provenance import git_revision
from jaxlm.config import mesh_spec
from jaxlm.config.cli import run
from jaxlm.config.errors import CommandError, UserError
from jaxlm.config.files import write_atomically
from jaxlm.config.load import dump, kinds, load, parse_recipe
from jaxlm.config.schema import RunConfig
from jaxlm.data import sources
from jaxlm.data.prepare import prepare
from jaxlm.data.store import TokenFolder
from jaxlm.data.tokenizer import Bytes

SECONDS = 20
MORE_BYTES = 2**29

WORDS = [
    b"\0",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b"[]",
    b"{}",
    b"../../etc/passwd",
    b"!!python/object:os.system",
    b"\xff",
]
WORDS += [
    b"!!python/object:os.system",
    b'"',
    b",",
    b":",
    b"\n",
    b"9" * 30,
    b"&a [*a]",
    b"[" * 2000,
    b'{"a":' * 500,
    "٣".encode(),
    b"dp",
    b"4",
]

Case = tuple[Callable[[bytes, Path], Any], Callable[[Path], list[bytes]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """python -m tests.hostile: thousands of inputs that nobody should send."""

    out: str | None = None
    """JSON file of the results."""
    inputs: int = 10_000
    """Inputs of each kind."""
    kinds: tuple[str, ...] = ()
    """The kinds (default: all)."""
    seed: int = 0
    """Seed of the inputs."""


def main(argv: list[str]) -> int:
    """Exit code 1 where an input was neither taken nor refused in one line."""
    options, _ = load(Options, argv)
    if unknown := set(options.kinds) - set(KINDS):
        raise UserError(f"no kind {', '.join(sorted(unknown))}; the kinds are {' '.join(KINDS)} (--kinds)")
    if len(options.kinds) == 1 and options.out is None:
        print(json.dumps(attack(options.kinds[0], options.inputs, options.seed)))
        return 0
    rows = {}
    for kind in options.kinds or KINDS:
        command = [sys.executable, "-m", "tests.hostile", f"--kinds={kind}", f"--inputs={options.inputs}"]
        done = subprocess.run([*command, f"--seed={options.seed}"], capture_output=True, text=True)
        crash = {"failures": [f"the process ended with {done.returncode}: {done.stderr[-300:]}"]}
        rows[kind] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else crash
        print(f"{kind:12} {json.dumps(rows[kind])}", flush=True)
    if options.out:
        about = {"command": f"python -m tests.hostile {' '.join(argv)}", "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        about |= {"git_revision": git_revision(), "python": platform.python_version(), "seed": options.seed}
        write_atomically(Path(options.out), json.dumps(about | {"kinds": rows}, indent=1) + "\n")
    return int(any(row["failures"] for row in rows.values()))


def attack(kind: str, inputs: int, seed: int) -> dict[str, Any]:
    """Try `inputs` inputs of one kind."""
    attempt, make = KINDS[kind]
    failures: list[str] = []
    tally: Counter[str] = Counter()
    longest, before = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, _too_long)
    with tempfile.TemporaryDirectory(prefix="jaxlm-hostile-") as name:
        folder = Path(name)
        seeds = make(folder)
        for number in range(inputs):
            source = random.Random(f"{kind} {seed} {number}")
            content = mutated(source.choice(seeds), source)
            signal.alarm(SECONDS)
            began = time.perf_counter()
            try:
                attempt(content, folder)
                tally["taken"] += 1
            except CommandError as error:
                tally["refused"] += 1
                if len(str(error).splitlines()) != 1:
                    failures.append(f"{number}: a message of several lines: {str(error)[:200]!r}")
            except Exception as error:  # whatever it is, it is what we look for
                failures.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.alarm(0)
            longest = max(longest, time.perf_counter() - began)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if more > MORE_BYTES:
        failures.append(f"memory grew by {more} bytes")
    return {
        "inputs": inputs,
        **tally,
        "failures": failures[:20],
        "longest_seconds": round(longest, 3),
        "memory_growth_bytes": more,
    }


def mutated(content: bytes, source: random.Random) -> bytes:
    """`content` with one to three changes."""
    data = bytearray(content)
    for _ in range(source.randint(1, 3)):
        at, length = source.randint(0, len(data)), source.randint(1, 16)
        what = source.randrange(6)
        if what == 0 and data:
            data[at % len(data)] ^= 1 << source.randrange(8)
        elif what == 1:
            del data[at : at + length]
        elif what == 2:
            data[at:at] = data[at : at + length] * source.randint(1, 4)
        elif what == 3:
            data[at : at + length] = source.choice(WORDS)
        elif what == 4:
            data[at:at] = source.choice(WORDS)
        else:
            data[at : at + length] = source.randbytes(length)
    return bytes(data[:at]) if source.random() < 0.05 else bytes(data)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"over {SECONDS} s")


def _mesh(content: bytes, _: Path) -> None:
    mesh_spec.parse(content.decode("utf-8", "replace")).resolve(8)


def _recipe(content: bytes, _: Path) -> None:
    parse_recipe(content, kinds(RunConfig), "recipe.yaml")


def _documents(name: str) -> Callable[[bytes, Path], None]:
    def attempt(content: bytes, folder: Path) -> None:
        (folder / name).write_bytes(content)
        for _ in sources.documents(sources.find(str(folder / name)), "text", Counter()):
            pass

    return attempt


def _jsonl_seeds(_: Path) -> list[bytes]:
    return [b'{"text": "a b c"}\n{"text": "d", "other": [1, 2]}\n' * 3, '{"text": "äöü \\ud83d"}\n'.encode()]


def _parquet_seeds(folder: Path) -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    tables = [pyarrow.table({"text": ["a b c", "d", None]}), pyarrow.table({"text": ["x"] * 500, "n": [1] * 500})]
    for number, table in enumerate(tables):
        parquet.write_table(table, folder / f"seed-{number}.parquet")
    return [(folder / f"seed-{number}.parquet").read_bytes() for number in range(len(tables))]


def _shard_seeds(folder: Path) -> list[bytes]:
    """What is changed is one file of a folder, whose number goes in front of its content."""
    (folder / "a.txt").write_text("one two three")
    inputs = sources.find(str(folder / "a.txt"))
    prepare(inputs, folder / "tokens", Bytes, {"tokenizer": "bytes"}, text_key="text", workers=1, shard_characters=100)
    return [bytes([number]) + path.read_bytes() for number, path in enumerate(_files(folder / "tokens"))]


def _shards(content: bytes, folder: Path) -> None:
    _with_changed(folder, "tokens", content, _read_tokens)


def _read_tokens(tokens: Path) -> None:
    found = TokenFolder(tokens)
    found.verify()
    _ = found.tokenizer


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    save = manifest.save_folder(folder / "checkpoints", 1, 1)
    (save / "arrays").mkdir(parents=True)
    (save / "arrays" / "d").write_bytes(b"numbers")
    record = {"meta": {"step": 1, "position": 8, "config": dump(RunConfig())}, "leaves": {"w": {"shape": [2]}}}
    (save / manifest.META).write_text(json.dumps(record))
    manifest.commit(folder / "checkpoints", 1, 1)
    return [bytes([number]) + path.read_bytes() for number, path in enumerate(_files(folder / "checkpoints"))]


def _checkpoint(content: bytes, folder: Path) -> None:
    _with_changed(folder, "checkpoints", content, _read_checkpoint)


def _read_checkpoint(checkpoints: Path) -> None:
    try:
        manifest.verify(checkpoints, 1)
        manifest.read_meta(checkpoints, 1)
    except manifest.Damaged as error:
        raise UserError(str(error)) from error


def _with_changed(folder: Path, name: str, content: bytes, attempt: Callable[[Path], None]) -> None:
    """`attempt` on a copy of folder `name` in which one file has other content; it must not read outside."""
    copy = folder / "changed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder / name, copy)
    paths = _files(copy)
    paths[content[0] % len(paths) if content else 0].write_bytes(content[1:])
    attempt(copy)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


KINDS: dict[str, Case] = {
    "mesh": (_mesh, lambda _: [b"dp4,tp2", b"pp2,fsdp-1,cp2", b"rep2,dp2,fsdp2,ep2"]),
    "recipe": (_recipe, lambda _: [dump(RunConfig()).encode(), b"model: {layers: 2, windows: [4, 0]}\nmesh: dp4\n"]),
    "jsonl": (_documents("input.jsonl"), _jsonl_seeds),
    "parquet": (_documents("input.parquet"), _parquet_seeds),
    "shards": (_shards, _shard_seeds),
    "checkpoint": (_checkpoint, _checkpoint_seeds),
}
"""Name -> what takes an input, and sound inputs to begin with."""


if __name__ == "__main__":
    run(main)
