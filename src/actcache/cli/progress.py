"""Progress of what takes more than a second: a bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from actcache.cli.common import SHORT, binary
from actcache.io.progress import progress_console

_FIRST_SECONDS = 1.0
_LINE_SECONDS = 10.0


class Meter:
    """Shows how far the steps of a command are, with rate and time left; a context manager. Not thread-safe.

    Called with the step's name, how much is done and how much there is.

    Args:
        verb: what the command does.
        unit: of what is counted; ``"B"`` shows bytes.
        show: False for silence.
        console: where to; stderr by default.
    """

    def __init__(self, verb: str, unit: str, *, show: bool = True, console: Console | None = None) -> None:
        self._verb, self._unit, self._show = verb, unit, show
        self._console = console or progress_console()
        self._step: str | None = None
        self._done = self._total = self._first = 0
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.monotonic()
        if step != self._step:
            self._finish()
            self._step, self._first, self._began, self._last_line = step, done, now, now
        self._done, self._total = done, total
        if not self._show:
            return
        if self._console.is_terminal:
            if now - self._began >= _FIRST_SECONDS:
                self._draw()
        elif now - self._last_line >= _LINE_SECONDS:
            self._line()

    def _draw(self) -> None:
        if self._bar is None:
            text, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
            columns = (text, BarColumn(), TaskProgressColumn(), rate, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(self._label(), total=self._total, rate="")
        self._bar.update(self._task, completed=self._done, total=self._total, rate=self._rate())

    def _label(self) -> str:
        return f"{self._verb} {(self._step or '')[:SHORT]}".strip()

    def _speed(self) -> float:
        return (self._done - self._first) / max(time.monotonic() - self._began, 1e-9)

    def _amount(self, number: float) -> str:
        return binary(number) if self._unit == "B" else f"{number:,.0f}"

    def _rate(self) -> str:
        return f"{self._amount(self._speed())}{'' if self._unit == 'B' else f' {self._unit}'}/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        speed, left = self._speed(), self._total - self._done
        eta = f", {left / speed:,.0f} s left" if speed and left else ""
        unit = "" if self._unit == "B" else f" {self._unit}"
        amount = f"{self._amount(self._done)}/{self._amount(self._total)}{unit}"
        self._console.print(f"{self._label()}: {amount}, {self._rate()}{eta}", highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        """End a step: whoever has read lines of it reads that it is done."""
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        elif self._show and self._last_line > self._began:
            self._line()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()
        if self._bar is not None:
            self._bar.stop()
