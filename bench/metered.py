"""Times: of an epoch, and of the processor beside the wall's: what a client costs, whatever limits the server."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from actcache.reader.reader import Reader


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


def epoch_seconds(reader: Reader, epoch: int) -> float:
    """Return how long a reader takes for an epoch."""
    reader.set_epoch(epoch)
    start = time.perf_counter()
    for _ in reader:
        pass
    return time.perf_counter() - start
