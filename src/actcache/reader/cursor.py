"""Where a reader is in its epochs: what the next iteration begins with, and what a saved state says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError
from actcache.reader.order import EpochOrder, Order


@dataclass(frozen=True)
class EpochBatches:
    """What one iteration goes through.

    Attributes:
        batches: positions of each batch's documents in the reader's keys.
        reached: (epoch, documents consumed) after each batch, and after the last of all.
    """

    batches: list[NDArray[np.int64]]
    reached: list[tuple[int, int]]


@dataclass(eq=False)
class Start:
    """Where one iteration is to start."""

    epoch: int
    consumed: int  # documents of the epoch that were delivered before
    loaded: bool  # whether a saved state says so
    taken_back: bool = False


class Cursor:
    """The bookkeeping of one reader's iterations. Documents consumed are counted on all ranks together.

    Args:
        lengths: ``[n]`` tokens of each document.
        rank, ranks: which share of each round of batches is this reader's.
    """

    def __init__(self, order: Order, lengths: NDArray[np.int64], rank: int, ranks: int) -> None:
        self._order, self._lengths = order, lengths
        self._rank, self._ranks = rank, ranks
        self._next = Start(0, 0, False)
        self._reached = (0, 0)  # epoch and documents, of the iteration that was begun or advanced last
        self._asked: Start | None = None  # for last, until it begins
        self._counted: tuple[int, int] | None = None

    def batches_of_epoch(self) -> int:
        """Return the batches that a whole epoch has on this rank; where they differ, the coming one."""
        varies = self._order.max_tokens is not None or self._order.bucket
        epoch = self._next.epoch if varies else 0
        if self._counted is None or self._counted[0] != epoch:
            self._counted = epoch, sum(1 for _ in self._rounds(self._order.of_epoch(self._lengths, epoch), 0))
        return self._counted[1]

    def next_start(self) -> Start:
        """Hand out where an iteration is to start; the one after it has the next epoch."""
        self._asked = self._advance()
        return self._asked

    def _advance(self) -> Start:
        start = self._next
        self._next, self._reached = Start(start.epoch + 1, 0, False), (start.epoch, start.consumed)
        return start

    def take_back(self, start: Start | None) -> None:
        """Forget that an iteration was asked for, where it has not begun and none was asked for since."""
        if start is not None and start is self._asked:
            self._asked, start.taken_back = None, True
            self._next = Start(start.epoch, start.consumed, start.loaded)
            self._reached = start.epoch, start.consumed

    def begin(self, start: Start) -> EpochBatches:
        """Return what an iteration goes through that starts there.

        Raises:
            UsageError: there are fewer documents than ranks.
        """
        if start.taken_back:  # it was said meanwhile which epoch it is
            start = self._advance()
        elif start is self._asked:
            self._asked = None
        order = self._order.of_epoch(self._lengths, start.epoch)
        rounds = list(self._rounds(order, start.consumed))
        if start.consumed and not rounds and not start.loaded:
            # Whoever counts batches does not ask for one more, and so has not seen the end of that epoch.
            return self.begin(self._advance())
        batches = [order.sequence[slice(*batch[self._rank])] for batch in rounds]
        return EpochBatches(batches, [(start.epoch, batch[-1][1]) for batch in rounds] + [(start.epoch + 1, 0)])

    def moved(self, reached: tuple[int, int], before: int) -> None:
        """Take note of where an iteration is, unless it has just ended and another one has been begun since.

        Args:
            before: the epoch that it was in.
        """
        if reached[1] or self._next.epoch == before:
            self._next, self._reached = Start(*reached, self._next.loaded), reached
        elif self._reached[0] == before:  # it had no batches
            self._reached = reached

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; where that is the one that was loaded, it goes on where that was."""
        self.take_back(self._asked)
        if epoch != self._next.epoch or not self._next.loaded:
            self._next = Start(epoch, 0, self._next.loaded)
        self._reached = self._next.epoch, self._next.consumed

    @property
    def reached(self) -> tuple[int, int]:
        """Epoch and documents consumed of the iteration that was begun or advanced last."""
        return self._reached

    def load(self, epoch: int, consumed: int) -> None:
        """Have the next iteration go on there."""
        self.take_back(self._asked)
        self._next, self._reached = Start(epoch, consumed, True), (epoch, consumed)

    def _rounds(self, order: EpochOrder, start: int) -> Iterator[list[tuple[int, int]]]:
        try:
            yield from order.rounds(self._ranks, start)
        except ValueError as error:
            raise UsageError(f"{error}: give more documents, or run fewer ranks") from None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_asked": None}
