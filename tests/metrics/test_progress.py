"""A bar on a terminal, lines in a log, and a terminal left in order."""

import io
import re
from contextlib import redirect_stdout

import pytest

from jaxlm.metrics.progress import Progress, duration, quantity


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def run(file, **options):
    with redirect_stdout(file), Progress(20, **options) as progress:
        for step in range(1, 21):
            progress.advance(step)
            if step % 10 == 0:
                values = {"loss": 9.75 - step / 10, "tokens_per_second": 12345.6, "mfu": None, "grad_norm": 1.0}
                progress.report(step, values)
        progress.say("saved [step] 20")


def test_lines_in_a_log():
    log = io.StringIO()
    run(log)
    first, second, saved = log.getvalue().splitlines()
    assert re.fullmatch(r"step 10/20  loss  8\.7500  grad  1\.000  12\.3k tokens/s  eta 0:00", first)
    assert len(first) == len(second) and second.startswith("step 20/20")
    assert saved == "saved [step] 20"
    assert "\x1b" not in log.getvalue()


def test_a_bar_on_a_terminal(terminal):
    run(terminal)
    assert all(text in terminal.getvalue() for text in ("20/20", "loss  7.7500", "\x1b["))


def test_the_terminal_is_left_in_order(terminal):
    with pytest.raises(KeyboardInterrupt), redirect_stdout(terminal), Progress(20) as progress:
        progress.advance(1)
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().rindex(shown) > terminal.getvalue().rindex(hidden)


def test_other_processes_are_silent(terminal):
    run(terminal, show=False)
    assert not terminal.getvalue()


def test_the_first_step_does_not_count_for_the_pace(monkeypatch):
    clock = iter([100.0, 110.0])
    progress = Progress(11)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    assert progress.eta_seconds(1) is None
    progress.advance(1)
    assert progress.eta_seconds(6) == 10.0


def test_units():
    assert [duration(s) for s in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]
    assert [quantity(q) for q in (0, 12.34, 999.6, 12345, 1.07e6, 5e12)] == ["0", "12.3", "1k", "12.3k", "1.07M", "5T"]
    assert quantity(float("nan")) == "nan"
