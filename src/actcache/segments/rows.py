"""Row sources: how the rows of entries come from the files of segments into a buffer.

``MappedRows`` gathers from arenas; ``ReadRows`` reads where a mapping would not be safe (network file systems).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Buffers, Expected
from actcache.errors import SegmentGoneError
from actcache.format.ragged import VALUES, offsets_of
from actcache.io import loops
from actcache.io.files import translated
from actcache.io.loops import Column
from actcache.io.mmap import Arena
from actcache.segments.segment import Segment

_DEPTH = 16  # reads at a time


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn the failures of reading a segment into exceptions of this package."""
    with translated(f"cannot read {where}"):
        try:
            yield
        except FileNotFoundError:
            raise SegmentGoneError(f"{where} is gone; refresh the space") from None


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of a batch's entries are; ``[n]`` each."""

    segments: NDArray[np.int64]  # their numbers
    starts: NDArray[np.int64]  # the first row of each entry in its segment
    lengths: NDArray[np.int64]  # 0 where it is absent; it stands under some segment's number all the same


class RowSource(ABC):
    """Reads rows of segments, which are named by their number in the space. Thread-safe."""

    @abstractmethod
    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        """Read a batch into its buffers; return the positions of what is not intact, as ``backend.Snapshot.gather``."""

    @abstractmethod
    def will_need(self, plan: RowPlan) -> None:
        """Hint that the activations of these entries are read soon."""

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class _Mapped:
    """What is mapped of one column."""

    arena: Arena
    firsts: NDArray[np.int64]  # first row of each segment in the arena, by its number; -1 where it is not mapped
    whole: bool  # whether all of these segments are

    def has(self, numbers: NDArray[np.int64], segments: int) -> bool:
        """Return whether all segments of these numbers, of so many, are mapped."""
        if self.whole and len(self.firsts) == segments:
            return True
        return not len(numbers) or (int(numbers.max()) < len(self.firsts) and int(self.firsts[numbers].min()) >= 0)


class MappedRows(RowSource):
    """Rows of local files, gathered from one arena a column."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments  # grows; the number of a segment is its position
        self._columns: dict[str, _Mapped] = {}  # replaced, never changed
        self._lock = threading.Lock()

    def _begins(self, column: str, plan: RowPlan) -> tuple[Arena, NDArray[np.int64]]:
        """Return the arena of a column and each entry's first row in it; map what is not mapped yet."""
        mapped = self._columns.get(column)
        if mapped is None or not mapped.has(plan.segments, len(self._segments)):
            with self._lock:
                mapped = self._map(column, sorted(set(plan.segments.tolist())))
        return mapped.arena, mapped.firsts[plan.segments] + plan.starts

    def _map(self, column: str, numbers: list[int]) -> _Mapped:
        old = self._columns.get(column)
        firsts = np.full(len(self._segments), -1, np.int64)
        arena = None if old is None else old.arena
        if old is not None:
            firsts[: len(old.firsts)] = old.firsts
        try:
            for number in numbers:
                if firsts[number] < 0:
                    segment = self._segments[number]
                    extent = segment.extents[column]
                    if arena is None:
                        arena = Arena(extent.dtype, extent.shape[1:])
                    with reading(segment.files.where):
                        firsts[number] = arena.place(segment.file(column), extent.offset, extent.shape[0])
        finally:  # what is mapped stays so when a later one fails
            if arena is not None:
                self._columns[column] = _Mapped(arena, firsts, bool((firsts >= 0).all()))
        if arena is None:
            raise KeyError(column)
        return self._columns[column]

    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        columns = []
        for name, buffer in out.items():
            arena, begins = self._begins(name, plan)
            columns.append(Column(arena.row_bytes, buffer, arena.rows(), begins * arena.row_bytes))
        digests = None if expected is None else expected.digests(list(out))
        return loops.gather(columns, plan.lengths, offsets_of(plan.lengths, width), digests)

    def will_need(self, plan: RowPlan) -> None:
        arena, begins = self._begins(VALUES, plan)
        order = np.argsort(begins)
        begins = begins[order]
        ends = begins + plan.lengths[order]
        cuts = np.flatnonzero(begins[1:] != ends[:-1]) + 1  # neighbours on disk become one hint
        first, last = begins[np.r_[0, cuts]], ends[np.r_[cuts - 1, -1]]
        arena.will_need(first, last - first)

    def close(self) -> None:
        with self._lock:
            self._columns.clear()


class ReadRows(RowSource):
    """Rows read with ``pread``, one call an entry and array; keeps at most ``most_files`` files open."""

    def __init__(self, segments: list[Segment], most_files: int = 64) -> None:
        self._segments = segments
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._most = self._at_once = most_files
        self._lock = threading.Lock()

    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        offsets = offsets_of(plan.lengths, width)
        numbers, of_entry = np.unique(plan.segments, return_inverse=True)
        at_once = max(1, self._at_once // len(out))
        if len(numbers) <= at_once:
            return self._gather(plan, numbers, of_entry, out, offsets, expected)
        bad = [np.empty(0, np.int64)]
        for first in range(0, len(numbers), at_once):  # no more files are open at a time
            some = numbers[first : first + at_once]
            which = np.flatnonzero((of_entry >= first) & (of_entry < first + len(some)))
            part = RowPlan(plan.segments[which], plan.starts[which], plan.lengths[which])
            places = np.stack([offsets[which], offsets[which + 1]])
            of_part = None if expected is None else expected[which]
            bad.append(which[self._gather(part, some, of_entry[which] - first, out, places, of_part)])
        return np.sort(np.concatenate(bad))

    def _gather(
        self,
        plan: RowPlan,
        numbers: NDArray[np.int64],
        of_entry: NDArray[np.int64],
        out: Buffers,
        offsets: NDArray[np.int64],
        expected: Expected | None,
    ) -> NDArray[np.int64]:
        """Read entries of a few segments, ``numbers``, of which each entry lies in the one at ``of_entry``."""
        segments = [self._segments[number] for number in numbers.tolist()]
        opened: dict[Path, int] = {}
        try:
            columns = []
            for name, buffer in out.items():
                row_bytes = buffer.strides[0]
                files = np.array([self._open(segment, name, opened) for segment in segments], np.int32)[of_entry]
                begins = np.array([segment.extents[name].offset for segment in segments], np.int64)[of_entry]
                columns.append(Column(row_bytes, buffer, files=files, places=begins + plan.starts * row_bytes))
            digests = None if expected is None else expected.digests(list(out))
            try:
                return loops.gather(columns, plan.lengths, offsets, digests, threads=_DEPTH)
            except loops.EntryReadError as error:
                with reading(segments[of_entry[error.entry]].files.where):
                    raise
        finally:
            for descriptor in opened.values():
                os.close(descriptor)

    def _open(self, segment: Segment, column: str, opened: dict[Path, int]) -> int:
        """Return a descriptor of the file that has a column. It is this read's own, so that no other's eviction pulls
        it away."""
        with reading(segment.files.where):
            path = segment.file(column)
            if path not in opened:
                opened[path] = self._duplicate(path)
            return opened[path]

    def _duplicate(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.move_to_end(path)
            try:
                return os.dup(self._files[path])
            finally:
                while len(self._files) > self._most:
                    os.close(self._files.popitem(last=False)[1])

    def will_need(self, plan: RowPlan) -> None:
        """Do nothing: network file systems read ahead by themselves."""

    def close(self) -> None:
        with self._lock:
            self._most = 0  # a read that still runs keeps nothing open
            while self._files:
                os.close(self._files.popitem()[1])
