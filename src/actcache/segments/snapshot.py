"""A snapshot of a segmented space: the tables that find its entries and the source that reads their rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Buffers, EntryLocations, Expected, Placing, Snapshot, Usage
from actcache.errors import FormatError, SegmentGoneError
from actcache.format.keys import join_keys, key_order, split_keys
from actcache.io.cached import cached_property
from actcache.io.loops import Lookup, MappedColumn, Reading
from actcache.io.workers import ProcessLock
from actcache.segments.index import Table
from actcache.segments.rows import RowPlan, RowSource
from actcache.segments.segment import Segment

logger = logging.getLogger(__name__)

_TRIES = 5


class SegmentedSnapshot(Snapshot):
    """What was visible at one moment.

    Args:
        segments: all segments that the space ever knew, by number.
        tables: disjoint tables, the mapped index first.
        numbers: for each table, the number of each of its segments, -1 where the segment is gone or replaced.
        dead: entries that tombstones name, segment of origin -> numbers.
        damaged: segments that could not be read, name -> what is wrong.
        again: takes another one, where the arrays of a table cannot be had any more when they are needed first.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        tables: Sequence[Table],
        numbers: Sequence[NDArray[np.int64]],
        dead: Mapping[str, Collection[int]],
        rows: RowSource,
        damaged: Mapping[str, str],
        again: Callable[[], SegmentedSnapshot] | None = None,
    ) -> None:
        self._again, self._lock = again, ProcessLock()
        self._segments, self._tables, self._numbers = segments, tables, numbers
        self._rows = rows
        self._dead, self._damaged = dead, dict(damaged)
        self._having: dict[str, NDArray[np.bool_]] = {}  # column -> which segments have it, by number
        self._have: dict[str, bool | None] = {}  # column -> whether all of them have, or none
        # Names of columns -> what is mapped of them, and what reads it.
        self._readings: dict[tuple[str, ...], tuple[tuple[MappedColumn, ...], Reading | None]] = {}
        # By segments' numbers: 16 bytes an entry, of segments with optional arrays that were read.
        self._extras: dict[int, tuple[NDArray[np.int64], NDArray[np.uint64]]] = {}

    def _bring(self) -> None:
        """Have the arrays of all tables here.

        Nobody has seen anything of this snapshot before. So where they are gone it becomes one of now.
        """
        with self._lock:
            for _ in range(_TRIES):
                try:
                    for table in self._tables:
                        table.bring()
                    return
                except SegmentGoneError:
                    if self._again is None:
                        raise
                    state = self._again().__dict__
                    self.__dict__.update({name: value for name, value in state.items() if name != "_lock"})
            raise SegmentGoneError("the index is replaced again and again while it is read; refresh the space")

    @cached_property
    def _alive(self) -> list[NDArray[np.bool_] | None]:
        """Which entries of each table are served; None for all."""
        self._bring()
        tables = zip(self._tables, self._numbers, strict=True)
        return [_alive(table, of, self._dead) for table, of in tables]

    @cached_property
    def _lookup(self) -> Lookup:
        self._bring()
        origins = sorted({origin for table in self._tables for origin in table.origins})
        rank = {origin: number for number, origin in enumerate(origins)}
        # Of copies of one origin, the one in the segment of the last name: whoever looks finds the same.
        names = np.zeros(len(self._segments), np.int64)
        order = sorted(range(len(self._segments)), key=lambda n: self._segments[n].name)
        names[order] = np.arange(len(self._segments))
        return Lookup(
            [
                table.searchable(alive, of, np.array([rank[origin] for origin in table.origins], np.int64))
                for table, of, alive in zip(self._tables, self._numbers, self._alive, strict=True)
            ],
            np.array([segment.tokens for segment in self._segments], np.int64),
            names,
        )

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        found = self._lookup.locate(np.ascontiguousarray(keys))
        if found.outside:
            logger.warning("the index points outside of its segments, %d times: rebuild it", found.outside)
        return EntryLocations(*found[:4])

    def copies(self, keys: NDArray[np.uint8], beside: Sequence[Table] = ()) -> dict[str, list[int]]:
        """Return every copy of these keys that is not deleted, by its origin: segment -> numbers of entries.

        Those in replaced segments too: they are served again should the segment be lost that replaces them; and those
        in the tables ``beside``.
        """
        self._bring()
        prefix, rest = split_keys(keys)
        copies: dict[str, set[int]] = {}
        for table in (*self._tables, *beside):
            position = table.copies(prefix, rest)
            for origin, entry in zip(table.origin[position].tolist(), table.entry[position].tolist(), strict=True):
                if entry not in self._dead.get(table.origins[origin], ()):
                    copies.setdefault(table.origins[origin], set()).add(entry)
        return {origin: sorted(entries) for origin, entries in copies.items()}

    def served(self) -> dict[int, Segment]:
        """Return the segments whose entries are served, by number."""
        return {int(n): self._segments[n] for numbers in self._numbers for n in numbers[numbers >= 0]}

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        having = self._which_have(column)
        return located.found if having.all() else having[located.segment] & located.found

    def have(self, column: str) -> bool | None:
        if column not in self._have:
            having = self._which_have(column)
            self._have[column] = bool(having.any()) if having.all() or not having.any() else None
        return self._have[column]

    def _which_have(self, column: str) -> NDArray[np.bool_]:
        if column not in self._having:
            self._having[column] = np.array(
                [column in segment.extents or (column == VALUES and segment.compressed) for segment in self._segments],
                bool,
            )
        return self._having[column]

    def may_have(self, column: str) -> bool:
        return bool(self._which_have(column).any())

    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        sums = np.zeros(len(located.tokens), np.uint64)
        having = np.flatnonzero(self.has("extra_checksums", located))
        having = having[np.argsort(located.segment[having], kind="stable")]
        numbers, first = np.unique(located.segment[having], return_index=True)
        for number, which in zip(numbers.tolist(), np.split(having, first[1:]), strict=False):
            begins, of_entries = self._extra(number)
            entry = np.searchsorted(begins, located.row[which])
            if (outside := entry == len(begins)).any():
                row = located.row[which][outside][0]
                raise FormatError(f"{self._segments[number].files.where} has no entry that begins at row {row}")
            sums[which] = of_entries[entry]
        return sums

    def _extra(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Return where the entries of a segment begin and the checksums of their optional arrays, read once."""
        found = self._extras.get(number)
        if found is None:
            segment = self._segments[number]
            try:
                found = self._extras[number] = segment.offsets()[:-1], segment.read("extra_checksums")
            except FileNotFoundError:
                raise SegmentGoneError(f"{segment.files.where} is gone; refresh the space") from None
        return found

    def frames(self, located: EntryLocations) -> EntryLocations:
        """Return where the frames of entries of compressed segments lie, which are all there: as entries of as many
        rows as a frame has bytes, whose ragged array is ``payload``."""
        plan = self._rows.frames.plan(RowPlan(located.segment, located.row, located.tokens))
        return EntryLocations(plan.lengths, located.checksums, located.segment, plan.starts)

    def gather(
        self, located: EntryLocations, out: Buffers, width: int | None, expected: Expected | None
    ) -> NDArray[np.int64]:
        found = located.found
        if not found.any():
            for buffer in out.values():
                buffer[: len(found) * (width or 0)] = 0
            return np.empty(0, np.int64)
        return self._rows.gather(_plan(located, found), out, width, expected)

    def place(
        self, located: EntryLocations, out: Buffers, placing: Placing, expected: Expected | None
    ) -> NDArray[np.int64]:
        found = located.found
        if not found.any():
            return np.empty(0, np.int64)
        return self._rows.place(_plan(located, found), out, placing, expected)

    def read_at_once(
        self,
        keys: NDArray[np.uint8],
        out: Buffers,
        width: int | None,
        seed: int | None,
        placing: Placing | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        names = tuple(out)
        columns = self._rows.mapped(names) if all(map(self.have, names)) else None
        if columns is None:
            return None
        known, reading = self._readings.get(names, (None, None))
        if known is None or any(one is not other for one, other in zip(known, columns, strict=True)):
            reading = self._lookup.reading(columns, names.index(VALUES))
            self._readings[names] = columns, reading
        ways = None if placing is None else [placing if name == VALUES else None for name in names]
        return None if reading is None else reading.read(keys, list(out.values()), width, seed, ways)

    def read_ahead(self, located: EntryLocations) -> bool:
        there = located.found
        found = located if there.all() else located[there]
        if len(found.tokens):
            with suppress(FormatError):  # the read itself will say which entries are lost
                return self._rows.will_need(RowPlan(found.segment, found.row, found.tokens))
        return False

    def keys(self) -> NDArray[np.uint8]:
        live = [
            join_keys(*((table.prefix, table.rest) if alive is None else (table.prefix[alive], table.rest[alive])))
            for alive, table in zip(self._alive, self._tables, strict=True)
        ]
        keys = np.concatenate([np.empty((0, 32), np.uint8), *live])
        keys = keys[key_order(keys)]
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (keys[1:] != keys[:-1]).any(axis=1)
        return keys[fresh]

    def usage(self) -> Usage:
        keys = self.keys()
        present = {number for numbers in self._numbers for number in numbers.tolist() if number >= 0}
        nbytes = sum(self._segments[number].nbytes for number in present)
        return Usage(len(keys), int(self.locate(keys).tokens.sum()), nbytes, len(present))

    def damaged(self) -> dict[str, str]:
        return dict(self._damaged)

    def whereabouts(self, located: EntryLocations) -> tuple[list[str], NDArray[np.int64]]:
        return [segment.name for segment in self._segments], np.where(located.found, located.segment, -1)


def _plan(located: EntryLocations, found: NDArray[np.bool_]) -> RowPlan:
    if found.all():
        return RowPlan(located.segment, located.row, located.tokens)
    # An absent entry stands under some segment's number; none of its rows are read.
    segment = np.where(found, located.segment, located.segment[found][0])
    return RowPlan(segment, np.where(found, located.row, 0), located.tokens)


def _alive(table: Table, numbers: NDArray[np.int64], dead: Mapping[str, Collection[int]]) -> NDArray[np.bool_] | None:
    """Return which entries of a table are served, ``[n]``; None for all."""
    codes = [origin << 32 | entry for origin, name in enumerate(table.origins) if name in dead for entry in dead[name]]
    if not codes and (not len(numbers) or numbers.min() >= 0):
        return None
    alive: NDArray[np.bool_] = numbers[table.segment] >= 0
    if codes:
        alive &= ~np.isin(table.origin.astype(np.int64) << 32 | table.entry, np.array(codes, np.int64))
    return alive
