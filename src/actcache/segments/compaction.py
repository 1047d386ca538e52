"""Compaction: rows that are still served move from many or wasteful segments into few large ones.

Nothing is locked. A compacted segment names the segments that it replaces, which from then on nobody looks into, and
the origin of each entry, by which deletions and the order of copies hold as before. Two compactors at once write the
same rows twice, and the next one drops the second copy. Replaced segments are removed after a grace period, for readers
that still have them in a snapshot; a reader that comes later yet finds them gone and looks again.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import GRACE_SECONDS, VALUES, Block, BytesDone, Columns, Compaction, EntryLocations
from actcache.errors import DataError, FormatError, SegmentGoneError, StoreError
from actcache.format.keys import KEY_BYTES
from actcache.format.ragged import OWN, PAYLOAD, Column, Origins, Pieces, offsets_of, runs
from actcache.segments.catalog import Catalog
from actcache.segments.index import Table
from actcache.segments.places.place import Place
from actcache.segments.rows import ReadRows
from actcache.segments.segment import Segment
from actcache.segments.snapshot import SegmentedSnapshot

logger = logging.getLogger(__name__)

_PIECE_BYTES = 4 << 20  # gathered at once
#: A compaction that takes longer is thrown away. Tombstones outlive the last copy of their entries by twice as long, so
#: that what a compactor copied before a deletion, and publishes after it, still meets the tombstone.
SECONDS = 1800.0

#: Seconds after which a segment that no index names is a killed writer's.
_ABANDONED = 86_400.0

_FIRST = np.zeros(1, np.int64)


@dataclass(frozen=True)
class LiveSegment:
    """The entries of one segment that are served, in the order of their rows."""

    segment: Segment
    keys: NDArray[np.uint8]  # [n, 32]
    located: EntryLocations

    @property
    def tokens(self) -> int:
        return int(self.located.tokens.sum())

    @property
    def nbytes(self) -> int:
        return self.segment.rows.nbytes * self.tokens // max(1, self.segment.tokens)

    @property
    def waste(self) -> float:
        """The share of the segment's rows that nobody is served."""
        return 1 - self.tokens / max(1, self.segment.tokens)

    def is_whole(self) -> bool:
        """Return whether these are all entries of the segment, as the segment itself says and not only an index."""
        located, offsets = self.located, self.segment.offsets()
        said = (
            (located.row, offsets[:-1]),
            (located.tokens, np.diff(offsets)),
            (located.checksums, self.segment.read("checksums")),
            (self.keys, self.segment.read("keys")),
        )
        return all(np.array_equal(one, other) for one, other in said)


def live_segments(snapshot: SegmentedSnapshot, only: Collection[str] | None = None) -> list[LiveSegment]:
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
            found.append(LiveSegment(segment, keys[which], located[which]))
    return sorted(found, key=lambda live: live.segment.name)


def merge_plan(candidates: Sequence[LiveSegment], target_bytes: int, waste: float) -> list[list[LiveSegment]]:
    """Return which segments to merge into one each: small ones with their neighbours, and wasteful ones.

    A merged segment gets about ``target_bytes`` of rows at most; one whose share of unserved rows is ``waste`` or more
    is rewritten even alone.
    """
    worthy = [live for live in candidates if live.nbytes < target_bytes // 2 or live.waste >= waste]
    groups: list[list[LiveSegment]] = []
    for columns in sorted({live.segment.columns() for live in worthy}, key=sorted):
        group: list[LiveSegment] = []
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

    ``standing`` are the names of all listed segments; ``moved`` is told the bytes of rows that were written, or read
    back, since it was told last. Raises ``FormatError`` or ``SegmentGoneError`` where a segment is damaged or gone,
    also while the block is being written.
    """

    def __init__(
        self,
        snapshot: SegmentedSnapshot,
        group: Sequence[LiveSegment],
        columns: Columns,
        standing: Collection[str],
        moved: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self._began = time.monotonic()
        self._moved = moved
        own = {name: (e.dtype, e.shape[1:]) for name, e in group[0].segment.extents.items() if name == OWN}
        self._columns = {**columns, **own}
        self._digests: list[int] = []  # of the pieces of the rows
        fields = ("tokens", "checksums", "segment", "row")
        located = EntryLocations(*(np.concatenate([getattr(live.located, name) for live in group]) for name in fields))
        keys = np.concatenate([live.keys for live in group])
        self._small = {
            name: self._rows(snapshot, located, name) for name in sorted(group[0].segment.columns() - {VALUES})
        }
        # Frames are moved as they are.
        self._name = group[0].segment.rows_name
        rows = snapshot.frames(located) if self._name == PAYLOAD else located
        dtype, trailing = columns[self._name]

        def make() -> Iterator[NDArray[np.generic]]:
            self._digests.clear()
            for piece in self._pieces(snapshot, rows):
                self._digests.append(_digest(piece))
                yield piece

        origins, extra = _origins(group, standing)
        values = Pieces(np.dtype(dtype), (int(rows.tokens.sum()), *trailing), make)
        ragged: dict[str, Column] = {self._name: values, **self._small}
        bounds = offsets_of(rows.tokens) if self._name == PAYLOAD else None
        self.block = Block(keys, offsets_of(located.tokens), located.checksums, ragged, extra, origins, bounds)

    def verify(self, segment: Segment) -> None:
        """Raise ``FormatError`` unless what was written is exactly what was read, and in good time."""
        source = ReadRows([segment])
        try:
            written = SegmentedSnapshot([segment], [Table.of_segments([segment])], [_FIRST], {}, source, {})
            located = written.locate(self.block.keys)
            starts = self.block.offsets[:-1]
            same = bool((located.row == starts).all() and (located.checksums == self.block.checksums).all())
            same = same and all(
                np.array_equal(self._rows(written, located, name), rows) for name, rows in self._small.items()
            )
            rows = located
            if self._name == PAYLOAD:
                rows = written.frames(located)
                bounds = self.block.payload_offsets
                same = same and bounds is not None and np.array_equal(offsets_of(rows.tokens), bounds)
            if not same or list(map(_digest, self._pieces(written, rows))) != self._digests:
                raise FormatError(f"{segment.files.where} is not what was read; its sources stay")
        finally:
            source.close()
        if time.monotonic() - self._began > SECONDS:
            raise FormatError(f"{segment.files.where} took longer than {SECONDS:.0f} s; its sources stay")

    def _rows(self, snapshot: SegmentedSnapshot, located: EntryLocations, name: str) -> NDArray[np.generic]:
        dtype, trailing = self._columns[name]
        rows = np.empty((int(located.tokens.sum()), *trailing), dtype)
        if len(snapshot.gather(located, {name: rows}, None, None)):
            raise FormatError(f"segments of {len(located.tokens)} entries are truncated")
        return rows

    def _pieces(self, snapshot: SegmentedSnapshot, located: EntryLocations) -> Iterator[NDArray[np.generic]]:
        dtype, trailing = self._columns[self._name]
        sizes = located.tokens * np.dtype(dtype).itemsize * int(np.prod(trailing))
        for run in runs(sizes, _PIECE_BYTES):
            rows = self._rows(snapshot, located[run], self._name)
            yield rows
            self._moved(rows.nbytes)


def _digest(rows: NDArray[np.generic]) -> int:
    return xxhash.xxh3_64_intdigest(rows.reshape(-1).view(np.uint8).data)


def _origins(group: Sequence[LiveSegment], standing: Collection[str]) -> tuple[Origins, NDArray[np.uint64] | None]:
    """Return where the entries come from, and their extra checksums."""
    numbers: dict[str, int] = {}  # name of a segment of origin -> its position
    segments, entries, extra, sources = [], [], [], []
    for live in group:
        entry = np.searchsorted(live.segment.offsets()[:-1], live.located.row)
        origins = live.segment.origins()
        renumber = np.array([numbers.setdefault(name, len(numbers)) for name in origins.segments], np.uint32)
        segments.append(renumber[origins.segment[entry]])
        entries.append(origins.entries[entry])
        # And what a source replaces and still stands: it would come back when the source is removed first.
        sources += [live.segment.name, *(name for name in live.segment.sources if name in standing)]
        if "extra_checksums" in live.segment.extents:
            extra.append(live.segment.read("extra_checksums")[entry])
    origins = Origins(tuple(numbers), np.concatenate(segments), np.concatenate(entries), tuple(dict.fromkeys(sources)))
    return origins, np.concatenate(extra) if extra else None


# --- what is done to a catalog ---------------------------------------------------------------------------------------

_NO_LIMIT, _ANY_WASTE = 1 << 62, 2.0


def compact(catalog: Catalog, target_bytes: int, waste: float, grace: float, progress: BytesDone) -> Compaction:
    """Merge what is small or wasteful, and remove what has long been replaced. See ``SpaceDriver.compact``."""
    lives = live_segments(catalog.snapshot(exact=True))
    needed = merge_plan(lives, target_bytes, waste) or not all(live.tokens for live in lives)
    with catalog.without_index() if needed else nullcontext():
        snapshot = catalog.snapshot(exact=True)
        groups = merge_plan(live_segments(snapshot), target_bytes, waste)
        done, total = 0, 2 * sum(live.nbytes for group in groups for live in group)  # written, and read back

        def moved(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(min(done, total), total)

        merged = [group for group in groups if merge(catalog, snapshot, group, moved)]
        removed, freed = remove_replaced(catalog, grace)
        more, bytes_more = remove_dead(catalog, grace)
        join_tombstones(catalog, grace)
        remove_unnamed(catalog)
    return Compaction(sum(map(len, merged)), len(merged), removed + more, freed + bytes_more)


def merge(
    catalog: Catalog,
    snapshot: SegmentedSnapshot,
    group: Sequence[LiveSegment],
    moved: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Publish one segment in the place of some; return its name, an empty one where that could not be done.

    Where another compactor has removed a source, or one is damaged, everything stays as it is; so it does after a
    ``StoreError`` (the disk is full, ...).
    """
    try:
        merger = Merger(snapshot, group, catalog.columns, catalog.listed, moved)

        def verify(segment: Segment) -> None:
            merger.verify(segment)
            # Whoever has deleted a key since a source is gone knew nothing of what it held: an overwritten copy, say.
            if not catalog.holds([live.segment.name for live in group]):
                raise SegmentGoneError(f"a source of {segment.files.where} is gone")

        return catalog.publish(merger.block, verify)
    except SegmentGoneError as error:
        logger.info("another process has compacted the same segments: %s", error)
    except (DataError, FileNotFoundError) as error:
        logger.warning("some segments are left as they are; verify says more: %s", error)
    return ""


def remove_replaced(catalog: Catalog, grace: float) -> tuple[int, int]:
    """Remove segments that others have replaced so many seconds ago; return how many, and their bytes."""
    catalog.snapshot(exact=True)
    described, age = sorted(catalog.described(), key=lambda segment: segment.name), _ages(catalog.place)
    replacing: dict[str, list[str]] = {name: [] for name in catalog.replaced}
    for segment in described:
        for source in segment.sources:
            if source in replacing:
                replacing[source].append(catalog.segment_name(segment.name))
    replaced = (segment for segment in described if segment.name in replacing)
    return _remove(catalog, (s for s in replaced if any(age(by) >= grace for by in replacing[s.name])))


def remove_dead(catalog: Catalog, grace: float) -> tuple[int, int]:
    """Remove segments all of whose entries were deleted or overwritten so many seconds ago."""
    snapshot = catalog.snapshot(exact=True)
    served, tombstones, age = snapshot.served(), catalog.tombstones, _ages(catalog.place)

    def dead() -> Iterator[Segment]:
        for segment in (live.segment for live in live_segments(snapshot) if not live.tokens):
            try:
                keys, origins = segment.read("keys"), segment.origins().segments
            except (DataError, FileNotFoundError):
                continue
            numbers = snapshot.locate(keys).segment
            newer = [catalog.segment_name(served[n].name) for n in np.unique(numbers[numbers >= 0]).tolist()]
            deleters = [
                tombstones.path(n) for n, deleted in tombstones.known.items() if not deleted.keys().isdisjoint(origins)
            ]
            if min(map(age, (*newer, *deleters)), default=-1.0) >= grace:
                yield segment

    return _remove(catalog, dead())


def remove_unnamed(catalog: Catalog) -> None:
    """Remove segments that a writer published long ago and never told of: it was killed, and nobody is served them."""
    for name in sorted(catalog.unnamed):
        if (catalog.age(name) or 0.0) >= _ABANDONED:
            catalog.remove(name)


def _remove(catalog: Catalog, doomed: Iterable[Segment]) -> tuple[int, int]:
    removed = [segment.nbytes for segment in doomed if catalog.remove(segment.name)]
    return len(removed), sum(removed)


def join_tombstones(catalog: Catalog, grace: float) -> None:
    """Join the old tombstones into one, without entries that no segment has any more."""
    catalog.snapshot(exact=True)
    if catalog.damaged:  # one that comes back from a copy brings its deleted entries with it
        return
    tombstones, age = catalog.tombstones, _ages(catalog.place)
    old = [name for name in tombstones.known if age(tombstones.path(name)) >= max(grace, 2 * SECONDS)]
    deleted = tombstones.deleted(old)
    needed = catalog.still_there(deleted)
    if not old or (len(old) == 1 and needed == deleted):
        return
    if needed:
        tombstones.publish(needed)
    for name in old:
        catalog.place.remove(tombstones.path(name))


def _ages(place: Place) -> Callable[[str], float]:
    """Return what gives the age of a file or segment in seconds, asked for once; what is gone is of no age."""

    @functools.cache
    def age(name: str) -> float:
        found = place.age(name)
        return -1.0 if found is None else max(0.0, found)

    return age


# --- size-tiered merges of what one writer has published: sixteen segments of about one size into one, and so on ------

_AT_ONCE = 16
_BYTES = 16 << 20  # of rows; larger ones are not worth writing twice


class TieredMerge:
    """What one object has published to a catalog, and may merge. Not thread-safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        dtype, trailing = catalog.columns[VALUES]
        self._most_tokens = _BYTES // (np.dtype(dtype).itemsize * int(np.prod(trailing)))
        self._tokens: dict[str, int] = {}  # of each segment

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, name: str, tokens: int) -> None:
        """Take note of a segment; merge what there is enough of.

        A failure is only logged: what was published is safe, in more segments than it need be.
        """
        if tokens > self._most_tokens:
            return
        self._tokens[name] = tokens
        alike = [other for other, size in self._tokens.items() if _tier(size) == _tier(tokens)]
        if len(alike) < _AT_ONCE:
            return
        for other in alike:
            del self._tokens[other]
        try:
            merged = self._merge(alike)
            remove_replaced(self._catalog, GRACE_SECONDS)
        except (StoreError, DataError, FileNotFoundError) as error:
            logger.warning("could not merge small segments of %s: %s", self._catalog.place.where, error)
            return
        for new, size in merged.items():
            self.add(new, size)

    def _merge(self, names: Collection[str]) -> dict[str, int]:
        """Merge the segments of these names, those that can be; return the tokens of each new segment."""
        snapshot, covered = self._catalog.snapshot(), self._catalog.covered()
        lives = [live for live in live_segments(snapshot, names) if live.segment.name not in covered or live.is_whole()]
        groups = merge_plan(lives, _NO_LIMIT, _ANY_WASTE)
        merged = {merge(self._catalog, snapshot, group): sum(live.tokens for live in group) for group in groups}
        return {name: tokens for name, tokens in merged.items() if name}


def _tier(tokens: int) -> int:
    """Return the order of magnitude of a segment, so that merging costs each row a few copies at most."""
    return max(tokens, 1).bit_length() // 4
