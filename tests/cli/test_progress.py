"""Progress: a bar on a terminal, a line now and then elsewhere, silence where it is asked for or nobody listens."""

from __future__ import annotations

import errno
import io
import time

import pytest
from rich.console import Console

from actcache.admin.display import binary, counted, span
from actcache.io.progress import LossyStream, Meter
from actcache.models.progress import FillProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def plain() -> Console:
    return Console(file=io.StringIO(), width=100)


def test_lines_where_there_is_no_terminal(clock):
    console = plain()
    with Meter("verify", "entries", console=console) as meter:
        for done in range(31):
            meter("abcdef", done * 100, 3000)
            clock[0] += 1
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "verify abcdef: 1,000/3,000 entries, 100 entries/s, 20 s left"
    assert lines[1] == "verify abcdef: 2,000/3,000 entries, 100 entries/s, 10 s left"
    assert lines[-1].startswith("verify abcdef: 3,000/3,000 entries")
    assert len(lines) <= 4


def test_each_step_has_its_own_rate(clock):
    console = plain()
    with Meter("migrate", amount=binary, console=console) as meter:
        meter("one", 0, 1 << 30)
        clock[0] += 5
        meter("one", 1 << 30, 1 << 30)
        meter("two", 0, 1 << 30)
        clock[0] += 10
        meter("two", 512 << 20, 1 << 30)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "migrate two: 512.0 MiB/1.0 GiB, 51.2 MiB/s, 10 s left"


def test_what_is_done_within_a_second_shows_nothing(clock):
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        with Meter("verify", "entries", console=console) as meter:
            for done in range(10):
                meter("x", done, 10)
                clock[0] += 0.05
        assert console.file.getvalue() == ""


def test_a_bar_on_a_terminal(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Meter("verify", "entries", console=console) as meter:
        meter("abcdef", 0, 100)
        clock[0] += 2
        meter("abcdef", 50, 100)
        meter._bar.refresh()  # which a thread does ten times a second
        clock[0] += 1
        meter("abcdef", 100, 100)
        meter("second", 0, 7)
        clock[0] += 2
        meter("second", 7, 7)
        meter._bar.refresh()
    shown = console.file.getvalue()
    assert "verify abcdef" in shown
    assert "50%" in shown
    assert "25 entries/s" in shown
    assert "verify second" in shown


def test_quiet_and_broken_pipes(clock):
    console = plain()
    with Meter("verify", "entries", show=False, console=console) as meter:
        meter("x", 0, 10)
        clock[0] += 100
        meter("x", 5, 10)
    assert console.file.getvalue() == ""

    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "the terminal is closed")

    for terminal in (True, False):
        console = Console(file=LossyStream(Broken()), force_terminal=terminal, width=100)
        with Meter("verify", "entries", console=console) as meter:
            for done in range(5):
                meter("x", done, 10)
                clock[0] += 20
        with FillProgress(10, console=console) as bar:
            for _ in range(5):
                bar.advance(1)
                clock[0] += 20


def test_units():
    sizes = (0, 1023, 1024, 1536 << 20, 5 << 40)
    assert [binary(size) for size in sizes] == ["0 B", "1,023 B", "1.0 KiB", "1.5 GiB", "5.0 TiB"]
    times = (0, 59, 90, 3600, 36_000, 86_400 * 40)
    assert [span(seconds) for seconds in times] == ["0 s", "59 s", "1.5 min", "1.0 h", "10 h", "40 d"]
    assert [counted(n, "entry", "entries") for n in (0, 1, 2000)] == ["0 entries", "1 entry", "2,000 entries"]
    assert counted(3, "space") == "3 spaces"
