"""How far long work is, on stderr: a bar on a terminal, a line now and then elsewhere, or nothing.

Nobody's work ends because nobody can read how far it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_FIRST_SECONDS = 1.0
_LINE_SECONDS = 10.0
_STEP = 12  # characters of a step's name


class LossyStream:
    """A stream that may lose its reader: a pipe (``| head``), a terminal that is closed. From then on it drops all.

    Thread-safe as far as the stream is.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lost = stream is None

    def _try(self, step: Callable[..., Any], *arguments: str) -> None:
        if not self._lost:
            try:
                step(*arguments)
            except OSError:
                self._lost = True

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Meter:
    """Shows how far the steps of some work are, with rate and time left; a context manager. Not thread-safe.

    Called with the step's name, how much is done and how much there is.

    Args:
        verb: what is done.
        unit: of what is counted; empty where ``amount`` writes it.
        amount: writes a number of it.
        lasting: whether it shows even what takes no second, and the last state stays.
        show: False for silence.
        console: where to; stderr by default.
    """

    def __init__(
        self,
        verb: str,
        unit: str = "",
        *,
        amount: Callable[[float], str] = "{:,.0f}".format,
        lasting: bool = False,
        show: bool = True,
        console: Console | None = None,
    ) -> None:
        self._verb, self._unit, self._amount = verb, f" {unit}" if unit else "", amount
        self._lasting, self._show = lasting, show
        self._console = console or Console(file=LossyStream(sys.stderr))  # type: ignore[arg-type]
        self._step: str | None = None
        self._done = self._first = 0
        self._total: int | None = None
        self._note, self._beside = "", dict[str, int]()
        self._began = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(
        self, step: str, done: int, total: int | None, note: str = "", beside: Mapping[str, int] | None = None
    ) -> None:
        """Tell how far a step is.

        Args:
            total: None where that is not known, and then there is no time left.
            note: stands in a line.
            beside: what was done of other units, of which the rates are shown.
        """
        now = time.monotonic()
        if step != self._step:
            self._finish()
            self._step, self._first, self._began, self._last_line = step, done, now, now
        self._done, self._total, self._note, self._beside = done, total, note, dict(beside or {})
        if not self._show:
            return
        if self._console.is_terminal:
            if self._lasting or now - self._began >= _FIRST_SECONDS:
                self._draw()
        elif now - self._last_line >= _LINE_SECONDS:
            self._line()

    def _draw(self) -> None:
        if self._bar is None:
            text, rate = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[rate]}")
            share = MofNCompleteColumn() if self._lasting else TaskProgressColumn()
            elapsed = [TimeElapsedColumn()] if self._lasting else []
            columns = (text, BarColumn(), share, rate, *elapsed, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=not self._lasting)
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(self._label(), total=self._total, rate="")
        self._bar.update(self._task, completed=self._done, total=self._total, rate=self._rates())

    def _label(self) -> str:
        return f"{self._verb} {(self._step or '')[:_STEP]}".strip()

    def _speed(self, amount: int) -> float:
        return amount / max(time.monotonic() - self._began, 1e-9)

    def _rates(self) -> str:
        own = f"{self._amount(self._speed(self._done - self._first))}{self._unit}/s"
        return " ".join([own, *(f"{self._speed(amount):,.0f} {unit}/s" for unit, amount in self._beside.items())])

    def _line(self) -> None:
        self._last_line = time.monotonic()
        of, left = "", 0
        if self._total is not None:
            of, left = f"/{self._amount(self._total)}", self._total - self._done
        speed = self._speed(self._done - self._first)
        facts = [f"{self._label()}: {self._amount(self._done)}{of}{self._unit}", self._note, self._rates()]
        facts.append(f"{left / speed:,.0f} s left" if speed and left > 0 else "")
        self._console.print(", ".join(filter(None, facts)), highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        """End a step: whoever has read lines of it reads that it is done."""
        if self._bar is not None and self._task is not None:
            if not self._lasting:
                self._bar.remove_task(self._task)
            self._task = None
        elif self._show and self._step is not None and (self._lasting or self._last_line > self._began):
            self._line()

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._finish()
        if self._bar is not None:
            self._bar.stop()
