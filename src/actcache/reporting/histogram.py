"""Histograms: of lengths, whose range is known, and of norms, whose range is not."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEPS = (1, 2, 5)
_PER_OCTAVE = 16  # ranges of a norm's histogram, each 4 % wide


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie in each range: ``counts[i]`` are at least ``edges[i]`` and below ``edges[i + 1]``.

    Ranges follow one another without a gap; both are empty where there is no number.
    """

    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the histogram as JSON values."""
        return {"edges": list(self.edges), "counts": list(self.counts)}


@dataclass(frozen=True)
class Lengths:
    """The lengths of entries, in tokens; 0 throughout where there are none."""

    entries: int
    shortest: int
    median: float
    mean: float
    p95: int  # the least length that 95 % of the entries do not exceed
    longest: int
    histogram: Histogram

    @classmethod
    def of(cls, lengths: NDArray[np.int64], ranges: int = 24) -> Lengths:
        """Sum up the lengths of entries, ``[n]``, by at most so many ranges."""
        if not len(lengths):
            return cls(0, 0, 0.0, 0.0, 0, 0, Histogram())
        return cls(
            entries=len(lengths),
            shortest=int(lengths.min()),
            median=float(np.median(lengths)),
            mean=float(lengths.mean()),
            p95=int(np.percentile(lengths, 95, method="inverted_cdf")),
            longest=int(lengths.max()),
            histogram=equal_ranges(lengths, ranges),
        )

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {**vars(self), "histogram": self.histogram.to_json()}


def equal_ranges(numbers: NDArray[np.int64], most: int) -> Histogram:
    """Count integers by at most so many ranges of one round width: 1, 2 or 5 times a power of ten."""
    low, high = int(numbers.min()), int(numbers.max())
    widths = (step * 10**power for power in range(19) for step in _STEPS)
    width = next(width for width in widths if high // width - low // width < most)
    first = low // width
    counts = np.bincount(numbers // width - first)
    edges = [(first + i) * width for i in range(len(counts) + 1)]
    return Histogram(tuple(edges), tuple(counts.tolist()))


class LogCounts:
    """Counts positive numbers of any range in bounded memory, by ranges of equal ratio. Not thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Count numbers, ``[n]``; each is above 0 and finite."""
        ranges, counts = np.unique(np.floor(np.log2(numbers) * _PER_OCTAVE).astype(np.int64), return_counts=True)
        self._counts.update(dict(zip(ranges.tolist(), counts.tolist(), strict=True)))

    def histogram(self, most: int = 32) -> Histogram:
        """Return the counts by at most so many ranges, neighbours joined."""
        if not self._counts:
            return Histogram()
        low, high = min(self._counts), max(self._counts)
        joined = math.ceil((high - low + 1) / most)
        counts = [0] * math.ceil((high - low + 1) / joined)
        for number, count in self._counts.items():
            counts[(number - low) // joined] += count
        edges = [2.0 ** ((low + i * joined) / _PER_OCTAVE) for i in range(len(counts) + 1)]
        return Histogram(tuple(edges), tuple(counts))
