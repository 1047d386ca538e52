"""The progress of a fill: a rich bar on a terminal, a line now and then elsewhere, or nothing."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from actcache.io.progress import progress_console

_LINE_SECONDS = 10.0


class FillProgress:
    """Counts documents and tokens; a context manager. Not thread-safe.

    Args:
        total: documents in all; None where that is not known, and then there is no ETA.
        show: False for silence.
        console: where to; stderr by default.
    """

    def __init__(self, total: int | None, *, show: bool = True, console: Console | None = None) -> None:
        self._show = show
        self._console = console or progress_console()
        self._total = total
        self._bar: Progress | None = None
        self._documents = self._computed = self._tokens = 0
        self._start = self._last_line = time.monotonic()
        if show and self._console.is_terminal:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
            ]
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self._console)
            self._task = self._bar.add_task("fill", total=total, rate="")

    def advance(self, documents: int, computed: int = 0, tokens: int = 0) -> None:
        """Report that ``documents`` more are stored, of which ``computed``, with ``tokens``, were computed now."""
        self._documents += documents
        self._computed += computed
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, advance=documents, rate=self._rate())
        elif self._show and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._line()

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        return f"{self._documents / seconds:,.0f} documents/s {self._tokens / seconds:,.0f} tokens/s"

    def _line(self) -> None:
        self._last_line = time.monotonic()
        of = "" if self._total is None else f"/{self._total}"
        eta = ""
        if self._total is not None and 0 < self._documents < self._total:
            left = (self._last_line - self._start) * (self._total - self._documents) / self._documents
            eta = f", {left:,.0f} s left"
        text = f"fill: {self._documents}{of} documents, {self._computed} computed, {self._rate()}{eta}"
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> FillProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._show:
            self._line()
