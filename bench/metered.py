"""Processor time beside wall time: what a client costs, whatever limits the server."""

from __future__ import annotations

import resource
from collections.abc import Callable


class Metered:
    """A contestant whose processor time (user and system, all threads) is noted; the round that warms up is left out.

    Args:
        run: does the round's work; see ``rounds.take_turns``.
    """

    def __init__(self, run: Callable[[int], float | None]) -> None:
        self._run = run
        self.seconds: list[float] = []  # by call

    def __call__(self, turn: int) -> float:
        before = _cpu()
        own = self._run(turn)
        self.seconds.append(_cpu() - before)
        return own or 0.0

    def per_megabyte(self, nbytes: int) -> float:
        """Return the milliseconds that a megabyte took, of ``nbytes`` in all timed rounds."""
        return 1e9 * sum(self.seconds[1:]) / nbytes


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
