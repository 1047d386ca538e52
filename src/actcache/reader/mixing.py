"""How an epoch of rows is mixed: pure functions of (seed, epoch, lengths).

Documents that lie one after another are joined in stretches, which are read as a whole. Stretches come in random order;
as many as fit the buffer are a mix, and all rows of a mix come in random order. So a batch of n rows is drawn at random
from the rows of one mix, and the documents of a mix are drawn at random, stretch by stretch, from the whole corpus.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.format.ragged import offsets_of, row_indices, runs
from actcache.io import loops
from actcache.io.cached import cached_property

_STRETCHES = 64  # that a mix has at least, where documents are short enough


@dataclass(frozen=True)
class Mixing:
    """Which rows are mixed with which.

    Args:
        lengths: ``[n]`` rows of each document, in the order in which they lie; 1 or more.
        capacity: rows that are mixed at once, at most.
        stretch: rows that are read one after another, about.
    """

    lengths: NDArray[np.int64]
    capacity: int
    stretch: int
    seed: int

    @cached_property
    def cuts(self) -> NDArray[np.int64]:
        """Where stretches begin and end, in documents, ``[stretches + 1]``."""
        stretch = max(1, min(self.stretch, self.capacity // _STRETCHES))
        return np.array([*(run.start for run in runs(self.lengths, stretch)), len(self.lengths)], np.int64)

    @cached_property
    def _rows(self) -> NDArray[np.int64]:
        """Rows of each stretch."""
        return np.add.reduceat(self.lengths, self.cuts[:-1])

    def of_epoch(self, epoch: int) -> Mixes:
        """Return the mixes of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._rows))
        begins = offsets_of(self._rows[order])
        total, largest = int(begins[-1]), int(self._rows.max())
        # All of about one size: a small last one would mix few documents. A cut comes at most one stretch too late.
        count = math.ceil(total / max(1, self.capacity - largest)) if total > self.capacity else 1
        inner = np.searchsorted(begins, np.arange(1, count) * (total / count))
        return Mixes(self, epoch, order, np.unique(np.r_[0, inner, len(order)]))


@dataclass(frozen=True)
class Mixes:
    """The mixes of one epoch."""

    mixing: Mixing
    epoch: int
    order: NDArray[np.int64]  # the stretches
    bounds: NDArray[np.int64]  # [mixes + 1] where each mix begins and ends in ``order``

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def documents(self, number: int) -> NDArray[np.int64]:
        """Return the documents of a mix, in the order in which they are read: as they lie."""
        stretches = np.sort(self.order[self.bounds[number] : self.bounds[number + 1]])
        cuts = self.mixing.cuts
        return row_indices(cuts[stretches], cuts[stretches + 1] - cuts[stretches], None)

    def places(self, number: int, rows: int) -> NDArray[np.int64]:
        """Return where each row of a mix, in the order in which they are read, goes among all ``rows`` of it."""
        seed = np.random.SeedSequence([self.mixing.seed, self.epoch, number, 1]).generate_state(1, np.uint64)
        return loops.permutation(rows, int(seed[0]))

    def totals(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows each mix has, ``[mixes]``, where each document has so many, ``[n]``."""
        of_stretch = np.add.reduceat(rows, self.mixing.cuts[:-1])
        return np.add.reduceat(of_stretch[self.order], self.bounds[:-1])


def documents_mixed(lengths: NDArray[np.int64], count: int) -> float:
    """Return how many different documents ``count`` rows are of, on average, that are drawn from documents of these
    lengths without putting any back."""
    total = int(lengths.sum())
    if count >= total:
        return float(len(lengths))
    # None of a document's rows is among them: C(total - length, count) / C(total, count), by logarithms of factorials.
    kinds, many = np.unique(lengths, return_counts=True)
    logs = np.array([_log_choose(total - int(length), count) for length in kinds]) - _log_choose(total, count)
    return float((many * -np.expm1(logs)).sum())


def _log_choose(n: int, k: int) -> float:
    return -math.inf if k > n else math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
