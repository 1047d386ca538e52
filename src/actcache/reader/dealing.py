"""How the rows of an epoch are dealt out to ranks: spans of whole mixes, cut where shares end.

Each rank reads its own mixes; only a mix in which one share ends and the next one begins is read by two. All ranks have
the same number of batches, and their shares differ by one row at most. What is left of an epoch can be dealt out anew,
to another number of ranks: every row that was not delivered is then somebody's, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError


class Span(NamedTuple):
    """Some rows of a mix, in the order in which they are delivered."""

    mix: int
    begin: int
    end: int | None  # None: to its end, which nobody has counted


@dataclass(frozen=True)
class Deal:
    """Rows dealt out to some ranks."""

    total: int
    ranks: int
    batch_size: int
    drop_last: bool

    @property
    def rounds(self) -> int:
        """How many batches each rank has."""
        return len(self.sizes(0))

    def sizes(self, rank: int) -> list[int]:
        """Return the rows of each batch of a rank."""
        whole, rest = divmod(self.total, self.ranks * self.batch_size)
        sizes = [self.batch_size] * whole
        if not rest or self.drop_last:
            return sizes
        if rest < self.ranks:
            # Too few for another round: the one before leaves it some.
            if not whole:
                raise UsageError(
                    f"{rest} rows are left for {self.ranks} ranks: give more documents, or run fewer ranks"
                )
            share = self._share(rank, self.ranks * self.batch_size + rest)
            last = [(share + 1) // 2, share // 2] if self.batch_size > 1 else [share]  # a row more in some of them
            return [*sizes[:-1], *last]
        return [*sizes, self._share(rank, rest)]

    def _share(self, rank: int, rows: int) -> int:
        return rows // self.ranks + (rank < rows % self.ranks)

    def begin(self, rank: int) -> int:
        """Return where a rank's rows begin among all of them."""
        return sum(sum(self.sizes(before)) for before in range(rank))


def cut(spans: Sequence[Span], begin: int, end: int | None) -> list[Span]:
    """Return rows ``begin`` to ``end`` of some spans, counted through; None: to the end."""
    found, at = [], 0
    for span in spans:
        if span.end is None:
            raise ValueError("these spans were not counted")
        size = span.end - span.begin
        first, last = max(begin - at, 0), size if end is None else min(end - at, size)
        if first < last:
            found.append(Span(span.mix, span.begin + first, span.begin + last))
        at += size
    return found


def remaining(spans: Sequence[Span], deal: Deal, rounds: int) -> list[Span]:
    """Return what all ranks of a deal have left after some of their batches."""
    left = []
    for rank in range(deal.ranks):
        sizes = deal.sizes(rank)
        begin = deal.begin(rank)
        left += cut(spans, begin + sum(sizes[:rounds]), begin + sum(sizes))
    return left


def counted(totals: NDArray[np.int64]) -> list[Span]:
    """Return all rows of mixes that have so many."""
    return [Span(mix, 0, total) for mix, total in enumerate(totals.tolist()) if total]
