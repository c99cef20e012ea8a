import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.__main__ import VERBS, dispatch
from jaxlm.config import errors
from jaxlm.config.cli import run

ROOT = Path(__file__).parents[2]


def ending(capsys, outcome):
    """Exit code and stderr of a command whose main raises or returns `outcome`."""

    def main(argv):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as caught:
        run(main, [])
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "outcome, code",
    [
        (None, 0),
        (0, 0),
        (1, 1),
        (errors.UserError("x"), 2),
        (errors.Diverged("x"), 3),
        (errors.NoValidCheckpoint("x"), 4),
        (errors.Preempted("x"), 75),
        (KeyboardInterrupt(), 130),
        (PermissionError(errno.EACCES, "Permission denied", "/some/file"), 2),
        (OSError(errno.EROFS, "Read-only file system", "/some/file"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/some/file"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_exit_codes(capsys, outcome, code):
    ended, line = ending(capsys, outcome)
    assert ended == code
    if isinstance(outcome, BaseException):
        assert line.startswith("error: ")
        assert line.count("\n") == 1
    if getattr(outcome, "filename", None):
        assert "/some/file" in line


def test_a_message_of_many_lines_becomes_one(capsys):
    assert ending(capsys, errors.UserError("a\n  b\r\nc"))[1] == "error: a b c\n"


@pytest.mark.parametrize("bug", [ValueError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), OSError(errno.EPERM, "x")])
def test_a_bug_keeps_its_traceback(bug):
    def main(argv):
        raise bug

    with pytest.raises(type(bug)):
        run(main, [])


def test_arguments_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxlm", "a", "b"])
    seen = []
    with pytest.raises(SystemExit):
        run(seen.extend)
    assert seen == ["a", "b"]


def test_a_reader_that_goes_away_is_no_traceback():
    code = "from jaxlm.config.cli import run; run(lambda argv: [print('x' * 1000) for _ in range(10000)] and None)"
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    _, complaint = process.communicate(timeout=30)
    assert (process.returncode, complaint) == (141, b"")


def test_the_console_script_lists_its_verbs(capsys):
    assert dispatch([]) == 0
    listed = capsys.readouterr().out
    assert all(verb in listed for verb in VERBS)
    assert dispatch(["--version"]) == 0
    with pytest.raises(errors.UserError, match="nearest is train"):
        dispatch(["trian"])


def test_the_console_script_runs_the_verb():
    for verb in VERBS:
        assert (ROOT / "jaxlm" / verb / "__main__.py").is_file(), verb
    command = [sys.executable, "-m", "jaxlm", "train", "--train.stps=3"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "--train.steps" in result.stderr
    assert result.stderr.count("\n") == 1
