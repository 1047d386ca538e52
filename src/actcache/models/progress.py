"""The progress of a fill: documents, how many of them were computed, and tokens."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from actcache.io.progress import Meter


class FillProgress:
    """Counts documents and tokens, and shows them; a context manager. Not thread-safe.

    There is no ETA without a ``total`` of documents. The ``console`` is stderr's by default.
    """

    def __init__(self, total: int | None, *, show: bool = True, console: Console | None = None) -> None:
        self._meter = Meter("fill", "documents", lasting=True, show=show, console=console)
        self._total = total
        self._documents = self._computed = self._tokens = 0

    def advance(self, documents: int, computed: int = 0, tokens: int = 0) -> None:
        """Report that ``documents`` more are stored, of which ``computed``, with ``tokens``, were computed now."""
        self._documents += documents
        self._computed += computed
        self._tokens += tokens
        self._meter("", self._documents, self._total, f"{self._computed} computed", {"tokens": self._tokens})

    def __enter__(self) -> FillProgress:
        self.advance(0)
        return self

    def __exit__(self, *error: Any) -> None:
        self._meter.__exit__(*error)
