"""What numbers entries hold: norms of their rows, mean and deviation, and what is no number."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PER_OCTAVE = 16  # ranges of a norm's histogram, each 4 % wide
_PART = 1 << 20  # numbers that are looked at in one go, as float64


@dataclass(frozen=True)
class Histogram:
    """How many numbers lie in each range: ``counts[i]`` are at least ``edges[i]`` and below ``edges[i + 1]``.

    Ranges follow one another without a gap; both are empty where there is no number.
    """

    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()


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
        """Sum up lengths, ``[n]``, by at most so many ranges."""
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


def equal_ranges(numbers: NDArray[np.int64], most: int) -> Histogram:
    """Count integers by at most so many ranges of one round width: 1, 2 or 5 times a power of ten."""
    low, high = int(numbers.min()), int(numbers.max())
    widths = (step * 10**power for power in range(19) for step in (1, 2, 5))
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


@dataclass(frozen=True)
class Statistics:
    """Of rows of activations, one a token.

    A norm is a row's Euclidean one; rows that hold NaN or infinity have none. Mean and standard deviation are of all
    finite numbers. None where there is nothing to take them of.
    """

    tokens: int
    norm_min: float | None
    norm_mean: float | None
    norm_max: float | None
    mean: float | None
    std: float | None
    nan: int
    infinite: int
    zero_rows: int  # whose numbers are all 0
    norms: Histogram  # of those above 0


class Numbers:
    """Takes in rows piece by piece and knows their statistics, in bounded memory. Not thread-safe."""

    def __init__(self) -> None:
        self._tokens = self._nan = self._infinite = self._zero = 0
        self._count, self._mean, self._squares = 0, 0.0, 0.0  # of finite numbers; squares of what is off the mean
        self._rows, self._norm_sum = 0, 0.0
        self._low, self._high = math.inf, -math.inf
        self._norms = LogCounts()

    def add(self, rows: NDArray[Any]) -> None:
        """Take in rows, ``[tokens, hidden]``, floating point."""
        self._tokens += len(rows)
        step = max(1, _PART // max(1, rows.shape[1]))
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            with np.errstate(invalid="ignore"):  # a signalling NaN is one all the same
                if part.dtype == np.float16:  # of which NumPy takes six times as long to make float64 at once
                    part = part.astype(np.float32)
                self._add(part.astype(np.float64))

    def _add(self, rows: NDArray[np.float64]) -> None:
        numbers, whole, finite = rows.reshape(-1), rows, np.isfinite(rows)
        if not finite.all():
            nan = int(np.isnan(rows).sum())
            self._nan += nan
            self._infinite += int(finite.size - finite.sum()) - nan
            numbers, whole = rows[finite], rows[finite.all(axis=1)]
        if numbers.size:
            # Chan, Golub and LeVeque 1979: two parts' means and squares give the whole's, without cancellation.
            mean = float(numbers.mean())
            off, count = mean - self._mean, self._count + numbers.size
            around = numbers - mean
            self._squares += float(np.vdot(around, around)) + off**2 * self._count * numbers.size / count
            self._mean += off * numbers.size / count
            self._count = count
        if len(whole):
            norms = np.sqrt(np.einsum("ij,ij->i", whole, whole))
            self._rows += len(norms)
            self._norm_sum += float(norms.sum())
            self._low, self._high = min(self._low, float(norms.min())), max(self._high, float(norms.max()))
            self._zero += int((norms == 0).sum())
            if norms.any():
                self._norms.add(norms[norms > 0])

    def statistics(self) -> Statistics:
        return Statistics(
            tokens=self._tokens,
            norm_min=self._low if self._rows else None,
            norm_mean=self._norm_sum / self._rows if self._rows else None,
            norm_max=self._high if self._rows else None,
            mean=self._mean if self._count else None,
            std=math.sqrt(self._squares / self._count) if self._count else None,
            nan=self._nan,
            infinite=self._infinite,
            zero_rows=self._zero,
            norms=self._norms.histogram(),
        )
