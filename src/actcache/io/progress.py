"""How far long work is: a bar on a terminal or in a notebook, a line on stderr now and then elsewhere, or nothing.

Nobody's work ends because nobody can read how far it is.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich import progress
from rich.console import Console

from actcache.io.notebook import Display

_FIRST_SECONDS = 1.0
_LINE_SECONDS = 10.0
_DISPLAY_SECONDS = 0.2  # between two states that a notebook is sent


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

    Args:
        verb: what is done.
        unit: of what is counted; empty where ``amount`` writes it.
        amount: writes a number of it.
        lasting: whether it shows even what takes no second, and the last state stays.
        show: False for silence.
        console: where to; a notebook's output, where this is its kernel, and else stderr by default.
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
        self._display = Display() if console is None and show and Display.there() else None
        self._console = console or Console(file=LossyStream(sys.stderr))  # type: ignore[arg-type]
        self._step: str | None = None
        self._done = self._first = 0
        self._total: int | None = None
        self._note, self._beside = "", dict[str, int]()
        self._began = self._last_line = time.monotonic()
        self._bar: progress.Progress | None = None
        self._task: progress.TaskID | None = None

    def __call__(
        self, step: str, done: int, total: int | None, note: str = "", beside: Mapping[str, int] | None = None
    ) -> None:
        """Tell how much of a step is done, of how much; with a total of None there is no time left.

        Args:
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
        if self._display is not None:
            if now - self._last_line >= _DISPLAY_SECONDS and (self._lasting or now - self._began >= _FIRST_SECONDS):
                self._send(self._display)
        elif self._console.is_terminal:
            if self._lasting or now - self._began >= _FIRST_SECONDS:
                self._draw()
        elif now - self._last_line >= _LINE_SECONDS:
            self._line()

    def _draw(self) -> None:
        if self._bar is None:
            text = progress.TextColumn("{task.description}", markup=False)
            share = progress.MofNCompleteColumn() if self._lasting else progress.TaskProgressColumn()
            rate = progress.TextColumn("{task.fields[rate]}")
            elapsed = [progress.TimeElapsedColumn()] if self._lasting else []
            columns = (text, progress.BarColumn(), share, rate, *elapsed, progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, console=self._console, transient=not self._lasting)
            self._bar.start()
        if self._task is None:
            self._task = self._bar.add_task(self._label(), total=self._total, rate="")
        self._bar.update(self._task, completed=self._done, total=self._total, rate=self._rates())

    def _label(self) -> str:
        return f"{self._verb} {(self._step or '')[:12]}".strip()

    def _speed(self, amount: int) -> float:
        return amount / max(time.monotonic() - self._began, 1e-9)

    def _rates(self) -> str:
        own = f"{self._amount(self._speed(self._done - self._first))}{self._unit}/s"
        return " ".join([own, *(f"{self._speed(amount):,.0f} {unit}/s" for unit, amount in self._beside.items())])

    def _send(self, display: Display) -> None:
        """Have a notebook show the state: a bar, and what a line says."""
        self._last_line = time.monotonic()
        of = "" if self._total is None else f' max="{max(self._total, 1)}"'
        amount = "" if self._total is None else f' value="{self._done}"'
        display.show(f"<progress{amount}{of}></progress> <code>{html.escape(self._text())}</code>")

    def _line(self) -> None:
        self._last_line = time.monotonic()
        self._console.print(self._text(), highlight=False, soft_wrap=True)

    def _text(self) -> str:
        of, left = "", 0
        if self._total is not None:
            of, left = f"/{self._amount(self._total)}", self._total - self._done
        speed = self._speed(self._done - self._first)
        facts = [f"{self._label()}: {self._amount(self._done)}{of}{self._unit}", self._note, self._rates()]
        facts.append(f"{left / speed:,.0f} s left" if speed and left > 0 else "")
        return ", ".join(filter(None, facts))

    def _finish(self) -> None:
        """End a step: whoever has read lines of it reads that it is done."""
        if self._bar is not None and self._task is not None:
            if not self._lasting:
                self._bar.remove_task(self._task)
            self._task = None
        elif self._show and self._step is not None and (self._lasting or self._last_line > self._began):
            self._line() if self._display is None else self._send(self._display)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *error: object) -> None:
        self._finish()
        if self._bar is not None:
            self._bar.stop()
