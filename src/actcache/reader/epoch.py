"""One iteration of a reader: its batches, read ahead by a thread and handed over one by one."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptEntryError, MissingEntryError, ShapeError
from actcache.format.keys import key_list
from actcache.reader.delivery import BatchMembers, Delivered, Delivery
from actcache.reader.fetch import EntryInfo, Source, fetch
from actcache.reader.labels import Labels
from actcache.reader.prefetch import Prefetch
from actcache.reader.stats import ReaderStats

_AHEAD = 2  # batches whose rows the operating system is asked for before they are read
_COUNTING = threading.Lock()  # several iterations of one reader count together


def _after_fork() -> None:
    global _COUNTING
    _COUNTING = threading.Lock()  # a thread that the child does not have may have held it


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class MissComputer:
    """Computes what is missing, for ``on_missing="compute"``. Called by the consumer's thread."""

    lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]]  # positions in the keys given -> tokens
    compute: Callable[[NDArray[np.int64], Sequence[bytes]], None]  # (positions, corrupt keys): puts their entries
    flush: Callable[[], None]  # makes them durable


@dataclass(frozen=True)
class Work:
    """What all iterations of a reader share."""

    source: Source
    keys: NDArray[np.uint8]  # [n, 32]
    documents: NDArray[np.int64]  # [n] as delivered
    labels: Labels | None
    origins: NDArray[np.int64]  # [n] positions in the keys that the reader was given
    info: EntryInfo  # [n]
    depth: int
    miss_computer: MissComputer | None
    stats: ReaderStats = field(default_factory=ReaderStats)


@dataclass(frozen=True)
class _Absent:
    """Takes the place of a batch that cannot be read before some of its documents are computed."""

    which: NDArray[np.int64]
    corrupt: list[bytes]


_Items = Generator[Delivered | _Absent, None, None]


@dataclass(frozen=True)
class Begun:
    """What an iteration goes through.

    Attributes:
        batches: positions of each batch's documents in ``work.keys``.
        positions: (epoch, documents consumed) after each batch, and after the last of all.
    """

    batches: list[NDArray[np.int64]]
    positions: list[tuple[int, int]]


class Epoch(Iterator[Any]):
    """Yields ``Batch`` or ``PackedBatch``. ``close`` ends it; so does leaving it to the collector.

    It begins when it is asked for its first batch: trainers call ``iter`` to see whether they may, and some say only
    then which epoch it is.

    Args:
        begin: called once, then.
        not_begun: called where that is not going to happen.
        moved: called with the position that was reached, and the epoch before it.
        told: called with the statistics when the consumer has finished with a batch, and at the end.
    """

    _items: Prefetch[Delivered | _Absent] | _Items | None = None
    _closed = False

    def __init__(
        self,
        work: Work,
        to: Delivery,
        begin: Callable[[], Begun],
        not_begun: Callable[[], None],
        moved: Callable[[tuple[int, int], int], None],
        told: Callable[[ReaderStats], object] | None = None,
    ) -> None:
        self._work, self._begin, self._not_begun, self._moved, self._told = work, begin, not_begun, moved, told
        self._delivered = 0
        self._stepping: float | None = None  # since when the consumer has had a batch
        self._delivery = to

    def _start(self) -> Prefetch[Delivered | _Absent] | _Items:
        begun = self._begin()
        self._positions = begun.positions
        produce = _produce(self._work, self._delivery, begun.batches)
        if not self._work.depth:
            return produce
        # The thread's iterator must not refer to this one: in a cycle, only the collector would end the thread.
        counting = weakref.WeakMethod(self._waited)

        def waited(seconds: float, ready: int) -> None:
            if (count := counting()) is not None:
                count(seconds, ready)

        return Prefetch(produce, self._work.depth, waited)

    def __next__(self) -> Any:
        stats = self._work.stats
        if self._stepping is not None:
            stats.step_seconds += time.perf_counter() - self._stepping
            self._stepping = None
            self._tell()  # here, where a failure of whoever listens leaves no batch out
        if self._items is None:
            if self._closed:
                raise StopIteration
            self._items = self._start()
        try:
            item = next(self._items)
        except StopIteration:
            if self._delivered + 1 == len(self._positions):
                self._delivered += 1
                self._moved(self._positions[-1], self._positions[-1][0] - 1)
                if self._work.miss_computer is not None:
                    self._work.miss_computer.flush()
                stats.epochs += 1
                self._tell()
            raise
        try:
            if isinstance(item, _Absent):
                item = read_computed(self._work, self._delivery, item.which, item.corrupt)
            batch = self._delivery.arrive(item)
        except BaseException:
            self.close()  # as after a failure of the thread: to go on would leave this batch out
            raise
        self._moved(self._positions[self._delivered], self._positions[self._delivered][0])
        self._delivered += 1
        stats.batches += 1
        self._stepping = time.perf_counter()
        return batch

    def close(self) -> None:
        """End the iteration; its thread has ended when this returns. Does nothing the second time."""
        self._closed = True
        if self._items is not None:
            self._items.close()
        else:
            self._not_begun()

    def __del__(self) -> None:
        if self._items is None and not self._closed:
            self._not_begun()

    def _waited(self, seconds: float, ready: int) -> None:
        stats = self._work.stats
        stats.wait_seconds += seconds
        stats.ready += ready
        if not self._delivered:
            stats.first_seconds += seconds

    def _tell(self) -> None:
        if self._told is not None:
            with _COUNTING:
                told = replace(self._work.stats)
            self._told(told)


def _produce(work: Work, to: Delivery, batches: list[NDArray[np.int64]]) -> _Items:
    """Read batches. The thread that reads ahead runs this; it knows no iteration, which can be collected meanwhile."""
    asked = 0
    for number, which in enumerate(batches):
        while asked < min(number + 1 + _AHEAD, len(batches)):
            work.source.read_ahead(work.keys[batches[asked]])
            asked += 1
        if work.miss_computer is not None and (work.source.lengths(work.keys[which]) == 0).any():
            yield _Absent(which, [])
            continue
        try:
            item: Delivered | _Absent = read_batch(work, to, which)
        except CorruptEntryError as error:
            if work.miss_computer is None:
                raise
            item = _Absent(which, error.keys)
        yield item
        del item  # or it would hold a buffer for as long as the next is read


def read_computed(work: Work, to: Delivery, which: NDArray[np.int64], corrupt: Sequence[bytes]) -> Delivered:
    """Have what is missing of some documents, or corrupt, computed and stored, then read them like any others."""
    assert work.miss_computer is not None
    start = time.perf_counter()
    keys = work.keys[which]
    missing = work.source.lengths(keys) == 0
    found_corrupt = set(corrupt)
    missing |= np.array([key in found_corrupt for key in key_list(keys)], bool)
    work.miss_computer.compute(work.origins[which[missing]], corrupt)
    work.stats.compute_seconds += time.perf_counter() - start
    return read_batch(work, to, which)


def count_spent(stats: ReaderStats, to: Delivery) -> None:
    """Add what copying and decoding have taken by now."""
    copied, decoded = to.spent()
    stats.copy_seconds += copied
    stats.decode_seconds += decoded


def read_batch(work: Work, to: Delivery, which: NDArray[np.int64]) -> Delivered:
    """Read the documents at some positions of ``work.keys``.

    Raises:
        MissingEntryError: some are gone.
        CorruptEntryError, StoreError, DataError: see ``Space.read_into``.
        ShapeError: an entry has not as many tokens as its label.
    """
    start, keys = time.perf_counter(), work.keys[which]
    read = fetch(work.source, keys, to.buffers, packed=to.packed, info=work.info[which])
    done = time.perf_counter()
    if not read.lengths.all():
        to.buffers.give_back(read.values, None)
        gone = key_list(keys[read.lengths == 0])
        raise MissingEntryError(
            f"{len(gone)} documents of this batch were deleted since the reader was made, the first at position "
            f"{work.documents[which][int(np.argmin(read.lengths))]}: fill them again and make a new reader",
            gone,
        )
    labels = None
    if work.labels is not None:
        width = int(read.lengths.max(initial=0)) if to.padded else None
        try:
            labels = work.labels.of_batch(which, read.lengths, width)
        except ShapeError:
            to.buffers.give_back(read.values, None)
            raise
    delivered = to.deliver(read, BatchMembers(keys, work.documents[which], labels))
    tokens = int(read.lengths.sum())
    with _COUNTING:
        stats = work.stats
        stats.read_seconds += done - start
        stats.deliver_seconds += time.perf_counter() - done
        count_spent(stats, to)
        stats.documents += len(which)
        stats.tokens += tokens
        stats.nbytes += tokens * read.values.itemsize * read.values.shape[-1]
    return delivered
