"""Rows of segments in an object store: all ranges of a batch are fetched at a time, into the caller's buffer.

A thread of the session fetches a range; the caller's thread that waits for it copies it, so that nobody writes to the
caller's buffer once the caller has been told of a failure.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Buffers, Expected
from actcache.errors import ClosedError, FormatError, SegmentGoneError
from actcache.format.ragged import PAYLOAD, VALUES, chunks, offsets_of
from actcache.io import loops
from actcache.io.loops import Column
from actcache.io.workers import ProcessLock, Workers
from actcache.segments.places.objects.blocks import BLOCK, CACHE_BYTES, CachedBlocks
from actcache.segments.places.objects.client import Data, ObjectNotFoundError
from actcache.segments.places.objects.session import Session
from actcache.segments.rows import Frames, RowPlan, RowSource, of_frames
from actcache.segments.segment import Segment

_GAP = 64 << 10  # bytes that are read along rather than asked around
_MOST = 8 << 20  # bytes of one request, unless a single entry is larger
_WINDOW = 64 << 20  # bytes that are fetched before the caller has taken what came before
_MOST_AHEAD = 3  # batches that are fetched because somebody said that they will be needed
_SMALL = 64  # bytes a row: such a column is read in blocks, which are kept

Locate = Callable[[Segment, str], str]
Read = Callable[[int, int], None]


@dataclass(frozen=True)
class Ranges:
    """What has to be fetched for a batch, in the order in which it is needed."""

    segments: NDArray[np.int64]  # [m]
    begins: NDArray[np.int64]  # [m] bytes from the start of the file
    ends: NDArray[np.int64]  # [m]
    of_entry: NDArray[np.int64]  # [n] the range that has the entry; -1 where it has no rows
    users: NDArray[np.int64]  # [m] how many entries want the range

    def digest(self) -> bytes:
        """Return what is equal for equal ranges."""
        return b"".join(array.tobytes() for array in (self.segments, self.begins, self.ends))


def coalesce(
    segments: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64], gap: int = _GAP, most: int = _MOST
) -> Ranges:
    """Join entries of one segment that lie up to ``gap`` bytes apart; a range takes in no entry beyond ``most`` bytes.

    ``segments``, ``begins`` and ``ends``, ``[n]``, are the bytes of entries, which do not overlap unless they are one.
    """
    of_entry = np.full(len(begins), -1, np.int64)
    wanted = np.flatnonzero(ends > begins)
    if not len(wanted):
        none = np.empty(0, np.int64)
        return Ranges(none, none, none, of_entry, none)
    order = wanted[np.lexsort((begins[wanted], segments[wanted]))]
    segment, begin, end = segments[order], begins[order], ends[order]
    apart = np.ones(len(order), bool)
    apart[1:] = (segment[1:] != segment[:-1]) | (begin[1:] - end[:-1] > gap)
    run = np.cumsum(apart) - 1
    piece = (begin - begin[np.flatnonzero(apart)][run]) // most
    apart[1:] |= (piece[1:] != piece[:-1]) & (begin[1:] != begin[:-1])
    firsts = np.flatnonzero(apart)
    number = np.cumsum(apart) - 1
    # Those that are needed first are fetched first.
    needed = np.argsort(np.minimum.reduceat(order, firsts), kind="stable")
    rank = np.empty_like(needed)
    rank[needed] = np.arange(len(needed))
    of_entry[order] = rank[number]
    lasts = np.r_[firsts[1:], len(order)] - 1
    users = np.bincount(rank[number], minlength=len(firsts))
    return Ranges(segment[firsts][needed], begin[firsts][needed], end[lasts][needed], of_entry, users)


class FetchedRows(RowSource):
    """Implements ``RowSource``. Thread-safe; usable after a fork.

    The list of segments grows. ``locate`` leads from a segment and the name of a file in it to its key.
    """

    def __init__(self, session: Session, blocks: CachedBlocks, segments: list[Segment], locate: Locate) -> None:
        self._session, self._blocks, self._segments, self._locate = session, blocks, segments, locate
        self.frames = Frames(segments)
        self._ahead: OrderedDict[tuple[int, str, bytes], _Fetches] = OrderedDict()
        self._lock = ProcessLock()
        self._workers = Workers()

    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        reads, bad = [], np.empty(0, np.int64)
        frames: Column | None = None  # whose rows come from what is fetched
        for name, buffer in out.items():
            array, places = self.frames.column(plan, name)
            if array != name:
                begins = offsets_of(places.lengths)
                fetched = np.empty(int(begins[-1]), np.uint8)
                frames = of_frames(Column(buffer.strides[0], buffer, fetched, begins[:-1]), places)
                reads.append(self._prepare(array, places, fetched, None))
            else:
                reads.append(self._prepare(name, plan, buffer, width))
        self._workers.run_chunks(reads, chunks(plan.lengths, width, out))
        if frames is not None:
            bad = loops.gather([frames], plan.lengths, offsets_of(plan.lengths, width))
        # A pass of its own: what comes over a network never comes faster than it is digested.
        return bad if expected is None else np.union1d(bad, expected.wrong(out, plan.lengths, width))

    def _prepare(self, column: str, plan: RowPlan, out: NDArray[np.generic], width: int | None) -> Read:
        """Have the rows of a column fetched; return what brings those of entries first..last-1 into the buffer."""
        ranges, begins, row_bytes, small = self._ranges(column, plan)
        with self._lock:
            fetches = self._ahead.pop((os.getpid(), column, ranges.digest()), None)
        if fetches is None:
            fetches = _Fetches(self, column, ranges, small)
        places = offsets_of(plan.lengths, width) * row_bytes
        return _reading(fetches, ranges, begins, plan.lengths * row_bytes, out, places)

    def _ranges(self, column: str, plan: RowPlan) -> tuple[Ranges, NDArray[np.int64], int, bool]:
        """Return what to fetch, where each entry begins in its file, the bytes of a row, and whether rows are small."""
        numbers, where = np.unique(plan.segments, return_inverse=True)
        extents = [self._segments[number].extents[column] for number in numbers.tolist()]
        row_bytes = extents[0].row_bytes if extents else 0
        offsets = np.array([extent.offset for extent in extents], np.int64)[where]
        begins = offsets + plan.starts * row_bytes
        # Token ids lie some hundred bytes an entry, far apart in a shuffled batch: whole blocks of them are kept.
        total = sum(s.extents[column].nbytes for s in self._segments[:] if column in s.extents)
        small = column != PAYLOAD and row_bytes <= _SMALL and total <= CACHE_BYTES // 2
        ranges = coalesce(plan.segments, begins, begins + plan.lengths * row_bytes, gap=BLOCK if small else _GAP)
        return ranges, begins, row_bytes, small

    def will_need(self, plan: RowPlan) -> bool:
        """Fetch the rows of a batch that will be read soon; the one that was announced first is given up for it."""
        array, places = self.frames.column(plan, VALUES)
        ranges, _, _, small = self._ranges(array, places)
        name = os.getpid(), array, ranges.digest()
        with self._lock:
            if name in self._ahead:
                return True
            self._ahead[name] = _Fetches(self, array, ranges, small)
            while len(self._ahead) > _MOST_AHEAD:
                self._ahead.popitem(last=False)
        return True

    def close(self) -> None:
        """Drop what was fetched and not asked for; the session is the place's."""
        self._workers.close()
        with self._lock:
            self._ahead.clear()

    def fetch(self, segment: int, column: str, begin: int, end: int, *, small: bool) -> Future[Data]:
        """Have a range fetched; of a small column, what is in memory is there at once."""
        described = self._segments[segment]
        key = self._locate(described, described.extents[column].path)
        size = self._blocks.listed_size(key)
        if size is None and not described.extents[column].path:  # a segment that is one object
            size = described.nbytes
            self._blocks.learn({key: size})
        if small:
            kept = self._blocks.peek(key, begin, end - begin)
            if kept is None:
                return self._session.submit(lambda: self._blocks.read(key, begin, end - begin))
            future: Future[Data] = Future()
            future.set_result(kept)
            return future
        client = self._session.client()

        def get() -> Data:
            body = client.get(key, begin, end - begin, size)
            if size is None:
                self._blocks.learn({key: body.size})
            return body.data

        return self._session.submit(get)

    def note_lost(self, segment: int) -> None:
        self._blocks.note_lost(self._locate(self._segments[segment], ""))

    def where(self, segment: int) -> str:
        return self._segments[segment].files.where


class _Fetches:
    """The fetches of one batch, in the order in which they are needed. Thread-safe."""

    def __init__(self, rows: FetchedRows, column: str, ranges: Ranges, small: bool) -> None:
        self._rows, self._column, self._ranges, self._small = rows, column, ranges, small
        self._left = ranges.users.tolist()
        self._lock = threading.Lock()
        self._started: dict[int, Future[Data]] = {}
        self._failure: BaseException | None = None
        self._next = 0  # all ranges before it were started
        self._ahead = 0  # bytes that were started and not yet taken
        weakref.finalize(self, _forget, self._started, os.getpid()).atexit = False
        with self._lock:
            self._start_more()

    def _start_more(self) -> None:
        while self._next < len(self._left) and self._ahead < _WINDOW:
            self._start(self._next)
            self._next += 1

    def _start(self, number: int) -> Future[Data]:
        """Return the fetch of a range; begin it where nobody has yet."""
        future = self._started.get(number)
        if future is None:
            ranges = self._ranges
            what = int(ranges.segments[number]), self._column, int(ranges.begins[number]), int(ranges.ends[number])
            future = self._started[number] = self._rows.fetch(*what, small=self._small)
            self._ahead += what[3] - what[2]
        return future

    def get(self, number: int) -> Data:
        """Return the bytes of a range, when they are there."""
        with self._lock:
            future = self._start(number)  # also where the window is full: whoever waits is first
        try:
            return future.result()
        except ObjectNotFoundError:
            self._rows.note_lost(int(self._ranges.segments[number]))
            raise SegmentGoneError(f"{self.where(number)} is gone; refresh the space") from None
        except CancelledError:
            if isinstance(self._failure, Exception):  # another thread has told of it; that one counts
                raise self._failure from None
            raise ClosedError(f"{self.where(number)} was closed") from None

    def taken(self, number: int) -> None:
        """Note that one more entry has taken its rows from a range; after the last one it is dropped."""
        with self._lock:
            self._left[number] -= 1
            if not self._left[number]:
                self._ahead -= int(self._ranges.ends[number] - self._ranges.begins[number])
                self._started[number] = _TAKEN
                self._start_more()

    def fail(self, error: BaseException) -> None:
        """Begin nothing more: a thread has failed."""
        with self._lock:
            self._failure = self._failure or error
        _cancel(self._started)

    def where(self, number: int) -> str:
        return self._rows.where(int(self._ranges.segments[number]))


def _reading(
    fetches: _Fetches,
    ranges: Ranges,
    begins: NDArray[np.int64],
    sizes: NDArray[np.int64],
    out: NDArray[np.generic],
    places: NDArray[np.int64],
) -> Read:
    """Return what brings a batch from its fetches to the caller's buffer; threads may read different entries at a time.

    Args:
        begins, sizes: ``[n]`` bytes of each entry in its file.
        places: ``[n + 1]`` where each entry begins in the buffer, bytes.
    """
    numbers, starts = ranges.of_entry.tolist(), ranges.begins.tolist()
    offsets, lengths, bounds = begins.tolist(), sizes.tolist(), places.tolist()
    target = out.reshape(-1).view(np.uint8)

    def read(first: int, last: int) -> None:
        try:
            for i in range(first, last):
                end = bounds[i] + lengths[i]
                if lengths[i]:
                    number = numbers[i]
                    begin = offsets[i] - starts[number]
                    piece = memoryview(fetches.get(number))[begin : begin + lengths[i]]
                    if len(piece) != lengths[i]:
                        raise FormatError(f"{fetches.where(number)} is truncated")
                    target[bounds[i] : end] = np.frombuffer(piece, np.uint8)
                    del piece  # with the range's bytes, while the next ones are waited for
                    fetches.taken(number)
                target[end : bounds[i + 1]] = 0
        except BaseException as error:
            fetches.fail(error)
            raise

    return read


_TAKEN: Future[Data] = Future()  # stands for a range whose bytes nobody needs any more
_TAKEN.cancel()


def _forget(started: dict[int, Future[Data]], pid: int) -> None:
    """Cancel, but not in a fork's child: a thread that it does not have may hold a future's lock."""
    if pid == os.getpid():
        _cancel(started)


def _cancel(started: dict[int, Future[Data]]) -> None:
    """Drop what has not begun; what has begun ends by itself."""
    for future in list(started.values()):
        future.cancel()
