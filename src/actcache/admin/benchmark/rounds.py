"""Interleaved rounds: contestants take turns, and what counts are ratios within one round.

Machines are noisy and drift; two contestants that run within the same second see the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import StepProgress

#: Seconds of a contestant, ``[rounds]``.
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """The median of some figures, and the interval that holds the true one with 95 % confidence (order statistics)."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float] | NDArray[np.float64]) -> Spread:
        ordered = np.sort(np.asarray(figures, float))
        count = len(ordered)
        half = 0.98 * np.sqrt(count)  # normal approximation of the binomial at p = 1/2
        low, high = int(max(0, np.floor(count / 2 - half))), int(min(count - 1, np.ceil(count / 2 + half)))
        return cls(float(np.median(ordered)), float(ordered[low]), float(ordered[high]))

    def __str__(self) -> str:
        return self.text(2)

    def text(self, decimals: int) -> str:
        return f"{self.median:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def take_turns(
    contestants: Mapping[str, Callable[[int], float]],
    rounds: int,
    before: Callable[[], None] = lambda: None,
    progress: StepProgress = lambda done, total: None,
) -> dict[str, Seconds]:
    """Time ``contestant(round)`` for every contestant in every round, each in another order; return seconds by name.

    What a contestant returns, if positive, is its own count of seconds; else the call is timed. ``before`` is called,
    untimed, before every turn, and ``progress`` is told how many turns are done and how many there are.
    """
    names = list(contestants)
    seconds = {name: np.zeros(rounds) for name in names}
    order = np.random.default_rng(0)
    total = (rounds + 1) * len(names)
    for number in range(-1, rounds):  # round -1 warms up and does not count
        for place, name in enumerate(order.permutation(names).tolist()):
            progress((number + 1) * len(names) + place, total)
            before()
            start = time.perf_counter()
            own = contestants[name](max(number, 0))
            elapsed = time.perf_counter() - start
            if number >= 0:
                seconds[name][number] = own if own > 0 else elapsed
    progress(total, total)
    return seconds


def fastest(names: Iterable[str], seconds: Mapping[str, Seconds]) -> str:
    """Return which contestant has the least median."""
    return min(names, key=lambda name: float(np.median(seconds[name])))
