"""The writer: collects entries and publishes them as segments, by size and by time.

One block is filled while a thread publishes another: whoever records does not wait for the disk, and memory is bounded
by two blocks. It publishes by time, too, because a process that is killed loses what is not published.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Columns
from actcache.errors import StoreError, StoreGoneError
from actcache.format import checksum
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.buffers import BufferPool

SEGMENT_BYTES = 256 << 20
SEGMENT_SECONDS = 45.0
_BLOCKS = 2  # in memory: one is filled, one published
_AGAIN_SECONDS = 1.0  # where the block before is still being published

#: Stored rows by the name of their ragged array.
Rows = dict[str, NDArray[np.generic]]
#: Writes the stored rows of some entries into buffers, one a ragged array, ``[rows, ...]``.
Fill = Callable[[Rows], object]
#: Returns memory for a ragged array, of that shape and dtype; its contents are anything.
Memory = Callable[[str, tuple[int, ...], Any], NDArray[Any]]


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


@dataclass(frozen=True)
class Written:
    """What a writer has done since it was made. Entries are published in the order in which they were added."""

    added: int = 0  # entries, replaced ones included
    published: int = 0  # of these: durable, and visible to others
    tokens: int = 0  # of the published entries
    nbytes: int = 0  # of the published entries' stored rows, and of what stands beside them; before compression
    segments: int = 0  # or transactions, that were published

    def since(self, before: Written) -> Written:
        return Written(*(getattr(self, one.name) - getattr(before, one.name) for one in fields(self)))


class _Part(NamedTuple):
    """Entries of a block that is being filled."""

    keys: NDArray[np.uint8]  # [n, 32]
    begins: NDArray[np.int64]  # [n] first row of each, ascending
    lengths: NDArray[np.int64]  # [n]


class Builder:
    """A block that is being filled. Not thread-safe, but others may read what it holds while ``block`` runs."""

    def __init__(self, columns: Columns, names: frozenset[str], capacity: int, born: float, memory: Memory) -> None:
        self.names = names
        self.born = born
        self._columns: Rows = {
            name: memory(name, (capacity, *columns[name][1]), np.dtype(columns[name][0])) for name in sorted(names)
        }
        self._capacity = capacity
        self._end = 0
        self._parts: list[_Part] = []  # all that was added, in order
        self._begins: dict[bytes, int] = {}  # key -> first row of its entry, of copies the last one

    def __len__(self) -> int:
        return len(self._begins)

    @property
    def added(self) -> int:
        """How many entries were added, those among them that were replaced since."""
        return sum(len(part.keys) for part in self._parts)

    @property
    def free(self) -> int:
        """How many rows have room."""
        return self._capacity - self._end

    def add(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], fill: Fill) -> None:
        """Add entries, for all of which there is room; a key that stands already is replaced. What ``fill`` raises is
        raised, and nothing is added."""
        begins = self._end + offsets_of(lengths)
        end = int(begins[-1])
        fill({name: array[self._end : end] for name, array in self._columns.items()})
        # In this order, an interrupt between two of these leaves rows that nobody finds.
        self._end = end
        self._parts.append(_Part(keys, begins[:-1], lengths))
        self._begins.update(zip(key_list(keys), begins[:-1].tolist(), strict=True))

    def held(self) -> list[bytes]:
        return list(self._begins)

    def find(self, keys: list[bytes]) -> dict[int, Rows]:
        """Return the stored rows of those keys that are here, by their position in ``keys``; views."""
        if self._begins.keys().isdisjoint(keys):
            return {}
        found = {i: begin for i, begin in enumerate(map(self._begins.get, keys)) if begin is not None}
        all_entries = self._joined()
        firsts = np.fromiter(found.values(), np.int64)
        lasts = firsts + all_entries.lengths[np.searchsorted(all_entries.begins, firsts)]
        return {
            i: {name: array[first:last] for name, array in self._columns.items()}
            for i, first, last in zip(found, firsts.tolist(), lasts.tolist(), strict=True)
        }

    def _joined(self) -> _Part:
        if len(self._parts) > 1:
            self._parts = [_Part(*map(np.concatenate, zip(*self._parts, strict=True)))]
        return self._parts[0]

    def block(self, space_seed: int) -> Block:
        """Return all entries with their checksums."""
        keys, begins, lengths = self._joined()
        if len(keys) > len(self._begins):  # some were replaced
            kept = np.isin(begins, np.fromiter(self._begins.values(), np.int64))
            keys, begins, lengths = keys[kept], begins[kept], lengths[kept]
        if int(lengths.sum()) == self._end:
            columns = {name: array[: self._end] for name, array in self._columns.items()}
        else:  # rows of replaced entries are left out
            rows = row_indices(begins, lengths, None)
            columns = {name: array[rows] for name, array in self._columns.items()}
        offsets = offsets_of(lengths)
        sums, extra_sums = checksum.entry_checksums(space_seed, keys, offsets[:-1], lengths, columns)
        return Block(keys, offsets, sums, columns, extra_sums)


def _copy(rows: Rows, part: slice, out: Rows) -> None:
    for name, buffer in out.items():
        buffer[:] = rows[name][part]


class Writer:
    """Collects entries of one space. Thread-safe.

    What was added is readable through ``find`` at once, and durable when ``flush`` has returned. When publishing fails,
    the entries stay here, the failure is raised by the next ``add``, ``flush`` or ``close``, and a ``flush`` after the
    cause is mended publishes them.

    ``append`` makes a block durable and visible: one that holds ``segment_bytes`` of rows, or whose first entry is
    ``segment_seconds`` old.
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
        self._memory: dict[str, BufferPool] = {}  # of blocks, by array: fresh memory costs more than filling it
        self._filling: Builder | None = None
        self._leaving: Builder | None = None  # being published, or failed to be
        self._publishing: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()
        self._added = 0
        self._published = Written()  # changed by who publishes alone

    def __len__(self) -> int:
        """Return how many entries are not published yet."""
        with self._lock:
            return sum(map(len, self._builders()))

    @property
    def written(self) -> Written:
        """What was added and published so far."""
        return replace(self._published, added=self._added)

    def _builders(self) -> list[Builder]:
        return [builder for builder in (self._filling, self._leaving) if builder is not None]

    def add(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], names: frozenset[str], fill: Fill) -> None:
        """Add entries, replacing what the writer holds under their keys.

        Args:
            keys: ``[n, 32]``, each once.
            lengths: ``[n]`` rows of each, 1 or more.
            names: of the ragged arrays that these entries have.
            fill: writes the rows of all of them, one entry's after another's. Where it raises, nothing is added.

        The arrays are kept: nobody may change them.
        """
        if not len(keys):
            return
        offsets = offsets_of(lengths)
        with self._lock:
            if self._prepare(offsets, 0, names) == len(keys):
                self._add(keys, lengths, fill)
                return
            # They do not fit one block: whether all of them are right has to show before the first one is added.
            rows = {n: np.empty((int(offsets[-1]), *self._columns[n][1]), self._columns[n][0]) for n in names}
            try:
                fill(rows)
            finally:
                self._drop_empty()
            begin = 0
            while begin < len(keys):
                end = self._prepare(offsets, begin, names)
                part = slice(int(offsets[begin]), int(offsets[end]))
                self._add(keys[begin:end], lengths[begin:end], partial(_copy, rows, part))
                begin = end

    def _prepare(self, offsets: NDArray[np.int64], begin: int, names: frozenset[str]) -> int:
        """Have a block that takes entries from ``begin`` on; return where those begin that have no room in it."""
        block, first = self._filling, int(offsets[begin + 1] - offsets[begin])
        if block is not None and not (first <= block.free and block.names == names and self._left(block) > 0):
            self._hand_over()
        if self._filling is None:
            capacity = max(self._capacity, first)
            self._filling = Builder(self._columns, names, capacity, self._clock.now(), self._take_memory)
        return int(np.searchsorted(offsets, offsets[begin] + self._filling.free, "right")) - 1

    def _take_memory(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return self._memory.setdefault(name, BufferPool(_BLOCKS)).take(shape, dtype)

    def _add(self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], fill: Fill) -> None:
        assert self._filling is not None
        try:
            self._filling.add(keys, lengths, fill)
            self._added += len(keys)
        finally:
            self._drop_empty()
        if self._call_off is None:
            self._check_age_in(self._left(self._filling))

    def _drop_empty(self) -> None:
        """Forget a block that was made for entries that were refused: it would be published."""
        if self._filling is not None and not len(self._filling):
            self._filling = None

    def keys(self) -> list[bytes]:
        """Return the keys of unpublished entries; one may stand twice."""
        with self._lock:
            return [key for builder in self._builders() for key in builder.held()]

    def find(self, keys: list[bytes]) -> dict[int, Rows]:
        """Return the stored rows of those keys whose entries are not published yet, by their position in ``keys``;
        views."""
        with self._lock:
            found: dict[int, Rows] = {}
            for builder in reversed(self._builders()):  # what came later counts
                found |= builder.find(keys)
            return found

    def flush(self) -> None:
        """Publish everything; durable when this returns. ``StoreError``: the disk is full, ...; the entries are still
        here."""
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
        self._memory = {}  # who flushes may have nothing more to put

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
            self._memory = {}

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
                self._memory = {}  # whoever puts so little at a time keeps no memory for more

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
        block = builder.block(self._seed)
        self._append(block)
        done, nbytes = self._published, sum(array.nbytes for array in block.columns.values())
        tokens = done.tokens + int(block.offsets[-1])
        self._published = Written(0, done.published + builder.added, tokens, done.nbytes + nbytes, done.segments + 1)

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
