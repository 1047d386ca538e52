"""A snapshot of a space in LMDB: a sequence number, and the reading of what was newest then."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS, VALUES, Buffers, EntryLocations, Expected, Placing, Snapshot, Usage
from actcache.errors import FormatError, SegmentGoneError, StoreError
from actcache.format.ragged import offsets_of
from actcache.io import loops
from actcache.io.loops import Column, MappedColumn, Reading
from actcache.io.mmap import tells
from actcache_lmdb.environment import Environment
from actcache_lmdb.lookup import HeadIndex, find, live, scan
from actcache_lmdb.record import (
    COLUMNS,
    ENTRY_MAGIC,
    FORMAT_VERSION,
    HEADER,
    OVERFLOW,
    PAGE_HEADER,
    ROWS_AT,
    Shapes,
    State,
    bits,
)
from actcache_lmdb.shared_environments import release, retain

_MOST_INDEXED = 20_000_000  # entries whose heads are kept in memory, 61 bytes each
_EXTRA_WORD, _PAYLOAD_WORD = ((PAGE_HEADER + dict(HEADER.fields or {})[n][1]) // 8 for n in ("extra", "payload"))
_BITS = 8  # of ``EntryLocations.row``, below the entry's number: its columns


class LMDBSnapshot(Snapshot):
    """What was newest at one sequence number; an entry's location has its first page, and its number and columns.

    Every call is one short read transaction of its own: between them, nothing is pinned. What this snapshot shows stays
    where it is until a later transaction has removed what was superseded after it; from then on calls raise
    ``SegmentGoneError``. Thread-safe.
    """

    def __init__(self, environment: Environment, state: State, shapes: Shapes) -> None:
        self._environment = retain(environment)
        self._state, self._shapes = state, shapes
        self._keys: NDArray[np.uint8] | None = None
        self._index: HeadIndex | None = None
        self._index_pays = state.entries <= _MOST_INDEXED
        self._asked = 0  # keys that were looked up
        self._told = tells(environment.data)
        self._lock = threading.Lock()
        self._at_once: tuple[int, int, Reading | None] = 0, 0, None  # what reads a batch by one call, of which memory
        weakref.finalize(self, release, environment).atexit = False

    @property
    def state(self) -> State:
        return self._state

    @contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction[memoryview]]:
        """A transaction in which all that this snapshot shows is still there."""
        with self._environment.reading() as txn:
            if self._environment.state(txn).horizon > self._state.sequence:
                raise SegmentGoneError(f"{self._environment.folder}: what was replaced is gone; refresh the space")
            yield txn

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        index = self._index_if_due(len(keys))
        if index is not None:
            heads = index.find(keys)
        else:
            with self._reading() as txn:
                heads = find(txn, self._environment.dbs["heads"], keys, self._state.sequence)
        live = heads["id"] > 0
        return EntryLocations(
            np.where(live, heads["tokens"], 0).astype(np.int64),
            np.where(live, heads["checksum"], 0).astype(np.uint64),
            np.where(live, heads["page"], 0).astype(np.int64),
            np.where(live, heads["id"] << np.uint64(_BITS) | heads["columns"], 0).astype(np.int64),
        )

    def _index_if_due(self, count: int) -> HeadIndex | None:
        """Return an index in memory once so many keys were looked up that it pays."""
        if self._index is None and self._index_pays:
            with self._lock:
                self._asked += count
                if self._asked >= self._state.entries and self._index is None:
                    index = HeadIndex(self.live())
                    self._index_pays = index.usable
                    self._index = index if index.usable else None
        return self._index

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        bit = 1 << COLUMNS.index(column)
        return (located.row & bit > 0) & located.found

    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        sums = np.zeros(len(located.tokens), np.uint64)
        which = np.flatnonzero(located.found)
        if len(which):
            with self._memory(located[which]) as (memory, pages):
                words = memory[: len(memory) & ~7].view("<u8")
                sums[which] = words[pages * (self._environment.page_size // 8) + _EXTRA_WORD]
        return sums

    # --- rows --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _memory(self, located: EntryLocations) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """The mapped file, and the first page of each of these entries, which are all there.

        Raises ``FormatError`` where the pages are not those of the entries, or say impossible things.
        """
        environment = self._environment
        with self._reading() as txn:
            size = environment.check_size()
            memory = environment.memory(txn, int(located.row[0]) >> _BITS, size)
            pages = located.segment
            good = self._fit(memory, located, pages)
            if not good.all():
                # A copy by LMDB's own tools has other page numbers: the B-tree knows them.
                pages = pages.copy()
                for i in np.flatnonzero(~good).tolist():
                    pages[i] = environment.find_page(txn, int(located.row[i]) >> _BITS)
                if not self._fit(memory, located, pages).all():
                    raise FormatError(f"{environment.data}: pages are damaged that should hold entries")
            yield memory, pages

    def _fit(self, memory: NDArray[np.uint8], located: EntryLocations, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which pages begin entries of these numbers, of this size, ``[n]``."""
        page_size = self._environment.page_size
        words = memory[: len(memory) & ~7].view("<u8")
        last = len(memory) // page_size - 1
        inside = (pages >= 2) & (pages <= last)
        first = np.where(inside, pages, 0) * (page_size // 8)
        number, flags, magic, entry, shape = (words[first + i].astype(np.int64) for i in range(5))
        ids, columns = located.row >> _BITS, located.row & ((1 << _BITS) - 1)
        nbytes = np.zeros(len(pages), np.int64)
        for kind in np.unique(columns).tolist():
            if kind >> len(COLUMNS):
                raise FormatError(f"{self._environment.data} holds arrays that this release does not know")
            nbytes = np.where(columns == kind, self._shapes.places(located.tokens, kind)["end"], nbytes)
        payload = words[first + _PAYLOAD_WORD]
        good: NDArray[np.bool_] = payload < len(memory) if self._shapes.compressed else payload == 0
        nbytes = nbytes + np.where(good, payload, 0).astype(np.int64)
        count = flags >> 32  # pages of the value
        good &= (
            inside
            & (number == pages)
            & (flags >> 16 & 0xFFFF == OVERFLOW)
            & (count * page_size >= nbytes)
            & (pages + count - 1 <= last)
            & (magic == (FORMAT_VERSION << 32 | ENTRY_MAGIC))
            & (entry == ids)
            & (shape == (columns << 32 | located.tokens))
        )
        return good

    def gather(
        self, located: EntryLocations, out: Buffers, width: int | None, expected: Expected | None
    ) -> NDArray[np.int64]:
        if not located.tokens.any():
            return EmptySnapshot().gather(located, out, width, expected)
        return self._bring(located, out, offsets_of(located.tokens, width), expected, None)

    def place(
        self, located: EntryLocations, out: Buffers, placing: Placing, expected: Expected | None
    ) -> NDArray[np.int64]:
        if not located.tokens.any():
            return np.empty(0, np.int64)
        return self._bring(located, out, offsets_of(located.tokens), expected, placing)

    def _bring(
        self,
        located: EntryLocations,
        out: Buffers,
        offsets: NDArray[np.int64],
        expected: Expected | None,
        placing: Placing | None,
    ) -> NDArray[np.int64]:
        found = np.flatnonzero(located.tokens)
        for name in out:
            if not self.has(name, located)[found].all():
                raise KeyError(name)
        given = located, found, out, offsets, expected, placing
        known = not (located.row & ((1 << _BITS) - 1) >> len(COLUMNS) << len(COLUMNS)).any()
        if expected is not None and known and not self._shapes.compressed:
            # The digests say more of what lies there than the pages do of themselves.
            with self._reading() as txn:
                size = self._environment.check_size()
                memory = self._environment.memory(txn, int(located.row[found[0]]) >> _BITS, size)
                if not len(bad := self._gather(memory, located.segment[found], *given)):
                    return bad
        with self._memory(located[found]) as (memory, pages):
            return self._gather(memory, pages, *given)

    def _gather(
        self,
        memory: NDArray[np.uint8],
        pages: NDArray[np.int64],
        located: EntryLocations,
        found: NDArray[np.int64],
        out: Buffers,
        offsets: NDArray[np.int64],
        expected: Expected | None,
        placing: Placing | None,
    ) -> NDArray[np.int64]:
        """Gather entries from the mapped file; those that are ``found`` begin with these pages."""
        first = np.zeros(len(located.tokens), np.int64)
        first[found] = pages * self._environment.page_size
        kinds = located.row & ((1 << _BITS) - 1)
        one = int(kinds[found[0]])
        alike = bool((kinds[found] == one).all())
        places = {
            kind: self._shapes.places(located.tokens, kind) for kind in ([one] if alike else np.unique(kinds[found]))
        }
        columns = []
        for name, buffer in out.items():
            if alike:
                begins = first + places[one][name]
            else:
                begins = first.copy()
                for kind, of in places.items():
                    begins += np.where(kinds == kind, of[name], 0)
            of_rows = placing if name == VALUES else None
            column = Column(loops.stored_row(buffer, of_rows)[0], buffer, memory, begins, placing=of_rows)
            if name == VALUES and self._shapes.compressed:
                column = column._replace(sizes=self._payload(memory, first), item=self._shapes.item)
            columns.append(column)
        digests = None if expected is None else expected.digests(list(out))
        return loops.gather(columns, located.tokens, offsets, digests)

    def read_at_once(
        self,
        keys: NDArray[np.uint8],
        out: Buffers,
        width: int | None,
        seed: int | None,
        placing: Placing | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Look up and read by one native call, once heads are in memory: entries that all have token ids.

        Their digests say that it is they who lie on the pages that their heads name. Where one does not fit, the batch
        is read step by step, which looks what the pages say of themselves, and asks the B-tree.
        """
        index = self._index
        if index is None or seed is None or self._shapes.compressed or tuple(out) != (TOKEN_IDS, VALUES):
            return None
        with self._reading():
            reading = self._reading_at_once(index, self._environment.check_size())
            if reading is None:
                return None
            ways = None if placing is None else [None, placing]
            read = reading.read(keys, list(out.values()), width, seed, ways)
        return None if read is None or len(read[1]) else read

    def _reading_at_once(self, index: HeadIndex, size: int) -> Reading | None:
        base, of_size, reading = self._at_once
        if (base, of_size) == (self._environment.base, size) or not self._environment.base:
            return reading if base else None
        memory, have = self._environment.mapped(size), bits((VALUES, TOKEN_IDS))
        reading = None
        if bool(((index.columns & have == have) & (index.columns >> len(COLUMNS) == 0)).all()):
            page, first, rows = self._environment.page_size, np.zeros(1, np.int64), self._shapes.row_bytes
            columns = [
                MappedColumn(rows[TOKEN_IDS], memory, first, page, ROWS_AT, rows[VALUES]),
                MappedColumn(rows[VALUES], memory, first, page, ROWS_AT),
            ]
            reading = index.lookup().reading(columns, None)
        self._at_once = self._environment.base, size, reading
        return reading

    def _payload(self, memory: NDArray[np.uint8], first: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of entries' frames, which begin with the pages at these bytes."""
        words = memory[: len(memory) & ~7].view("<u8")
        return words[first // 8 + _PAYLOAD_WORD].astype(np.int64)

    def read_ahead(self, located: EntryLocations) -> bool:
        if not hasattr(os, "posix_fadvise"):
            return False
        self._environment.check_size()
        found = located[located.found]
        if not len(found.tokens):
            return False
        begins = found.segment * self._environment.page_size
        nbytes = found.tokens * (self._shapes.row_bytes[VALUES] + 8) + self._environment.page_size
        if self._told and self._is_present(found):
            return False
        order = np.argsort(begins)
        try:
            for begin, length in zip(begins[order].tolist(), nbytes[order].tolist(), strict=True):
                os.posix_fadvise(self._environment.file, begin, length, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # a hint; the read itself will say what is wrong
        return True

    def _is_present(self, found: EntryLocations) -> bool:
        """Return whether these entries, which are all there, seem to be in memory."""
        try:
            with self._reading() as txn:
                # No page is touched: one that is not there would be waited for.
                memory = self._environment.memory(txn, int(found.row[0]) >> _BITS, self._environment.check_size())
                column = Column(1, memory=memory, begins=found.segment * self._environment.page_size)
                return not loops.seems_absent(column, found.tokens * self._shapes.row_bytes[VALUES])
        except (FormatError, SegmentGoneError):
            return False  # the read itself will say what is wrong

    # --- all of it ---------------------------------------------------------------------------------------------------

    def live(self) -> Iterator[NDArray[np.void]]:
        """Yield the records of all live entries, a step at a time, in the order of their keys."""
        with self._reading() as txn:
            for records in scan(txn, self._environment.dbs["heads"]):
                yield live(records, self._state.sequence)

    def keys(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._keys is None:
                parts = [np.empty((0, 32), np.uint8), *(records["key"] for records in self.live())]
                self._keys = np.concatenate(parts)
                self._keys.flags.writeable = False
            return self._keys

    def usage(self) -> Usage:
        state = self._state
        return Usage(state.entries, state.tokens, state.nbytes, 1 if state.entries else 0)

    def whereabouts(self, located: EntryLocations) -> tuple[list[str], NDArray[np.int64]]:
        return [self._environment.folder.name], np.where(located.found, 0, -1)

    def damaged(self) -> dict[str, str]:
        try:
            with self._reading():
                return {}
        except (FormatError, StoreError) as error:  # old is not damaged
            return {} if isinstance(error, SegmentGoneError) else {self._environment.folder.name: str(error)}


class EmptySnapshot(Snapshot):
    """Of a space that nobody has written to yet, opened for reading. Stateless."""

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        zeros = np.zeros(len(keys), np.int64)
        return EntryLocations(zeros, zeros.astype(np.uint64), zeros, zeros)

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        return np.zeros(len(located.tokens), bool)

    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        return np.zeros(len(located.tokens), np.uint64)

    def gather(
        self, located: EntryLocations, out: Buffers, width: int | None, expected: Expected | None
    ) -> NDArray[np.int64]:
        for buffer in out.values():
            buffer[: len(located.tokens) * (width or 0)] = 0
        return np.empty(0, np.int64)

    def read_ahead(self, located: EntryLocations) -> bool:
        """Do nothing."""
        return False

    def keys(self) -> NDArray[np.uint8]:
        return np.empty((0, 32), np.uint8)

    def usage(self) -> Usage:
        return Usage(0, 0, 0, 0)

    def damaged(self) -> dict[str, str]:
        return {}
