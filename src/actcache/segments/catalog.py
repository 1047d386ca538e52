"""The catalog of one folder of segments: lists, describes and indexes them, publishes more, knows what is deleted."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Columns, SegmentFiles, SegmentFormat
from actcache.errors import DataError, FormatError, SegmentGoneError, StoreError
from actcache.format import frames
from actcache.format.ragged import PAYLOAD
from actcache.io.files import translated
from actcache.segments.index import Table
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.places.place import Place, steady, unique_names
from actcache.segments.segment import Segment, metadata, next_name
from actcache.segments.snapshot import SegmentedSnapshot
from actcache.segments.tombstones import Tombstones

logger = logging.getLogger(__name__)

#: A new index is written when what it does not cover is so many entries, or segments, and a quarter of what it covers.
_UNCOVERED = 1 << 16
_UNCOVERED_SEGMENTS = 64  # a segment takes a millisecond to open without an index

#: Failures that are one segment's own; after others (too many open files, no memory, no network) none can be read.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class Catalog:
    """Knows one folder of segments, ``spaces/<fingerprint>``. Thread-safe, and safe beside other processes.

    Only a writable one syncs names that others gave, and writes an index in the end.
    """

    def __init__(
        self, format: SegmentFormat, place: Place, fingerprint: str, columns: Columns, *, writable: bool
    ) -> None:
        self._format, self._fingerprint, self._writable = format, fingerprint, writable
        self.place = place
        self.folder = f"spaces/{fingerprint}"
        self.where = f"{place.where}/{self.folder}"
        self.columns = columns
        self.segments: list[Segment] = []  # all ever seen; a snapshot's look-ups name them by their position here
        self._numbers: dict[str, int] = {}  # name -> position in ``segments``
        self._rows = place.rows(self.segments)
        self._base: Table | None = None  # the mapped index
        self._base_name = ""
        self._indexed = True  # whether an index is looked at
        self._recent = Table.of_segments([])  # segments that the index does not cover
        self.tombstones = Tombstones(place, self.folder)
        self.listed: frozenset[str] = frozenset()  # names of the readable segments, as of the last snapshot
        self.replaced: frozenset[str] = frozenset()  # those of them that compacted ones replace
        self.damaged: dict[str, str] = {}  # segments that cannot be read, and why
        self._synced: set[str] = set()  # segments whose names this object has synced
        self._closed = False
        self.lock = threading.RLock()  # held while something is looked at or changed that the next snapshot shows

    # --- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> SegmentedSnapshot:
        """Return a view of all that is visible now."""
        with self.lock, translated(f"cannot read {self.where}"):
            # Tombstones first: one that comes later names an entry of a segment that is listed below.
            self.tombstones.refresh()
            names, damaged, gone = steady(self._look)
            if not self.listed.issubset(names):  # compacted away, or the whole store has gone
                self.place.check()
            if self._writable and not self._synced.issuperset(names):
                # Names that other writers gave: ``put`` skips keys that stand, and ``flush`` vouches for them.
                self.place.sync_names(f"{self.folder}/segments")
                self._synced.update(names)
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
            return SegmentedSnapshot(list(self.segments), tables, numbers, dead, self._rows, damaged)

    def _look(self) -> tuple[tuple[list[str], dict[str, str], set[str]], bool]:
        """List and cover the segments; what vanished meanwhile was replaced by one that the listing may have missed."""
        names = self._names()
        self._load_index()
        damaged, gone = self._cover(names)
        return (names, damaged, gone), not gone

    def _names(self) -> list[str]:
        return unique_names(self.place, f"{self.folder}/segments", self._format.suffix)

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

    def _number(self, segment: Segment) -> int:
        if segment.name not in self._numbers:
            self._numbers[segment.name] = len(self.segments)
            self.segments.append(segment)
        return self._numbers[segment.name]

    def _load_index(self) -> None:
        if self._indexed:
            name, table = steady(self._find_index)
            if name != self._base_name:
                self._base_name, self._base = name, table
                covered = self.covered()
                self._recent = Table.merged([self._recent], frozenset(s.name for s in self._recent.segments) - covered)

    def _find_index(self) -> tuple[tuple[str, Table | None], bool]:
        """Map the newest index that can be read; another process may replace it after it was listed.

        A damaged one is passed over: the segments have all that it says.
        """
        for name in reversed(unique_names(self.place, f"{self.folder}/index", ".index")):
            if name == self._base_name:
                return (name, self._base), True
            try:
                return (name, Table.open(self.place.local_copy(self._index(name)), self._files_of, self.columns)), True
            except FileNotFoundError:
                return ("", None), False
            except FormatError as error:
                logger.warning("ignoring an index: %s", error)
        return ("", None), True

    @contextmanager
    def without_index(self) -> Iterator[dict[str, str]]:
        """Go by what the segments say of themselves: what is removed because of a flipped bit in an index is lost.

        Afterwards, too, until somebody writes another index. Yields the segments that cannot be read so, and why; of
        these, what was known before is all there is.
        """
        with self.lock, translated(f"cannot read {self.where}"):
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

    def holds(self, names: Collection[str]) -> bool:
        """Return whether all these segments are there now."""
        return set(names) <= set(self._names())

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

    # --- changing ----------------------------------------------------------------------------------------------------

    def publish(self, block: Block, verify: Callable[[Segment], None] | None = None) -> str:
        """Publish a block as a segment and return its name.

        ``verify`` looks at the segment before anybody else can, and raises what it has against it.
        """
        name = next_name(self._names())
        if PAYLOAD in self.columns and VALUES in block.columns:
            block = frames.compressed(block)

        def write(path: Path) -> None:
            self._format.write(path, block, metadata(name, self._fingerprint))
            if verify is not None:
                verify(self.open_segment(name, LocalSegment(path)))

        self.place.publish(self.segment_name(name), write, replace=True)
        self._synced.add(name)
        return name

    def delete(self, keys: NDArray[np.uint8]) -> int:
        """Delete every stored copy of these keys, durably; return how many of the keys were there."""
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        snapshot = self.snapshot()
        count = int(snapshot.locate(keys).found.sum())
        if deleted := snapshot.copies(keys):
            self.tombstones.publish(deleted)
        return count

    def remove(self, name: str) -> bool:
        """Remove a segment's files; return whether it was there."""
        return self.place.remove(self.segment_name(name))

    # --- the index ---------------------------------------------------------------------------------------------------

    def index_if_due(self, *, closing: bool = False) -> None:
        """Write an index when enough is not covered by one, so that all the writing stays linear in the entries.

        A failure is only logged: the index saves time, and what was published is safe without it.
        """
        try:
            with self.lock:
                # By the last snapshot first: another one costs listings.
                if closing or self._index_is_due(1):
                    self.snapshot()
                    if self._index_is_due() or (closing and len(self._recent.segments) > 1):
                        self.write_index()
        except (StoreError, FormatError) as error:
            logger.warning("could not write the index of %s: %s", self.where, error)

    def _index_is_due(self, more: int = 0) -> bool:
        covered, segments = (len(self._base), len(self._base.segments)) if self._base is not None else (0, 0)
        return len(self._recent) > max(_UNCOVERED, covered // 4) or len(self._recent.segments) + more > max(
            _UNCOVERED_SEGMENTS, segments // 4
        )

    def write_index(self) -> None:
        """Publish an index that covers all readable segments, and remove the ones that it replaces."""
        old = unique_names(self.place, f"{self.folder}/index", ".index")
        table = Table.merged(self._tables(), self.listed)
        self.place.publish(self._index(next_name(old)), table.write, replace=True)
        for replaced in old:
            self.place.remove(self._index(replaced))

    def index_bytes(self, more: int) -> int:
        """Return about how large the next index is, with so many entries more."""
        tables = self._tables()
        entries, segments = sum(map(len, tables)), sum(len(table.segments) for table in tables)
        return 80 * (entries + more) + 2048 * (segments + 1)

    def close(self, *, index: bool = True) -> None:
        """Release files and memory; write an index where one is due, unless told not to. Does nothing twice."""
        if index and self._writable and not self._closed:
            self.index_if_due(closing=True)
        with self.lock:
            self._closed = True
            self._base, self._base_name, self._recent = None, "", Table.of_segments([])
        self._rows.close()

    # --- names -------------------------------------------------------------------------------------------------------

    def segment_name(self, name: str) -> str:
        """Return the name of a segment at the place."""
        return f"{self.folder}/segments/{name}{self._format.suffix}"

    def open_segment(self, name: str, files: SegmentFiles | None = None) -> Segment:
        """Describe a segment by what itself says, as ``Segment.open``."""
        return Segment.open(self._format, files or self._files_of(name), name, self._fingerprint, self.columns)

    def _files_of(self, name: str) -> SegmentFiles:
        return self.place.segment(self.segment_name(name))

    def _index(self, name: str) -> str:
        return f"{self.folder}/index/{name}.index"
