"""Where progress goes: nobody's work ends because nobody can read how far it is."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console


class Unheard:
    """A stream that may lose its reader: a pipe (``| head``), a terminal that is closed. From then on it drops all.

    Thread-safe as far as the stream is.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lost = stream is None

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError:
                self._lost = True
        return len(text)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except OSError:
                self._lost = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_console() -> Console:
    """Return a console that shows progress on stderr, for as long as somebody reads it."""
    return Console(file=Unheard(sys.stderr))  # type: ignore[arg-type]
