"""One iteration of a reader: its batches, read ahead by threads and handed over one by one."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CorruptEntryError, MissingEntryError, ShapeError
from actcache.format.keys import key_list
from actcache.io.workers import ProcessLock
from actcache.reader.cursor import Cursor
from actcache.reader.delivery import BatchMembers, Delivered, Delivery, padded
from actcache.reader.fetch import EntryInfo, HostBatch, OwnSource, Source, fetch
from actcache.reader.labels import Labels
from actcache.reader.prefetch import Helpers, Prefetch
from actcache.reader.stats import ReaderStats

_AHEAD = 2  # batches whose rows the operating system is asked for before they are read
_AT_ONCE = 2  # batches that are read at a time while rows come from a disk
_MOST_SILENT = 16  # batches that are read without an announcement, at most
_TRIES = 5  # each finds what a batch is by then
_COUNTING = ProcessLock()  # several iterations of one reader count together


@dataclass(frozen=True)
class MissComputer:
    """Computes what is missing, for ``on_missing="compute"``. Called by the consumer's thread."""

    lengths: Callable[[NDArray[np.int64]], NDArray[np.int64]]  # positions in the keys given -> tokens
    compute: Callable[[NDArray[np.int64], Sequence[bytes]], None]  # (positions, corrupt keys): puts their entries
    flush: Callable[[], None]  # makes them durable
    refresh: Callable[[], object] = lambda: None  # sees what other ranks have stored


class ReadingClock:
    """Counts the seconds in which something was read, those in which two batches were once. Under ``_COUNTING``."""

    def __init__(self) -> None:
        self._until = 0.0

    def passed(self, begin: float, end: float) -> float:
        """Return what a read from ``begin`` to ``end`` adds, of reads told in the order of their ends."""
        seconds = max(0.0, end - max(begin, self._until))
        self._until = max(self._until, end)
        return seconds


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
    clock: ReadingClock = field(default_factory=ReadingClock)
    columns: tuple[str, ...] = ()  # of the caller's own, that are delivered


@dataclass(frozen=True)
class _Missing:
    """Takes the place of a batch that cannot be read before some of its documents are computed."""

    members: NDArray[np.int64]
    corrupt: list[bytes]


_Items = Generator[Delivered | _Missing, None, None]


class Epoch(Iterator[Any]):
    """Yields ``Batch`` or ``PackedBatch``. ``close`` ends it; so does leaving it to the collector.

    It begins, and asks ``cursor`` for its batches, when it is asked for the first one: trainers call ``iter`` to see
    whether they may, and some say only then which epoch it is. ``on_stats`` is called with the statistics when the
    consumer has finished with a batch, and at the end.
    """

    _items: Prefetch[Delivered | _Missing] | _Items | None = None
    _closed = False

    def __init__(
        self, work: Work, delivery: Delivery, cursor: Cursor, on_stats: Callable[[ReaderStats], object] | None = None
    ) -> None:
        self._work, self._delivery, self._cursor, self._on_stats = work, delivery, cursor, on_stats
        self._start = cursor.next_start()
        self._delivered = 0
        self._stepping: float | None = None  # since when the consumer has had a batch

    def _begin(self) -> Prefetch[Delivered | _Missing] | _Items:
        epoch = self._cursor.begin(self._start)
        if self._work.miss_computer is not None:  # another rank may have computed what this one reads now
            self._work.miss_computer.refresh()
        self._reached = epoch.reached
        read: Iterator[Read | _Missing] = _produce(self._work, self._delivery, epoch.batches)
        if (
            self._work.depth and self._delivery.decodes
        ):  # one batch is decoded while the next is on its way from the disk
            read = Prefetch(read, 1, lambda seconds, ready: None)
        produce = _delivered(self._work, self._delivery, read)
        if not self._work.depth:
            return produce
        # The thread's iterator must not refer to this one: in a cycle, only the collector would end the thread.
        counting = weakref.WeakMethod(self._waited)

        def waited(seconds: float, ready: int) -> None:
            if (count := counting()) is not None:
                count(seconds, ready)

        return Prefetch(produce, self._work.depth, waited)

    def __next__(self) -> Any:
        work = self._work
        if self._stepping is not None:
            work.stats.step_seconds += time.perf_counter() - self._stepping
            self._stepping = None
            self._tell()  # here, where a failure of whoever listens leaves no batch out
        if self._items is None:
            if self._closed:
                raise StopIteration
            self._items = self._begin()
        try:
            item = next(self._items)
        except StopIteration:
            if self._delivered + 1 == len(self._reached):
                self._moved(self._reached[-1][0] - 1)
                if work.miss_computer is not None:
                    work.miss_computer.flush()
                work.stats.epochs += 1
                self._tell()
            raise
        try:
            if isinstance(item, _Missing):
                item = read_computed(work, self._delivery, item.members, item.corrupt)
            batch = self._delivery.arrive(item)
        except BaseException:
            self.close()  # as after a failure of the thread: to go on would leave this batch out
            raise
        self._moved(self._reached[self._delivered][0])
        work.stats.batches += 1
        self._stepping = time.perf_counter()
        return batch

    def _moved(self, epoch: int) -> None:
        reached = self._reached[self._delivered]
        self._delivered += 1
        self._cursor.moved(reached, epoch)

    def close(self) -> None:
        """End the iteration; its thread has ended when this returns. Does nothing the second time."""
        self._closed = True
        if self._items is not None:
            self._items.close()
        else:
            self._cursor.take_back(self._start)

    def __del__(self) -> None:
        if self._items is None and not self._closed:
            self._cursor.take_back(self._start)

    def _waited(self, seconds: float, ready: int) -> None:
        stats = self._work.stats
        stats.wait_seconds += seconds
        stats.ready += ready
        if not self._delivered:
            stats.first_seconds += seconds

    def _tell(self) -> None:
        if self._on_stats is not None:
            with _COUNTING:
                counted = replace(self._work.stats)
            self._on_stats(counted)


def _delivered(work: Work, delivery: Delivery, read: Iterator[Read | _Missing]) -> _Items:
    """Send what was read on its way; closes ``read``."""
    try:
        for item in read:
            yield item if isinstance(item, _Missing) else deliver(work, delivery, item)
            del item  # or it would hold a buffer for as long as the next is read
    finally:
        if (close := getattr(read, "close", None)) is not None:
            close()


def _produce(
    work: Work, delivery: Delivery, batches: list[NDArray[np.int64]]
) -> Generator[Read | _Missing, None, None]:
    """Read batches. The thread that reads ahead runs this; it knows no iteration, which can be collected meanwhile.

    As long as rows come from a disk, the next batch is asked for while one is: or the disk has nothing to do from the
    last answer for one batch to the first question for the next.
    """
    asked, silent, next_asked = 0, 0, 0
    helpers, reading = Helpers(_AT_ONCE), deque[Future[Read | _Missing]]()
    try:
        for number, members in enumerate(batches):
            # To announce a batch can take as long as to read one: not before the first ones are there.
            ahead = _AHEAD if number >= _AT_ONCE or not work.depth else 0
            while asked < min(number + 1 + ahead, len(batches)):
                # As long as all is in memory, fewer and fewer batches are announced.
                if asked >= next_asked:
                    silent = 0 if work.source.read_ahead(work.keys[batches[asked]]) else min(silent + 1, _MOST_SILENT)
                    next_asked = asked + 1 + silent
                asked += 1
            at_once = _AT_ONCE if work.depth and not silent else 1
            if at_once == 1 and not reading:
                yield _read(work, delivery, members)
                continue
            reading.append(helpers.submit(_read, work, delivery, members))
            while len(reading) >= at_once:
                yield reading.popleft().result()
        while reading:
            yield reading.popleft().result()
    finally:
        helpers.close()
        wait(reading)  # they use what whoever closes this may close next


def _read(work: Work, delivery: Delivery, members: NDArray[np.int64]) -> Read | _Missing:
    """Read a batch, unless some of it has to be computed first."""
    if work.miss_computer is not None and (work.source.lengths(work.keys[members]) == 0).any():
        return _Missing(members, [])
    try:
        return read_batch(work, delivery, members)
    except CorruptEntryError as error:
        if work.miss_computer is None:
            raise
        return _Missing(members, error.keys)


def read_computed(work: Work, delivery: Delivery, members: NDArray[np.int64], corrupt: Sequence[bytes]) -> Delivered:
    """Have what is missing of some documents, or corrupt, computed and stored, then read them like any others."""
    assert work.miss_computer is not None
    start = time.perf_counter()
    keys, bad = work.keys[members], set(corrupt)
    missing = (work.source.lengths(keys) == 0) | np.array([key in bad for key in key_list(keys)], bool)
    work.miss_computer.compute(work.origins[members[missing]], corrupt)
    work.stats.compute_seconds += time.perf_counter() - start
    return read_and_deliver(work, delivery, members)


def read_and_deliver(work: Work, delivery: Delivery, members: NDArray[np.int64]) -> Delivered:
    """Read the documents at some positions of ``work.keys`` and send them on their way; raises as ``read_batch``."""
    return deliver(work, delivery, read_batch(work, delivery, members))


@dataclass(frozen=True)
class Read:
    """A batch as it was read, in the codec's stored form."""

    host: HostBatch
    members: BatchMembers


def read_batch(work: Work, delivery: Delivery, members: NDArray[np.int64]) -> Read:
    """Read the documents at some positions of ``work.keys``.

    Raises:
        MissingEntryError: some are gone.
        ShapeError: an entry has not as many tokens as its label.
        CorruptEntryError, StoreError, DataError: see ``Space.read_into``.
    """
    start, keys, stats = time.perf_counter(), work.keys.take(members, axis=0), work.stats
    own: dict[str, NDArray[Any]] = {}
    if work.columns:
        read, own = _with_columns(work, delivery, members)
    else:
        read = _fetched(work, delivery, keys, members)
    done = time.perf_counter()
    try:
        if not read.lengths.all():
            gone, where = key_list(keys[read.lengths == 0]), work.documents[members][int(np.argmin(read.lengths))]
            raise MissingEntryError(
                f"{len(gone)} documents of this batch were deleted since the reader was made, the first at position "
                f"{where}: fill them again and make a new reader",
                gone,
            )
        width = int(read.lengths.max(initial=0)) if delivery.padded else None
        labels = None if work.labels is None else work.labels.of_batch(members, read.lengths, width)
        columns = {name: padded(own[name], read.lengths, width) for name in work.columns}
    except BaseException:
        delivery.buffers.give_back(read.values, None)
        raise
    with _COUNTING:
        stats.read_seconds += work.clock.passed(start, done)
    return Read(read, BatchMembers(keys, work.documents[members], labels, columns))


def deliver(work: Work, delivery: Delivery, read: Read) -> Delivered:
    """Send what was read on its way to the device."""
    start, stats, lengths, values = time.perf_counter(), work.stats, read.host.lengths, read.host.values
    tokens = int(lengths.sum())
    delivered = delivery.deliver(read.host, read.members)
    with _COUNTING:
        stats.deliver_seconds += time.perf_counter() - start
        count_spent(stats, delivery)
        stats.documents += len(lengths)
        stats.tokens += tokens
        stats.nbytes += tokens * values.itemsize * values.shape[-1]
    return delivered


def _fetched(work: Work, delivery: Delivery, keys: NDArray[np.uint8], members: NDArray[np.int64]) -> HostBatch:
    info, ids = work.info[members], delivery.id_buffers
    return fetch(work.source, keys, delivery.buffers, packed=delivery.packed, info=info, id_buffers=ids)


def _with_columns(
    work: Work, delivery: Delivery, members: NDArray[np.int64]
) -> tuple[HostBatch, dict[str, NDArray[Any]]]:
    """Return the rows of some documents and their own columns, packed, of one state of the space."""
    keys, source = work.keys[members], cast(OwnSource, work.source)
    for _ in range(_TRIES):
        before = source.checksums(keys)
        read = _fetched(work, delivery, keys, members)
        try:
            found = source.read_columns(keys)
            if (found.lengths == read.lengths).all() and (before == source.checksums(keys)).all():
                return read, found.arrays
        except BaseException:
            delivery.buffers.give_back(read.values, None)
            raise
        delivery.buffers.give_back(read.values, None)
    raise ShapeError("documents of this batch were replaced by ones without columns: put them again with theirs")


def count_spent(stats: ReaderStats, delivery: Delivery) -> None:
    """Add what copying and decoding have taken by now."""
    copied, decoded = delivery.spent()
    stats.copy_seconds += copied
    stats.decode_seconds += decoded
