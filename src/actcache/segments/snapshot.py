"""A snapshot of a segmented space: the tables that find its entries and the source that reads their rows."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Buffers, Done, EntryLocations, Snapshot, Usage
from actcache.errors import FormatError, SegmentGoneError
from actcache.format.keys import join_keys, key_order, split_keys
from actcache.format.ragged import chunks
from actcache.io.workers import Workers
from actcache.segments.index import Table
from actcache.segments.rows import RowPlan, RowSource
from actcache.segments.segment import Segment

logger = logging.getLogger(__name__)


class SegmentedSnapshot(Snapshot):
    """What was visible at one moment.

    Args:
        segments: all segments that the space ever knew, by number.
        tables: disjoint tables, the mapped index first.
        numbers: for each table, the number of each of its segments, -1 where the segment is gone or replaced.
        dead: entries that tombstones name, segment of origin -> numbers.
        damaged: segments that could not be read, name -> what is wrong.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        tables: Sequence[Table],
        numbers: Sequence[NDArray[np.int64]],
        dead: Mapping[str, Collection[int]],
        rows: RowSource,
        workers: Workers,
        damaged: Mapping[str, str],
    ) -> None:
        self._segments, self._tables, self._numbers = segments, tables, numbers
        self._rows, self._workers = rows, workers
        self._dead, self._damaged = dead, dict(damaged)
        self._having: dict[str, NDArray[np.bool_]] = {}  # column -> which segments have it, by number
        # By segments' numbers: 16 bytes an entry, of segments with optional arrays that were read.
        self._extras: dict[int, tuple[NDArray[np.int64], NDArray[np.uint64]]] = {}
        self._alive = [_alive(table, of, dead) for table, of in zip(tables, numbers, strict=True)]
        origins = sorted({origin for table in tables for origin in table.origins})
        rank = {origin: number for number, origin in enumerate(origins)}
        self._ranks = [np.array([rank[origin] for origin in table.origins], np.int64) for table in tables]
        # Of copies of one origin, the one in the segment of the last name: whoever looks finds the same.
        self._names = np.zeros(len(segments), np.int64)
        self._names[sorted(range(len(segments)), key=lambda n: segments[n].name)] = np.arange(len(segments))
        self._limits = np.array([segment.tokens for segment in segments], np.int64)

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        prefix, rest = split_keys(keys)
        count = len(keys)
        segment, first_row, rank = np.full((3, count), -1, np.int64)
        located = EntryLocations(np.zeros(count, np.int64), np.zeros(count, np.uint64), segment, first_row)
        for table, numbers, alive, ranks in zip(self._tables, self._numbers, self._alive, self._ranks, strict=True):
            position = table.find(prefix, rest, alive)
            which = np.flatnonzero(position >= 0)
            if not len(which):
                continue
            position = position[which]
            number = numbers[table.segment[position]]
            row, tokens = table.row[position], table.tokens[position].astype(np.int64)
            inside = (row >= 0) & (tokens > 0) & (row <= self._limits[number] - tokens)
            if not inside.all():
                logger.warning("the index points outside of %d segments: rebuild it", (~inside).sum())
            place = ranks[table.origin[position]] * len(self._segments) + self._names[number]
            better = inside & (place > rank[which])
            which, position, number = which[better], position[better], number[better]
            located.tokens[which], located.checksums[which] = tokens[better], table.checksum[position]
            located.segment[which], located.row[which] = number, row[better]
            rank[which] = place[better]
        return located

    def copies(self, keys: NDArray[np.uint8]) -> dict[str, list[int]]:
        """Return every copy of these keys that is not deleted, by its origin: segment -> numbers of entries.

        Those in replaced segments too: they are served again should the segment be lost that replaces them.
        """
        prefix, rest = split_keys(keys)
        copies: dict[str, set[int]] = {}
        for table in self._tables:
            position = table.copies(prefix, rest)
            for origin, entry in zip(table.origin[position].tolist(), table.entry[position].tolist(), strict=True):
                if entry not in self._dead.get(table.origins[origin], ()):
                    copies.setdefault(table.origins[origin], set()).add(entry)
        return {origin: sorted(entries) for origin, entries in copies.items()}

    def served(self) -> dict[int, Segment]:
        """Return the segments whose entries are served, by number."""
        return {int(n): self._segments[n] for numbers in self._numbers for n in numbers[numbers >= 0]}

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        if column not in self._having:
            self._having[column] = np.array([column in segment.extents for segment in self._segments], bool)
        having = self._having[column]
        return having[located.segment] & located.found if len(having) else located.found

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

    def gather(self, located: EntryLocations, out: Buffers, width: int | None, done: Done) -> None:
        count = len(located.tokens)
        if not located.found.any():
            for buffer in out.values():
                buffer[: count * (width or 0)] = 0
            done(0, count)
            return
        # An absent entry stands under some segment's number; none of its rows are read.
        segment = np.where(located.found, located.segment, located.segment[located.found][0])
        row = np.where(located.found, located.row, 0)
        plans = ((RowPlan(name, segment, row, located.tokens), buffer) for name, buffer in out.items())
        reads = [self._rows.prepare(plan, buffer, width) for plan, buffer in plans]
        self._workers.run_chunks([*reads, done], chunks(located.tokens, width, out))

    def read_ahead(self, located: EntryLocations) -> None:
        found = located[located.found]
        if len(found.tokens):
            with suppress(FormatError):  # the read itself will say which entries are lost
                self._rows.will_need(RowPlan(VALUES, found.segment, found.row, found.tokens))

    def keys(self) -> NDArray[np.uint8]:
        live = [
            join_keys(*((table.prefix, table.rest) if alive is None else (table.prefix[alive], table.rest[alive])))
            for table, alive in zip(self._tables, self._alive, strict=True)
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


def _alive(table: Table, numbers: NDArray[np.int64], dead: Mapping[str, Collection[int]]) -> NDArray[np.bool_] | None:
    """Return which entries of a table are served, ``[n]``; None for all."""
    codes = [origin << 32 | entry for origin, name in enumerate(table.origins) if name in dead for entry in dead[name]]
    if not codes and (not len(numbers) or numbers.min() >= 0):
        return None
    alive: NDArray[np.bool_] = numbers[table.segment] >= 0
    if codes:
        alive &= ~np.isin(table.origin.astype(np.int64) << 32 | table.entry, np.array(codes, np.int64))
    return alive
