"""Compaction: rows that are still served move from many or wasteful segments into few large ones.

Nothing is locked. A compacted segment names the segments that it replaces, which from then on nobody looks into, and
the birth of each entry, by which deletions and the order of copies hold as before. Two compactors at once write the
same rows twice, and the next one drops the second copy. Replaced segments are removed after a grace period, for readers
that still have them in a snapshot; a reader that comes later yet finds them gone and looks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Located
from actcache.errors import FormatError
from actcache.key import KEY_BYTES
from actcache.ragged import Lineage, Pieces, offsets_of
from actcache.storage.index import Table
from actcache.storage.rows import ReadRows
from actcache.storage.segment import Columns, Segment
from actcache.storage.snapshot import SegmentedSnapshot
from actcache.storage.workers import Workers

_PIECE_BYTES = 4 << 20  # gathered at once
#: A compaction that takes longer is thrown away. Tombstones outlive the last copy of their entries by twice as long, so
#: that what a compactor copied before a deletion, and publishes after it, still meets the tombstone.
SECONDS = 1800.0

_FIRST = np.zeros(1, np.int64)


@dataclass(frozen=True)
class Live:
    """The entries of one segment that are served, in the order of their rows."""

    segment: Segment
    keys: NDArray[np.uint8]  # [n, 32]
    located: Located

    @property
    def tokens(self) -> int:
        return int(self.located.tokens.sum())

    @property
    def nbytes(self) -> int:
        return self.tokens * self.segment.extents[VALUES].row_bytes

    @property
    def waste(self) -> float:
        """The share of the segment's rows that nobody is served."""
        return 1 - self.tokens / max(1, self.segment.tokens)

    def is_whole(self) -> bool:
        """Return whether these are all entries of the segment, as the segment itself says and not only an index."""
        segment, located = self.segment, self.located
        offsets = segment.offsets()
        said = (
            (located.row, offsets[:-1]),
            (located.tokens, np.diff(offsets)),
            (located.checksums, segment.read("checksums")),
            (self.keys, segment.read("keys")),
        )
        return all(np.array_equal(one, other) for one, other in said)


def survey(snapshot: SegmentedSnapshot, only: Collection[str] | None = None) -> list[Live]:
    """Return the live entries of every served segment (those named in ``only``), in the order of the names."""
    if only is None:
        keys = snapshot.keys()
    else:
        wanted = [s.read("keys") for s in snapshot.served().values() if s.name in only]
        keys = np.unique(np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *wanted]), axis=0)
    located = snapshot.locate(keys)
    order = np.lexsort((located.row, located.segment))  # the entries of a segment are then a run
    numbers = located.segment[order]
    found = []
    for number, segment in snapshot.served().items():
        if only is None or segment.name in only:
            first, last = np.searchsorted(numbers, (number, number + 1)).tolist()
            which = order[first:last]
            found.append(Live(segment, keys[which], located[which]))
    return sorted(found, key=lambda live: live.segment.name)


def plan(candidates: Sequence[Live], target_bytes: int, waste: float) -> list[list[Live]]:
    """Return which segments to merge into one each: small ones with their neighbours, and wasteful ones.

    Args:
        target_bytes: of rows, about what a merged segment gets at most.
        waste: the share of unserved rows from which on a segment is rewritten even alone.
    """
    worthy = [live for live in candidates if live.nbytes < target_bytes // 2 or live.waste >= waste]
    groups: list[list[Live]] = []
    for columns in sorted({live.segment.columns() for live in worthy}, key=sorted):
        group: list[Live] = []
        held = 0  # bytes of the group
        for live in worthy:
            if live.segment.columns() == columns:
                if group and held + live.nbytes > target_bytes:
                    groups.append(group)
                    group, held = [], 0
                group.append(live)
                held += live.nbytes
        groups.append(group)
    return [
        group for group in groups if any(live.tokens for live in group) and (len(group) > 1 or group[0].waste >= waste)
    ]


class Merger:
    """Makes one block of the live entries of some segments, and proves that what was written is what was read.

    Args:
        snapshot: has the segments.
        standing: the names of all segments that are listed.
        moved: told the bytes of rows that were written, or read back, since it was told last.

    Raises:
        FormatError, SegmentGoneError: a segment is damaged, or gone; also while the block is being written.
    """

    def __init__(
        self,
        snapshot: SegmentedSnapshot,
        group: Sequence[Live],
        columns: Columns,
        standing: Collection[str],
        moved: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._began = time.monotonic()
        self._moved = moved
        self._columns = columns
        self._digests: list[int] = []  # of the pieces of the rows
        fields = ("tokens", "checksums", "segment", "row")
        located = Located(*(np.concatenate([getattr(live.located, name) for live in group]) for name in fields))
        keys = np.concatenate([live.keys for live in group])
        self._small = {
            name: self._rows(snapshot, located, name) for name in sorted(group[0].segment.columns() - {VALUES})
        }
        tokens, (dtype, trailing) = int(located.tokens.sum()), columns[VALUES]

        def make() -> Iterator[NDArray[np.generic]]:
            self._digests.clear()
            for rows in self._pieces(snapshot, located):
                self._digests.append(_digest(rows))
                yield rows

        lineage, extra = _lineage(group, standing)
        values = Pieces(np.dtype(dtype), (tokens, *trailing), make)
        self.block = Block(
            keys, offsets_of(located.tokens), located.checksums, {VALUES: values, **self._small}, extra, lineage
        )

    def verify(self, segment: Segment) -> None:
        """Refuse what was written unless it is exactly what was read, and in good time.

        Raises:
            FormatError: it is not.
        """
        rows = ReadRows([segment])
        try:
            written = SegmentedSnapshot([segment], [Table.of_segments([segment])], [_FIRST], {}, rows, Workers(1), {})
            located = written.locate(self.block.keys)
            starts = self.block.offsets[:-1]
            same = bool((located.row == starts).all() and (located.checksums == self.block.checksums).all())
            same = same and all(
                np.array_equal(self._rows(written, located, name), rows) for name, rows in self._small.items()
            )
            if not same or list(map(_digest, self._pieces(written, located))) != self._digests:
                raise FormatError(f"{segment.files.where} is not what was read; its sources stay")
        finally:
            rows.close()
        if time.monotonic() - self._began > SECONDS:
            raise FormatError(f"{segment.files.where} took longer than {SECONDS:.0f} s; its sources stay")

    def _rows(self, snapshot: SegmentedSnapshot, located: Located, name: str) -> NDArray[np.generic]:
        dtype, trailing = self._columns[name]
        rows = np.empty((int(located.tokens.sum()), *trailing), dtype)
        snapshot.gather(located, {name: rows}, None, lambda first, last: None)
        return rows

    def _pieces(self, snapshot: SegmentedSnapshot, located: Located) -> Iterator[NDArray[np.generic]]:
        dtype, trailing = self._columns[VALUES]
        starts = offsets_of(located.tokens) * np.dtype(dtype).itemsize * int(np.prod(trailing))
        wanted = np.arange(0, int(starts[-1]), _PIECE_BYTES)
        cuts = np.unique(np.r_[np.searchsorted(starts, wanted), len(located.tokens)])
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            rows = self._rows(snapshot, located[first:last], VALUES)
            yield rows
            self._moved(rows.nbytes)


def _digest(rows: NDArray[np.generic]) -> int:
    return xxhash.xxh3_64_intdigest(rows.reshape(-1).view(np.uint8).data)


def _lineage(group: Sequence[Live], standing: Collection[str]) -> tuple[Lineage, NDArray[np.uint64] | None]:
    """Return where the entries were born, and their extra checksums."""
    births: dict[str, int] = {}
    birth, entries, extra, sources = [], [], [], []
    for live in group:
        entry = np.searchsorted(live.segment.offsets()[:-1], live.located.row)
        lineage = live.segment.lineage()
        numbers = np.array([births.setdefault(name, len(births)) for name in lineage.births], np.uint32)
        birth.append(numbers[lineage.birth[entry]])
        entries.append(lineage.birth_entries[entry])
        # And what a source replaces and still stands: it would come back when the source is removed first.
        sources += [live.segment.name, *(name for name in live.segment.sources if name in standing)]
        if "extra_checksums" in live.segment.extents:
            extra.append(live.segment.read("extra_checksums")[entry])
    lineage = Lineage(tuple(births), np.concatenate(birth), np.concatenate(entries), tuple(dict.fromkeys(sources)))
    return lineage, np.concatenate(extra) if extra else None
