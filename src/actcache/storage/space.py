"""One space of a segmented store: a folder of immutable segments, tombstones and an index over them."""

from __future__ import annotations

import errno
import logging
import threading

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block, SegmentFiles, SegmentFormat, SpaceDriver
from actcache.errors import FormatError, ReadOnlyError, SegmentGoneError, StoreError
from actcache.storage import tombstone
from actcache.storage.files import translated
from actcache.storage.index import Table
from actcache.storage.place import Place
from actcache.storage.segment import Columns, Segment, is_name, metadata, new_name, sequence_of
from actcache.storage.snapshot import SegmentedSnapshot
from actcache.storage.workers import Workers

logger = logging.getLogger(__name__)

#: A new index is written when what it does not cover is so many entries, or segments, and a quarter of what it covers.
_UNCOVERED = 1 << 16
_UNCOVERED_SEGMENTS = 64  # a segment takes a millisecond to open without an index
_LISTINGS = 5  # while other processes replace what was listed

#: Failures that are one segment's own; after others (too many open files, no memory, no network) none can be read.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class SegmentedSpace(SpaceDriver):
    """Implements ``SpaceDriver`` for one folder of segments, ``spaces/<fingerprint>``."""

    def __init__(
        self, format: SegmentFormat, place: Place, fingerprint: str, columns: Columns, *, writable: bool
    ) -> None:
        self._format = format
        self._place = place
        self._fingerprint = fingerprint
        self._folder = f"spaces/{fingerprint}"
        self._where = f"{place.where}/{self._folder}"
        self._columns = columns
        self._writable = writable
        self._segments: list[Segment] = []  # every segment ever seen; the position is its number
        self._numbers: dict[str, int] = {}  # name -> number
        self._rows = place.rows(self._segments)
        self._workers = Workers()
        self._base: Table | None = None  # the mapped index
        self._base_name = ""
        self._recent = Table.of_segments([])  # segments that the index does not cover
        self._listed: frozenset[str] = frozenset()  # readable segments at the last snapshot
        self._replaced: frozenset[str] = frozenset()  # those of them that compacted ones replace
        self._settled: set[str] = set()  # segments whose names this object has synced
        self._closed = False
        self._lock = threading.RLock()

    # --- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> SegmentedSnapshot:
        with self._lock, translated(f"cannot read {self._where}"):
            # Tombstones first: one that comes later names an entry of a segment that is listed below.
            tombstones = self._tombstones()
            for _ in range(_LISTINGS):
                names = self._list("segments", self._format.suffix)
                self._load_index()
                damaged, gone = self._cover(names)
                # What vanished since it was listed was replaced by something that the listing may have missed.
                if not gone:
                    break
            self._settle(names)
            listed = frozenset(names) - damaged.keys() - gone
            tables = [table for table in (self._base, self._recent) if table is not None]
            described = [segment for table in tables for segment in table.segments if segment.name in listed]
            replaced = frozenset(source for segment in described for source in segment.sources)
            self._listed, self._replaced = listed, replaced & listed
            served = listed - replaced
            numbers = [
                np.array([self._number(s) if s.name in served else -1 for s in table.segments], np.int64)
                for table in tables
            ]
            return SegmentedSnapshot(
                list(self._segments), tables, numbers, tombstones, self._rows, self._workers, damaged
            )

    def _list(self, kind: str, suffix: str) -> list[str]:
        """Return the names in a folder without their suffix, sorted; foreign names are not ours to read."""
        names = self._place.names(f"{self._folder}/{kind}")
        return sorted(stem for name in names if name.endswith(suffix) and is_name(stem := name.removesuffix(suffix)))

    def _number(self, segment: Segment) -> int:
        number = self._numbers.get(segment.name)
        if number is None:
            number = self._numbers[segment.name] = len(self._segments)
            self._segments.append(segment)
        return number

    def _load_index(self) -> None:
        """Map the newest index that can be read. A damaged one is passed over: the segments have all that it says."""
        for _ in range(3):  # another process may replace an index after it was listed
            for name in reversed(self._list("index", ".index")):
                if name == self._base_name:
                    return
                try:
                    path = self._place.local_copy(self._index_name(name))
                    self._base = Table.open(path, self._files_of, self._columns)
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
                segment = Segment.open(self._format, self._files_of(name), name, self._fingerprint, self._columns)
                fresh.append(Table.of_segments([segment]))
            except (FileNotFoundError, SegmentGoneError):  # retired by another process since it was listed
                vanished.add(name)
            except (FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                    raise
                logger.warning("leaving out a damaged segment, its entries are absent: %s", error)
                damaged[name] = str(error)
        if fresh or recent - set(names):
            self._recent = Table.merged([self._recent, *fresh], frozenset(names))
        return damaged, vanished

    def _settle(self, names: list[str]) -> None:
        """Sync names that other writers gave: ``put`` skips keys that stand, and ``flush`` vouches for them."""
        if self._writable and not self._settled.issuperset(names):
            self._place.settle(f"{self._folder}/segments")
            self._settled.update(names)

    def _tombstones(self) -> dict[str, set[int]]:
        dead: dict[str, set[int]] = {}
        for name in self._list("tombstones", ".json"):
            path = f"{self._folder}/tombstones/{name}.json"
            data = self._place.read(path)
            if data is None:  # removed since it was listed: nothing has the entries any more
                continue
            try:
                for segment, entries in tombstone.loads(data).items():
                    dead.setdefault(segment, set()).update(entries)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                # Passing over it would serve deleted entries again.
                raise FormatError(
                    f"{self._place.where}/{path} is damaged ({error}); move it away to see its deletions undone"
                ) from None
        return dead

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, block: Block) -> None:
        self._check_writable()
        name = new_name(1 + max(map(sequence_of, self._list("segments", self._format.suffix)), default=0))
        described = metadata(name, self._fingerprint)
        self._place.publish(
            self._segment_name(name), lambda path: self._format.write(path, block, described), replace=True
        )
        self._settled.add(name)
        self._index_if_due()

    def delete(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        snapshot = self.snapshot()
        count = int(snapshot.locate(keys).found.sum())
        deleted = snapshot.copies(keys)
        if deleted:
            name = new_name(1 + max(map(sequence_of, self._list("tombstones", ".json")), default=0))
            target = f"{self._folder}/tombstones/{name}.json"
            self._place.publish_bytes(target, tombstone.dumps(deleted), replace=True)
        return count

    def _index_if_due(self, *, closing: bool = False) -> None:
        """Write an index when enough is not covered by one, so that all the writing stays linear in the entries.

        A failure is only logged: the index saves time, and what was published is safe without it.
        """
        try:
            with self._lock:
                self.snapshot()
                covered, segments = (len(self._base), len(self._base.segments)) if self._base is not None else (0, 0)
                uncovered = len(self._recent.segments)
                due = len(self._recent) > max(_UNCOVERED, covered // 4)
                due |= uncovered > max(_UNCOVERED_SEGMENTS, segments // 4)
                if due or (closing and uncovered > 1):
                    self._write_index()
        except (StoreError, FormatError) as error:
            logger.warning("could not write the index of %s: %s", self._where, error)

    def _write_index(self) -> None:
        """Publish an index that covers all readable segments, and remove the ones that it replaces."""
        table = Table.merged([t for t in (self._base, self._recent) if t is not None], self._listed)
        old = self._list("index", ".index")
        name = new_name(1 + max(map(sequence_of, old), default=0))
        self._place.publish(self._index_name(name), table.write, replace=True)
        for replaced in old:
            self._place.remove(self._index_name(replaced))

    def close(self) -> None:
        if self._writable and not self._closed:
            self._index_if_due(closing=True)
        with self._lock:
            self._closed = True
            self._base, self._base_name, self._recent = None, "", Table.of_segments([])
        self._workers.close()
        self._rows.close()

    def _segment_name(self, name: str) -> str:
        return f"{self._folder}/segments/{name}{self._format.suffix}"

    def _files_of(self, name: str) -> SegmentFiles:
        return self._place.segment(self._segment_name(name))

    def _index_name(self, name: str) -> str:
        return f"{self._folder}/index/{name}.index"

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._where} was opened with mode='r'; open the store with mode='a' to write")
