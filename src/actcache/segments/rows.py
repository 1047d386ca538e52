"""Row sources: how the rows of entries come from the files of segments into a buffer.

``MappedRows`` gathers from arenas, and reads what is not in memory; ``ReadRows`` reads all of it, where a mapping would
not be safe (network file systems).
"""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Buffers, Expected
from actcache.errors import FormatError, SegmentGoneError
from actcache.format.ragged import PAYLOAD, VALUES, offsets_of, placed
from actcache.io import loops, memory
from actcache.io.files import translated
from actcache.io.loops import Column, Digests, MappedColumn, Placing, Pooled
from actcache.io.mmap import Arena
from actcache.segments.segment import Segment

_DEPTH = 32  # reads at a time
_MOST_FILES = 64  # that are kept open
_LOOKS_WHEN_WARM = 2  # pages of a batch to come that are looked at
_SHARE = 8  # of the memory, the part that a space which is larger may take up in the page cache
_MEMORY_SECONDS = 10.0  # for which what is known of the machine's memory is good


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


class Frames:
    """Where the frames of entries of compressed segments lie, by the segments' numbers. Thread-safe.

    What is read of a segment stays in memory: 16 bytes an entry.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments
        self._known: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def plan(self, plan: RowPlan) -> RowPlan:
        """Return where the frames of a batch's entries are: bytes of ``payload``, in the place of rows.

        Raises:
            SegmentGoneError, FormatError: a segment is gone, or damaged.
        """
        starts, sizes = np.zeros(len(plan.starts), np.int64), np.zeros(len(plan.starts), np.int64)
        for number in np.unique(plan.segments).tolist():
            which = np.flatnonzero((plan.segments == number) & (plan.lengths > 0))
            offsets, bounds = self._of(number)
            entry = np.searchsorted(offsets, plan.starts[which])
            good = (entry < len(offsets) - 1) & (offsets[np.minimum(entry, len(offsets) - 1)] == plan.starts[which])
            if not good.all():
                row = plan.starts[which][~good][0]
                raise FormatError(f"{self._segments[number].files.where} has no entry that begins at row {row}")
            starts[which], sizes[which] = bounds[entry], bounds[entry + 1] - bounds[entry]
        return RowPlan(plan.segments, starts, sizes)

    def _of(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if (found := self._known.get(number)) is None:
            segment = self._segments[number]
            with reading(segment.files.where):
                found = self._known[number] = segment.offsets(), segment.payload_offsets()
        return found

    def column(self, plan: RowPlan, name: str) -> tuple[str, RowPlan]:
        """Return the array of the files that has the rows of a ragged array, or their frames, and where."""
        compressed = name == VALUES and bool(len(plan.segments)) and self._segments[plan.segments[0]].compressed
        return (PAYLOAD, self.plan(plan)) if compressed else (name, plan)


class RowSource(ABC):
    """Reads rows of segments, which are named by their number in the space. Thread-safe."""

    frames: Frames

    @abstractmethod
    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        """Read a batch into its buffers; return the positions of what is not intact, as ``backend.Snapshot.gather``."""

    def place(self, plan: RowPlan, out: Buffers, placing: Placing, expected: Expected | None) -> NDArray[np.int64]:
        """Read a batch to where it belongs, as ``backend.Snapshot.place``."""
        return placed(out, {VALUES: placing}, plan.lengths, lambda rows: self.gather(plan, rows, None, expected))

    def mapped(self, names: Sequence[str]) -> tuple[MappedColumn, ...] | None:
        """Return what is mapped of some columns; None where they are to be read by ``gather``. The same objects as long
        as nothing more is mapped."""
        return None

    @abstractmethod
    def will_need(self, plan: RowPlan) -> bool:
        """Hint that the activations of these entries are read soon; False where they seem to be in memory, or a hint is
        of no use."""

    @abstractmethod
    def close(self) -> None: ...


class OpenFiles:
    """Open files of segments, the last ``most`` that were asked for. Thread-safe."""

    def __init__(self, most: int = _MOST_FILES) -> None:
        self.most = most
        self._files: OrderedDict[tuple[Path, int], int] = OrderedDict()
        self._lock = threading.Lock()

    def descriptor(self, path: Path, flags: int = 0) -> int:
        """Return a descriptor that is the caller's to close, so that nobody's eviction pulls it away. ``OSError``."""
        with self._lock:
            key = path, flags
            if key not in self._files:
                self._files[key] = self._open(path, flags)
            self._files.move_to_end(key)
            try:
                return os.dup(self._files[key])
            finally:
                while len(self._files) > self.most:
                    os.close(self._files.popitem(last=False)[1])

    def _open(self, path: Path, flags: int) -> int:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        if not flags and hasattr(os, "posix_fadvise"):
            # What a shuffled batch reads says nothing of what comes next.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return descriptor

    def close(self) -> None:
        with self._lock:
            self.most = 0  # a read that still runs keeps nothing open
            while self._files:
                os.close(self._files.popitem()[1])


@contextmanager
def _descriptors(files: OpenFiles, segments: Sequence[Segment], column: str, flags: int = 0) -> Iterator[list[int]]:
    """Open the files that have a column of some segments, for as long as they are read."""
    opened: dict[Path, int] = {}
    try:
        for segment in segments:
            with reading(segment.files.where):
                if (path := segment.file(column)) not in opened:
                    opened[path] = files.descriptor(path, flags)
        yield [opened[segment.file(column)] for segment in segments]
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _read_column(
    segments: Sequence[Segment],
    descriptors: Sequence[int],
    of_entry: NDArray[np.int64],
    plan: RowPlan,
    column: str,
    mapped: Column,
) -> Column:
    """Add to a column where its rows lie in files: each entry in that of the segment at ``of_entry``."""
    files = np.array(descriptors, np.int32)[of_entry]
    begins = np.array([segment.extents[column].offset for segment in segments], np.int64)[of_entry]
    row_bytes = segments[0].extents[column].row_bytes
    return mapped._replace(files=files, places=begins + plan.starts * row_bytes)


def of_frames(column: Column, places: RowPlan) -> Column:
    """Return a column whose rows come from frames."""
    assert column.out is not None
    row_bytes, item = loops.stored_row(column.out, column.placing)
    return column._replace(row_bytes=row_bytes, sizes=places.lengths, item=item)


@contextmanager
def _failures(segments: Sequence[Segment], of_entry: NDArray[np.int64]) -> Iterator[None]:
    """Have a read that fails name the segment of the entry."""
    try:
        yield
    except loops.EntryReadError as error:
        with reading(segments[of_entry[error.entry]].files.where):
            raise


@dataclass(frozen=True)
class _Mapped:
    """What is mapped of one column."""

    arena: Arena
    firsts: NDArray[np.int64]  # first row of each segment in the arena, by its number; -1 where it is not mapped
    whole: bool  # whether all of these segments are
    column: MappedColumn

    def has(self, numbers: NDArray[np.int64], segments: int) -> bool:
        """Return whether all segments of these numbers, of so many, are mapped."""
        if self.whole and len(self.firsts) == segments:
            return True
        return not len(numbers) or (int(numbers.max()) < len(self.firsts) and int(self.firsts[numbers].min()) >= 0)


class MappedRows(RowSource):
    """Rows of local files, gathered from one arena a column.

    Activations that are not in memory are read, many entries at a time: a page fault brings a page, and waits for it.
    They go through the page cache where it can hold the space. Of a larger one the first go through it, up to an eighth
    of the memory, and the others past it: a scan of more than the memory would evict what others use, and itself.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments  # grows; the number of a segment is its position
        self.frames = Frames(segments)
        self._columns: dict[str, _Mapped] = {}  # replaced, never changed
        self._lock = threading.Lock()
        self._files = OpenFiles()
        self._cold = True  # whether what was read last was not all in memory
        self._direct, self._room, self._look_again = 0, 0, 0.0  # see ``_look``; when to look again
        self._brought = 0  # bytes that were read through the page cache

    def _mapped(self, column: str, plan: RowPlan) -> tuple[Arena, NDArray[np.int64]]:
        """Return the arena of a column and where each entry begins in it, in bytes; map what is not mapped yet."""
        mapped = self._columns.get(column)
        if mapped is None or not mapped.has(plan.segments, len(self._segments)):
            with self._lock:
                mapped = self._map(column, sorted(set(plan.segments.tolist())))
        return mapped.arena, (mapped.firsts[plan.segments] + plan.starts) * mapped.arena.row_bytes

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
                described = MappedColumn(arena.row_bytes, arena.rows(), firsts)
                self._columns[column] = _Mapped(arena, firsts, bool((firsts >= 0).all()), described)
        if arena is None:
            raise KeyError(column)
        return self._columns[column]

    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        return self._bring(plan, out, width, expected, None)

    def place(self, plan: RowPlan, out: Buffers, placing: Placing, expected: Expected | None) -> NDArray[np.int64]:
        return self._bring(plan, out, None, expected, placing)

    def _bring(
        self,
        plan: RowPlan,
        out: Buffers,
        width: int | None,
        expected: Expected | None,
        placing: Placing | None,
    ) -> NDArray[np.int64]:
        columns, at, told, rows = [], -1, False, (VALUES, plan)
        for name, buffer in out.items():
            array, places = self.frames.column(plan, name)
            arena, begins = self._mapped(array, places)
            of = placing if name == VALUES else None
            column = Column(arena.row_bytes, buffer, arena.rows(), begins, placing=of)
            columns.append(column if array == name else of_frames(column, places))
            if name in (VALUES, PAYLOAD):
                at, told, rows = len(columns) - 1, arena.is_told, (array, places)
        offsets = offsets_of(plan.lengths, width)
        digests = None if expected is None else expected.digests(list(out))
        if not told:  # only of a mapping that the kernel tells of is it known what is in memory
            return loops.gather(columns, plan.lengths, offsets, digests)
        bad = loops.gather_if_present(columns, plan.lengths, offsets, digests, at)
        self._cold = bad is None
        return bad if bad is not None else self._read(plan, at, rows, columns, offsets, digests)

    def mapped(self, names: Sequence[str]) -> tuple[MappedColumn, ...] | None:
        if self._cold:
            return None
        found = [self._columns.get(name) for name in names]
        if any(one is None or not one.arena.is_told for one in found):
            return None
        return tuple(one.column for one in found if one is not None)

    def _read(
        self,
        plan: RowPlan,
        at: int,
        rows: tuple[str, RowPlan],
        columns: list[Column],
        offsets: NDArray[np.int64],
        digests: Digests | None,
    ) -> NDArray[np.int64]:
        """Gather, and read activations, the column at ``at``, where they are not in memory.

        ``rows``: the array that has them, or their frames, and where these are in it.
        """
        numbers, of_entry = np.unique(plan.segments, return_inverse=True)
        if len(numbers) > self._files.most:
            return loops.gather(columns, plan.lengths, offsets, digests)
        segments = [self._segments[number] for number in numbers.tolist()]
        array, places = rows
        direct = self._direct_flag(int(places.lengths.sum()) * segments[0].extents[array].row_bytes)
        with ExitStack() as stack:
            try:
                descriptors = stack.enter_context(_descriptors(self._files, segments, array, direct))
            except SegmentGoneError:  # what is mapped is still there without its name
                return loops.gather(columns, plan.lengths, offsets, digests)
            columns[at] = _read_column(segments, descriptors, of_entry, places, array, columns[at])
            with _failures(segments, of_entry):
                return loops.gather(columns, plan.lengths, offsets, digests, threads=_DEPTH, direct=direct != 0)

    def _direct_flag(self, nbytes: int) -> int:
        """Return the flag that opens files for reads past the page cache, where so many bytes more are not to go
        through it; else 0."""
        if (now := time.monotonic()) >= self._look_again:
            self._look_again = now + _MEMORY_SECONDS
            self._direct, self._room = self._look()
        if not self._direct or self._brought + nbytes <= self._room:
            self._brought += nbytes
            return 0
        return self._direct

    def _look(self) -> tuple[int, int]:
        """Return the flag of direct reads where the page cache cannot hold the space, and what may go through it even
        so: who reads a few documents of a large space again and again is to find them in memory."""
        room = memory.available()
        if 2 * sum(segment.rows.nbytes for segment in self._segments[:]) <= room or not self._segments:
            return 0, 0
        direct = getattr(os, "O_DIRECT", 0)
        try:
            os.close(self._files.descriptor(self._segments[-1].file(self._segments[-1].rows_name), direct))
        except OSError:  # this file system takes none
            direct = 0
        return direct, room // _SHARE

    def will_need(self, plan: RowPlan) -> bool:
        array, plan = self.frames.column(plan, VALUES)
        arena, begins = self._mapped(array, plan)
        # Where what was read last was in memory, this will be, too, or nearly.
        looks = loops.LOOKS if self._cold else _LOOKS_WHEN_WARM
        mapped = Column(arena.row_bytes, memory=arena.rows(), begins=begins)
        if arena.is_told and not loops.seems_absent(mapped, plan.lengths, looks):
            return False
        nbytes = plan.lengths * arena.row_bytes
        if self._direct_flag(int(nbytes.sum())):
            return True  # they are read when they are asked for
        order = np.argsort(begins)
        begins = begins[order]
        ends = begins + nbytes[order]
        cuts = np.flatnonzero(begins[1:] != ends[:-1]) + 1  # neighbours on disk become one hint
        first, last = begins[np.r_[0, cuts]], ends[np.r_[cuts - 1, -1]]
        arena.will_need(first, last - first)
        return True

    def close(self) -> None:
        self._files.close()
        with self._lock:
            self._columns.clear()


class ReadRows(RowSource):
    """Rows read with ``pread``, one call an entry and array; keeps at most ``most_files`` files open."""

    def __init__(self, segments: list[Segment], most_files: int = _MOST_FILES) -> None:
        self._segments = segments
        self.frames = Frames(segments)
        self._files = OpenFiles(most_files)
        self._most = most_files

    def gather(self, plan: RowPlan, out: Buffers, width: int | None, expected: Expected | None) -> NDArray[np.int64]:
        return self._bring(plan, out, offsets_of(plan.lengths, width), expected, None)

    def place(self, plan: RowPlan, out: Buffers, placing: Placing, expected: Expected | None) -> NDArray[np.int64]:
        return self._bring(plan, out, offsets_of(plan.lengths), expected, placing)

    def _bring(
        self,
        plan: RowPlan,
        out: Buffers,
        offsets: NDArray[np.int64],
        expected: Expected | None,
        placing: Placing | None,
    ) -> NDArray[np.int64]:
        numbers, of_entry = np.unique(plan.segments, return_inverse=True)
        at_once = max(1, self._most // len(out))
        if len(numbers) > at_once and isinstance(placing, Pooled):  # which counts the entries of one gather
            return super().place(plan, out, placing, expected)
        if len(numbers) <= at_once:
            return self._gather(plan, numbers, of_entry, out, offsets, expected, placing)
        bad = [np.empty(0, np.int64)]
        for first in range(0, len(numbers), at_once):  # no more files are open at a time
            some = numbers[first : first + at_once]
            which = np.flatnonzero((of_entry >= first) & (of_entry < first + len(some)))
            part = RowPlan(plan.segments[which], plan.starts[which], plan.lengths[which])
            places = np.stack([offsets[which], offsets[which + 1]])
            of_part = None if expected is None else expected[which]
            bad.append(which[self._gather(part, some, of_entry[which] - first, out, places, of_part, placing)])
        return np.sort(np.concatenate(bad))

    def _gather(
        self,
        plan: RowPlan,
        numbers: NDArray[np.int64],
        of_entry: NDArray[np.int64],
        out: Buffers,
        offsets: NDArray[np.int64],
        expected: Expected | None,
        placing: Placing | None,
    ) -> NDArray[np.int64]:
        """Read entries of a few segments, ``numbers``, of which each entry lies in the one at ``of_entry``."""
        segments = [self._segments[number] for number in numbers.tolist()]
        digests = None if expected is None else expected.digests(list(out))
        with ExitStack() as stack:
            columns = []
            for name, buffer in out.items():
                array, places = self.frames.column(plan, name)
                descriptors = stack.enter_context(_descriptors(self._files, segments, array))
                of = placing if name == VALUES else None
                column = Column(loops.stored_row(buffer, of)[0], buffer, placing=of)
                column = column if array == name else of_frames(column, places)
                columns.append(_read_column(segments, descriptors, of_entry, places, array, column))
            with _failures(segments, of_entry):
                return loops.gather(columns, plan.lengths, offsets, digests, threads=_DEPTH)

    def will_need(self, plan: RowPlan) -> bool:
        """Do nothing: network file systems read ahead by themselves."""
        return False

    def close(self) -> None:
        self._files.close()
