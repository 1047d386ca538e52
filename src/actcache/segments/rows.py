"""Row sources: how the rows of entries come from the files of segments into a buffer.

``MappedRows`` gathers from arenas; ``ReadRows`` reads where a mapping would not be safe (network file systems).
"""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError, SegmentGoneError
from actcache.format.ragged import offsets_of, row_indices
from actcache.io.files import translated
from actcache.io.mmap import Arena
from actcache.segments.segment import Segment


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn the failures of reading a segment into exceptions of this package."""
    with translated(f"cannot read {where}"):
        try:
            yield
        except FileNotFoundError:
            raise SegmentGoneError(f"{where} is gone; refresh the space") from None


_NONE = np.empty(0, np.int64)
_LONG_BYTES = 64 << 10  # of an entry, on average, from which on copying it beats gathering its rows

#: Reads entries first..last-1 of a batch; several threads may call it.
Read: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of a batch's entries are that one array has; ``[n]`` each."""

    column: str
    segments: NDArray[np.int64]  # their numbers
    starts: NDArray[np.int64]  # the first row of each entry in its segment
    lengths: NDArray[np.int64]


class RowSource(ABC):
    """Reads rows of segments, which are named by their number in the space. Thread-safe."""

    @abstractmethod
    def prepare(self, plan: RowPlan, out: NDArray[np.generic], width: int | None) -> Read:
        """Return what reads the batch into its buffer ``out``, packed or padded with zeros (see ``row_indices``).

        Both raise ``SegmentGoneError`` where a segment is gone, ``FormatError`` where it is shorter than it was, and
        ``KeyError`` where it has no such column.
        """

    @abstractmethod
    def will_need(self, plan: RowPlan) -> None:
        """Hint that these rows are read soon."""

    @abstractmethod
    def close(self) -> None: ...


class MappedRows(RowSource):
    """Rows of local files, gathered from one arena a column."""

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments  # grows; the number of a segment is its position
        # column -> its arena, and the first row of each segment in it, -1 where it is not mapped
        self._columns: dict[str, tuple[Arena, NDArray[np.int64]]] = {}
        self._lock = threading.Lock()

    def _begins(self, plan: RowPlan) -> tuple[Arena, NDArray[np.int64]]:
        """Return the arena of a column and each entry's first row in it; map what is not mapped yet."""
        column, numbers = plan.column, plan.segments
        arena, firsts = self._columns.get(column, (None, _NONE))
        if arena is None or (len(numbers) and int(numbers.max()) >= len(firsts)) or bool((firsts[numbers] < 0).any()):
            with self._lock:
                arena, firsts = self._map(column, sorted(set(numbers.tolist())))
        return arena, firsts[numbers] + plan.starts

    def _map(self, column: str, numbers: list[int]) -> tuple[Arena, NDArray[np.int64]]:
        arena, old = self._columns.get(column, (None, _NONE))
        firsts = np.full(len(self._segments), -1, np.int64)
        firsts[: len(old)] = old
        for number in numbers:
            if firsts[number] < 0:
                segment = self._segments[number]
                extent = segment.extents[column]
                if arena is None:
                    arena = Arena(extent.dtype, extent.shape[1:])
                self._columns[column] = arena, firsts  # as it goes: what is mapped stays so when a later one fails
                with reading(segment.files.where):
                    firsts[number] = arena.place(segment.file(column), extent.offset, extent.shape[0])
        if arena is None:
            raise KeyError(column)
        self._columns[column] = arena, firsts
        return arena, firsts

    def prepare(self, plan: RowPlan, out: NDArray[np.generic], width: int | None) -> Read:
        arena, begins = self._begins(plan)
        bounds, source = offsets_of(plan.lengths, width), arena.rows()
        if int(plan.lengths.sum()) * arena.row_bytes > _LONG_BYTES * len(plan.lengths):
            starts, lengths, places = begins.tolist(), plan.lengths.tolist(), bounds.tolist()

            def copy(first: int, last: int) -> None:  # one copy an entry: of long ones, faster than row by row
                for i in range(first, last):
                    begin, end = places[i], places[i] + lengths[i]
                    out[begin:end] = source[starts[i] : starts[i] + lengths[i]]
                    if end < places[i + 1]:
                        out[end : places[i + 1]] = 0

            return copy
        # All planning is done here, once a batch: what a thread does for a chunk is one native call.
        rows = row_indices(begins, plan.lengths, width)

        def read(first: int, last: int) -> None:
            begin, end = bounds[first], bounds[last]
            # "clip" is the mode that writes straight into ``out``; the snapshot has checked the bounds.
            np.take(source, rows[begin:end], axis=0, out=out[begin:end], mode="clip")

        return read

    def will_need(self, plan: RowPlan) -> None:
        arena, begins = self._begins(plan)
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
    """Rows read with ``preadv``, one call an entry; keeps at most ``most_files`` files open."""

    def __init__(self, segments: list[Segment], most_files: int = 64) -> None:
        self._segments = segments
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._most = most_files
        self._lock = threading.Lock()

    def prepare(self, plan: RowPlan, out: NDArray[np.generic], width: int | None) -> Read:
        bounds = offsets_of(plan.lengths, width).tolist()
        segments, starts, lengths = plan.segments.tolist(), plan.starts.tolist(), plan.lengths.tolist()

        def read(first: int, last: int) -> None:
            for i in range(first, last):
                end = bounds[i] + lengths[i]
                if lengths[i]:
                    self._read(self._segments[segments[i]], plan.column, starts[i], out[bounds[i] : end])
                out[end : bounds[i + 1]] = 0

        return read

    def _read(self, segment: Segment, column: str, start: int, out: NDArray[np.generic]) -> None:
        extent = segment.extents[column]
        view = out.reshape(-1).view(np.uint8).data
        offset = extent.offset + start * extent.row_bytes
        with reading(segment.files.where):
            descriptor = self._open(segment.file(column))
            try:
                while view:
                    count = os.preadv(descriptor, [view], offset)
                    if not count:
                        raise FormatError(f"{segment.files.where} is truncated")
                    view, offset = view[count:], offset + count
            finally:
                os.close(descriptor)

    def _open(self, path: Path) -> int:
        """Return a descriptor of the file that is the caller's to close, so that eviction never pulls it away."""
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
