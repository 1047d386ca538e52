"""The writer: collects entries and publishes them as segments, by size and by time.

One block is being filled while another is being published by a thread of the writer's own, so that whoever records does
not wait for the disk, and memory is bounded by two blocks. A block is published when it has stood for so long, whether
more comes or not: a process that is killed loses what is younger.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Columns
from actcache.errors import StoreError, StoreGoneError
from actcache.format import checksum
from actcache.format.keys import KEY_BYTES
from actcache.format.ragged import offsets_of

SEGMENT_BYTES = 256 << 20
SEGMENT_SECONDS = 45.0
_AGAIN_SECONDS = 1.0  # where the block before is still being published


class Clock:
    """Time, and calls that come later. A test has another one. Thread-safe."""

    def now(self) -> float:
        """Return seconds since whenever."""
        return time.monotonic()

    def later(self, seconds: float, call: Callable[[], object]) -> Callable[[], None]:
        """Have a thread make a call after so many seconds; return what calls it off."""
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), call)
        timer.name, timer.daemon = "actcache-clock", True  # it keeps no process from ending
        timer.start()
        return timer.cancel


class Builder:
    """A block that is being filled. Not thread-safe."""

    def __init__(self, columns: Columns, names: frozenset[str], capacity: int, born: float) -> None:
        self.names = names
        self.born = born
        self._columns = {name: np.empty((capacity, *columns[name][1]), columns[name][0]) for name in sorted(names)}
        self._capacity = capacity
        self._end = 0
        self._places: dict[bytes, tuple[int, int]] = {}  # key -> rows [begin, end)

    def __len__(self) -> int:
        return len(self._places)

    def fits(self, tokens: int) -> bool:
        return self._end + tokens <= self._capacity

    def add(self, key: bytes, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Copy one entry's stored rows. A key that stands already is replaced."""
        begin, self._end = self._end, self._end + len(rows[VALUES])
        for name, array in rows.items():
            self._columns[name][begin : self._end] = array
        self._places.pop(key, None)
        self._places[key] = (begin, self._end)

    def held(self) -> list[bytes]:
        return list(self._places)

    def rows(self, key: bytes) -> dict[str, NDArray[np.generic]] | None:
        """Return an entry's stored rows by array, views; None where it is absent."""
        place = self._places.get(key)
        return None if place is None else {name: array[slice(*place)] for name, array in self._columns.items()}

    def block(self, space_seed: int) -> Block:
        """Return all entries with their checksums."""
        places = np.array(list(self._places.values()), np.int64).reshape(-1, 2)
        lengths = places[:, 1] - places[:, 0]
        if int(lengths.sum()) == self._end:
            columns = {name: array[: self._end] for name, array in self._columns.items()}
        else:  # rows of replaced entries are left out
            kept = np.concatenate([np.arange(begin, end) for begin, end in places.tolist()])
            columns = {name: array[kept] for name, array in self._columns.items()}
        keys = np.frombuffer(b"".join(self._places), np.uint8).reshape(-1, KEY_BYTES)
        offsets = offsets_of(lengths)
        sums, extra_sums = checksum.entry_checksums(space_seed, keys, offsets[:-1], lengths, columns)
        return Block(keys, offsets, sums, columns, extra_sums)


class Writer:
    """Collects entries of one space. Thread-safe.

    What was added is readable through ``rows`` at once, and durable when ``flush`` has returned. When publishing fails,
    the entries stay here, the failure is raised by the next ``add``, ``flush`` or ``close``, and a ``flush`` after the
    cause is mended publishes them.

    Args:
        append: makes a block durable and visible.
        columns: dtype and trailing shape of each ragged array.
        space_seed: see ``checksum.space_seed``.
        segment_bytes, segment_seconds: a block is published when it holds so many bytes of rows, or when its first
            entry is so old.
    """

    def __init__(
        self,
        append: Callable[[Block], None],
        columns: Columns,
        space_seed: int,
        *,
        segment_bytes: int = SEGMENT_BYTES,
        segment_seconds: float = SEGMENT_SECONDS,
        clock: Clock | None = None,
    ) -> None:
        self._append = append
        self._columns = columns
        self._seed = space_seed
        dtype, trailing = columns[VALUES]
        self._capacity = max(1, segment_bytes // (np.dtype(dtype).itemsize * int(np.prod(trailing))))
        self._seconds = segment_seconds
        self._clock = clock or Clock()
        self._call_off: Callable[[], None] | None = None  # of the call that looks how old the block is
        self._filling: Builder | None = None
        self._leaving: Builder | None = None  # being published, or failed to be
        self._publishing: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return how many entries are not published yet."""
        with self._lock:
            return sum(map(len, self._builders()))

    def _builders(self) -> list[Builder]:
        return [builder for builder in (self._filling, self._leaving) if builder is not None]

    def add(self, key: bytes, rows: Mapping[str, NDArray[np.generic]]) -> None:
        """Add one entry in stored form, replacing what the writer holds under that key."""
        with self._lock:
            tokens = len(rows[VALUES])
            names = frozenset(rows)
            current = self._filling
            if current is not None and not (
                current.fits(tokens) and current.names == names and self._left(current) > 0
            ):
                self._hand_over()
            if self._filling is None:
                self._filling = Builder(self._columns, names, max(self._capacity, tokens), self._clock.now())
            self._filling.add(key, rows)
            if self._call_off is None:
                self._check_age_in(self._left(self._filling))

    def keys(self) -> list[bytes]:
        """Return the keys of unpublished entries; one may stand twice."""
        with self._lock:
            return [key for builder in self._builders() for key in builder.held()]

    def rows(self, key: bytes) -> dict[str, NDArray[np.generic]] | None:
        """Return an unpublished entry's stored rows; None where the writer does not hold it."""
        with self._lock:
            for builder in self._builders():
                if (rows := builder.rows(key)) is not None:
                    return rows
            return None

    def flush(self) -> None:
        """Publish everything; durable when this returns.

        Raises:
            StoreError: the disk is full, ...; the entries are still here.
        """
        with self._lock:
            try:
                self._flush()
            except StoreGoneError as error:
                raise self._counted(error, "are kept in memory: flush again once the store is back") from error

    def _flush(self) -> None:
        self._finish_publishing()
        if self._filling is not None:
            self._hand_over()
            self._finish_publishing()

    def close(self) -> None:
        """Publish everything and end the thread. What cannot be published is dropped, and the failure raised."""
        with self._lock:
            try:
                try:
                    self._flush()
                except KeyboardInterrupt:  # it ended the wait, and what was computed is worth another one
                    self._flush()
                    raise
            except StoreError as error:
                counted = self._counted(error, "are lost, as this was closed: fill again")
                counted.lost = len(self)
                raise counted from error
            finally:
                self.abandon()

    def _counted(self, error: StoreError, then: str) -> StoreError:
        """Return an error that says, too, how many entries are not stored, and what becomes of them."""
        return type(error)(f"{error}. Entries that were put and are not stored: {len(self)}, which {then}")

    def abandon(self) -> None:
        """End the thread; what is not published is dropped."""
        with self._lock:
            thread, self._thread = self._thread, None
            call_off, self._call_off = self._call_off, None
            if call_off is not None:
                call_off()
            if thread is not None:
                thread.shutdown()
            self._filling = self._leaving = self._publishing = None

    def _left(self, builder: Builder) -> float:
        """Return in how many seconds a block is to be published."""
        return builder.born + self._seconds - self._clock.now()

    def _check_age_in(self, seconds: float) -> None:
        look = weakref.WeakMethod(self._check_age)  # a writer that nobody has any more is not kept

        def call() -> None:
            if (looking := look()) is not None:
                looking()

        self._call_off = self._clock.later(seconds, call)

    def _check_age(self) -> None:
        """Publish a block that has stood long enough. What fails is raised where somebody can hear it."""
        with self._lock:
            if self._call_off is None:  # closed meanwhile
                return
            self._call_off = None
            if self._filling is None:
                return
            left = self._left(self._filling)
            before = None if self._leaving is None else self._publishing
            if left > 0 or (before is not None and not before.done()):
                self._check_age_in(max(left, _AGAIN_SECONDS))
            elif self._leaving is None or (before is not None and before.exception() is None):
                self._hand_over()

    def _hand_over(self) -> None:
        """Start publishing the block that was being filled, after the one before it."""
        self._finish_publishing()
        self._leaving, self._filling = self._filling, None
        self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="actcache-write")
        try:
            self._publishing = self._thread.submit(self._publish, self._leaving)
        except RuntimeError:  # the interpreter is ending and starts nothing any more
            self._publish(self._leaving)
            self._leaving = None

    def _publish(self, builder: Any) -> None:
        self._append(builder.block(self._seed))

    def _finish_publishing(self) -> None:
        """Wait until nothing is being published; try again what failed before."""
        if self._leaving is None:
            return
        if self._publishing is None:
            self._start()
        publishing = self._publishing
        if publishing is not None:
            try:
                publishing.result()  # raises what publishing raised; the block stays in ``_leaving``
            finally:
                if publishing.done():  # else an interrupt ended the wait, not the work
                    self._publishing = None
        self._leaving = None
