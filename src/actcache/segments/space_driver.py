"""One space of a segmented store: a folder of immutable segments, tombstones and an index over them."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block, BytesDone, Compaction, SegmentFiles, SegmentFormat, SpaceDriver
from actcache.errors import DataError, FormatError, ReadOnlyError, SegmentGoneError, StoreError
from actcache.io.files import translated
from actcache.io.workers import Workers
from actcache.segments import compaction, quarantine
from actcache.segments.compaction import TieredMerge
from actcache.segments.index import Table
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.places.place import Place
from actcache.segments.segment import Columns, Segment, metadata, new_name, sequence_of, unique_names
from actcache.segments.snapshot import SegmentedSnapshot
from actcache.segments.tombstones import LISTINGS, Tombstones

logger = logging.getLogger(__name__)

#: A new index is written when what it does not cover is so many entries, or segments, and a quarter of what it covers.
_UNCOVERED = 1 << 16
_UNCOVERED_SEGMENTS = 64  # a segment takes a millisecond to open without an index

#: Failures that are one segment's own; after others (too many open files, no memory, no network) none can be read.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class SegmentedSpace(SpaceDriver):
    """Implements ``SpaceDriver`` for one folder of segments, ``spaces/<fingerprint>``."""

    def __init__(
        self, format: SegmentFormat, place: Place, fingerprint: str, columns: Columns, *, writable: bool
    ) -> None:
        self._format = format
        self.place = place
        self._fingerprint = fingerprint
        self.folder = f"spaces/{fingerprint}"
        self._where = f"{place.where}/{self.folder}"
        self.columns = columns
        self._writable = writable
        self._segments: list[Segment] = []  # every segment ever seen; the position is its number
        self._numbers: dict[str, int] = {}  # name -> number
        self._rows = place.rows(self._segments)
        self._workers = Workers()
        self._base: Table | None = None  # the mapped index
        self._base_name = ""
        self._indexed = True  # whether an index is looked at
        self._recent = Table.of_segments([])  # segments that the index does not cover
        self._tiers = TieredMerge(self)
        self.tombstones = Tombstones(place, self.folder)
        # As of the last snapshot:
        self.listed: frozenset[str] = frozenset()  # readable segments
        self.replaced: frozenset[str] = frozenset()  # those of them that compacted ones replace
        self.damaged: dict[str, str] = {}  # segments that cannot be read, and why
        self._synced: set[str] = set()  # segments whose names this object has synced
        self._closed = False
        self._lock = threading.RLock()

    # --- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> SegmentedSnapshot:
        with self._lock, translated(f"cannot read {self._where}"):
            # Tombstones first: one that comes later names an entry of a segment that is listed below.
            self.tombstones.refresh()
            for _ in range(LISTINGS):
                names = self._list("segments", self._format.suffix)
                self._load_index()
                damaged, gone = self._cover(names)
                # What vanished since it was listed was replaced by something that the listing may have missed.
                if not gone:
                    break
            if not self.listed.issubset(names):  # compacted away, or the whole store has gone
                self.place.check()
            self._sync_names(names)
            self.damaged, self.listed = damaged, frozenset(names) - damaged.keys() - gone
            tables = self._tables()
            replaced = frozenset(source for segment in self.described() for source in segment.sources)
            self.replaced = replaced & self.listed
            served = self.listed - replaced
            numbers = [
                np.array([self._number(s) if s.name in served else -1 for s in table.segments], np.int64)
                for table in tables
            ]
            dead = self.tombstones.deleted()
            return SegmentedSnapshot(list(self._segments), tables, numbers, dead, self._rows, self._workers, damaged)

    def _tables(self) -> list[Table]:
        return [table for table in (self._base, self._recent) if table is not None]

    def described(self) -> list[Segment]:
        """Return the readable segments of the last snapshot, replaced ones among them."""
        return [segment for table in self._tables() for segment in table.segments if segment.name in self.listed]

    def still_there(self, deleted: Mapping[str, Collection[int]]) -> dict[str, set[int]]:
        """Return those of some entries, named by their origins, that lie in a readable segment."""
        found: dict[str, set[int]] = {}
        for table in self._tables():
            listed = np.array([segment.name in self.listed for segment in table.segments], bool)
            for origin, name in enumerate(table.origins):
                if name in deleted:
                    there = table.entry[(table.origin == origin) & listed[table.segment]].tolist()
                    found.setdefault(name, set()).update(set(there).intersection(deleted[name]))
        return {name: entries for name, entries in found.items() if entries}

    def _list(self, kind: str, suffix: str) -> list[str]:
        return unique_names(self.place, f"{self.folder}/{kind}", suffix)

    def _number(self, segment: Segment) -> int:
        number = self._numbers.get(segment.name)
        if number is None:
            number = self._numbers[segment.name] = len(self._segments)
            self._segments.append(segment)
        return number

    def _load_index(self) -> None:
        """Map the newest index that can be read. A damaged one is passed over: the segments have all that it says."""
        if not self._indexed:
            return
        for _ in range(3):  # another process may replace an index after it was listed
            for name in reversed(self._list("index", ".index")):
                if name == self._base_name:
                    return
                try:
                    path = self.place.local_copy(self._index_name(name))
                    self._base = Table.open(path, self._files_of, self.columns)
                except FileNotFoundError:
                    break
                except FormatError as error:
                    logger.warning("ignoring an index: %s", error)
                    continue
                self._base_name = name
                covered = {segment.name for segment in self._base.segments}
                self._recent = Table.merged([self._recent], frozenset(s.name for s in self._recent.segments) - covered)
                return
            else:
                break
        self._base, self._base_name = None, ""

    @contextmanager
    def without_index(self) -> Iterator[dict[str, str]]:
        """Go by what the segments say of themselves: what is removed because of a flipped bit in an index is lost.

        Afterwards, too, until somebody writes another index. Yields the segments that cannot be read so, and why; of
        these, what was known before is all there is.
        """
        with self._lock, translated(f"cannot read {self._where}"):
            self.snapshot()
            unread: dict[str, str] = {}
            read = []
            for name in sorted(self.listed):
                try:
                    read.append(Table.of_segments([self.open_segment(name)]))
                except FileNotFoundError:  # compacted and removed meanwhile
                    continue
                except DataError as error:
                    unread[name] = str(error)
            known = Table.merged(self._tables(), frozenset(unread))
            self._base, self._recent = None, Table.merged([known, *read], self.listed)
            self._indexed = False
            try:
                yield unread
            finally:
                self._indexed = True

    def covered(self) -> frozenset[str]:
        """Return the segments of whose entries only the index has been read."""
        return frozenset(segment.name for segment in self._base.segments) if self._base is not None else frozenset()

    def stand(self, names: Collection[str]) -> bool:
        """Return whether all these segments are there now."""
        return set(names) <= set(self._list("segments", self._format.suffix))

    def _cover(self, names: list[str]) -> tuple[dict[str, str], set[str]]:
        """Read the keys of segments that no table has yet; return which cannot be read, and which are gone."""
        base = {segment.name: segment for segment in self._base.segments} if self._base is not None else {}
        recent = {segment.name for segment in self._recent.segments}
        damaged: dict[str, str] = {}
        vanished: set[str] = set()
        fresh = []
        for name in names:
            if name in recent or (name in base and name in self._numbers):
                continue
            try:
                if name in base:  # the index says where its arrays lie; they are mapped without another look
                    base[name].measure()
                    continue
                fresh.append(Table.of_segments([self.open_segment(name)]))
            except (FileNotFoundError, SegmentGoneError):  # retired by another process since it was listed
                vanished.add(name)
            except (FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                    raise
                if name not in self.damaged:  # once, not with every snapshot
                    logger.warning("leaving out a damaged segment, its entries are absent: %s", error)
                damaged[name] = str(error)
        if fresh or recent - set(names):
            self._recent = Table.merged([self._recent, *fresh], frozenset(names))
        return damaged, vanished

    def _sync_names(self, names: list[str]) -> None:
        """Sync names that other writers gave: ``put`` skips keys that stand, and ``flush`` vouches for them."""
        if self._writable and not self._synced.issuperset(names):
            self.place.sync_names(f"{self.folder}/segments")
            self._synced.update(names)

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, block: Block) -> None:
        self._check_writable()
        name = self.publish(block)
        if self.merges_tiers:
            with self._lock:
                self._tiers.add(name, block.tokens)
        self._index_if_due()

    def publish(self, block: Block, verify: Callable[[Segment], None] | None = None) -> str:
        """Publish a block as a segment and return its name.

        Args:
            verify: looks at the segment before anybody else can, and raises what it has against it.
        """
        names = self._list("segments", self._format.suffix)
        name = new_name(1 + max(map(sequence_of, names), default=0))

        def write(path: Path) -> None:
            self._format.write(path, block, metadata(name, self._fingerprint))
            if verify is not None:
                verify(self.open_segment(name, LocalSegment(path)))

        self.place.publish(self.segment_name(name), write, replace=True)
        self._synced.add(name)
        return name

    def delete(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        snapshot = self.snapshot()
        count = int(snapshot.locate(keys).found.sum())
        deleted = snapshot.copies(keys)
        if deleted:
            self.tombstones.publish(deleted)
        return count

    def compact(
        self, *, target_bytes: int, waste: float, grace: float, progress: BytesDone = lambda done, total: None
    ) -> Compaction:
        self._check_writable()
        with self._lock:
            done = compaction.compact(self, target_bytes=target_bytes, waste=waste, grace=grace, progress=progress)
            if done.segments_merged or done.segments_removed:
                self.snapshot()
                self._write_index()
        return done

    def quarantine(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        return quarantine.quarantine(self, keys)

    def examine(self) -> dict[str, str]:
        return quarantine.examine(self)

    def set_aside(self) -> list[str]:
        self._check_writable()
        return quarantine.set_aside(self)

    def quarantined(self) -> list[str]:
        """Return the names of what lies in quarantine."""
        return self._list("quarantine", ".safetensors")

    def _index_if_due(self, *, closing: bool = False) -> None:
        """Write an index when enough is not covered by one, so that all the writing stays linear in the entries.

        A failure is only logged: the index saves time, and what was published is safe without it.
        """
        try:
            with self._lock:
                # By the last snapshot first: another one costs listings.
                if closing or self._index_is_due(1):
                    self.snapshot()
                    if self._index_is_due() or (closing and len(self._recent.segments) > 1):
                        self._write_index()
        except (StoreError, FormatError) as error:
            logger.warning("could not write the index of %s: %s", self._where, error)

    def _index_is_due(self, more: int = 0) -> bool:
        covered, segments = (len(self._base), len(self._base.segments)) if self._base is not None else (0, 0)
        return len(self._recent) > max(_UNCOVERED, covered // 4) or len(self._recent.segments) + more > max(
            _UNCOVERED_SEGMENTS, segments // 4
        )

    def _write_index(self) -> None:
        """Publish an index that covers all readable segments, and remove the ones that it replaces."""
        table = Table.merged([t for t in (self._base, self._recent) if t is not None], self.listed)
        old = self._list("index", ".index")
        name = new_name(1 + max(map(sequence_of, old), default=0))
        self.place.publish(self._index_name(name), table.write, replace=True)
        for replaced in old:
            self.place.remove(self._index_name(replaced))

    def close(self) -> None:
        if self._writable and not self._closed:
            self._index_if_due(closing=True)
        with self._lock:
            self._closed = True
            self._base, self._base_name, self._recent = None, "", Table.of_segments([])
        self._workers.close()
        self._rows.close()

    def segment_name(self, name: str) -> str:
        return f"{self.folder}/segments/{name}{self._format.suffix}"

    def open_segment(self, name: str, files: SegmentFiles | None = None) -> Segment:
        """Describe a segment by what itself says; see ``Segment.open``."""
        files = self._files_of(name) if files is None else files
        return Segment.open(self._format, files, name, self._fingerprint, self.columns)

    def _files_of(self, name: str) -> SegmentFiles:
        return self.place.segment(self.segment_name(name))

    def _index_name(self, name: str) -> str:
        return f"{self.folder}/index/{name}.index"

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._where} was opened with mode='r'; open the store with mode='a' to write")
