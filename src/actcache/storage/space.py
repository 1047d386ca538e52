"""One space of a segmented store: a folder of immutable segments, tombstones and an index over them."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Block, SegmentFormat, SpaceDriver
from actcache.errors import FormatError, ReadOnlyError, StoreError
from actcache.storage import tombstone
from actcache.storage.files import Files, translated
from actcache.storage.index import Table
from actcache.storage.rows import MappedRows, ReadRows, RowSource
from actcache.storage.segment import Columns, Segment, is_name, new_name, sequence_of
from actcache.storage.snapshot import SegmentedSnapshot
from actcache.storage.workers import Workers

logger = logging.getLogger(__name__)

SEGMENT_VERSION = 1

#: A new index is written when what it does not cover is so many entries, or segments, and a quarter of what it covers.
_UNCOVERED = 1 << 16
_UNCOVERED_SEGMENTS = 64  # a segment takes a millisecond to open without an index


#: Failures that are one segment's own; after others (too many open files, no memory, no network) none can be read.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class SegmentedSpace(SpaceDriver):
    """Implements ``SpaceDriver`` for one folder of segments."""

    def __init__(
        self, format: SegmentFormat, files: Files, folder: Path, columns: Columns, *, writable: bool, mapped: bool
    ) -> None:
        self._format = format
        self._files = files
        self._folder = folder
        self._columns = columns
        self._writable = writable
        self._segments: list[Segment] = []  # every segment ever seen; the position is its number
        self._numbers: dict[str, int] = {}  # name -> number
        self._rows: RowSource = MappedRows(self._segments) if mapped else ReadRows(self._segments)
        self._workers = Workers()
        self._base: Table | None = None  # the mapped index
        self._base_name = ""
        self._recent = Table.of_segments([])  # segments that the index does not cover
        self._listed: frozenset[str] = frozenset()  # readable segments at the last snapshot
        self._settled: set[str] = set()  # segments whose names this object has synced
        self._closed = False
        self._lock = threading.RLock()

    # --- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> SegmentedSnapshot:
        with self._lock, translated(f"cannot read {self._folder}"):
            # Tombstones first: one that comes later names an entry of a segment that is listed below.
            tombstones = self._tombstones()
            names = self._list("segments", self._format.suffix)
            self._load_index()
            damaged = self._cover(names)
            self._settle(names)
            listed = self._listed = frozenset(names) - damaged.keys()
            tables = [table for table in (self._base, self._recent) if table is not None]
            numbers = [
                np.array([self._number(s) if s.name in listed else -1 for s in table.segments], np.int64)
                for table in tables
            ]
            dead = [
                self._numbers[name] << 32 | entry
                for name, entries in tombstones.items()
                if name in self._numbers
                for entry in entries
            ]
            return SegmentedSnapshot(
                list(self._segments),
                tables,
                numbers,
                np.unique(np.array(dead, np.int64)),
                self._rows,
                self._workers,
                damaged,
            )

    def _list(self, kind: str, suffix: str) -> list[str]:
        """Return the names in a folder without their suffix, sorted; foreign names are not ours to read."""
        try:
            names = os.listdir(self._folder / kind)
        except FileNotFoundError:
            return []
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
                    self._base = Table.open(self._index_path(name), self._folder / "segments", self._columns)
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

    def _cover(self, names: list[str]) -> dict[str, str]:
        """Read the keys of segments that no table has yet; return those that cannot be read."""
        base = {segment.name: segment for segment in self._base.segments} if self._base is not None else {}
        recent = {segment.name for segment in self._recent.segments}
        damaged: dict[str, str] = {}
        fresh = []
        for name in names:
            if name in recent or (name in base and name in self._numbers):
                continue
            try:
                if name in base:  # the index says where its arrays lie; they are mapped without another look
                    base[name].measure()
                    continue
                segment = Segment.open(self._format, self._segment_path(name), self._columns)
                fresh.append(Table.of_segments([segment]))
            except FileNotFoundError:  # retired by another process since it was listed
                continue
            except (FormatError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in _OF_ONE_FILE:
                    raise
                logger.warning("leaving out a damaged segment, its entries are absent: %s", error)
                damaged[name] = str(error)
        gone = recent - set(names)
        if fresh or gone:
            keep = frozenset(names)
            self._recent = Table.merged([self._recent, *fresh], keep)
        return damaged

    def _settle(self, names: list[str]) -> None:
        """Sync names that other writers gave: ``put`` skips keys that stand, and ``flush`` vouches for them."""
        if self._writable and not self._settled.issuperset(names):
            self._files.disk.sync_folder(self._folder / "segments")
            self._settled.update(names)

    def _tombstones(self) -> dict[str, set[int]]:
        dead: dict[str, set[int]] = {}
        for name in self._list("tombstones", ".json"):
            path = self._folder / "tombstones" / f"{name}.json"
            try:
                for segment, entries in tombstone.loads(path.read_bytes()).items():
                    dead.setdefault(segment, set()).update(entries)
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                # Passing over it would serve deleted entries again.
                raise FormatError(f"{path} is damaged ({error}); move it away to see its deletions undone") from None
        return dead

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, block: Block) -> None:
        self._check_writable()
        with translated(f"cannot list {self._folder}"):
            names = self._list("segments", self._format.suffix)
        name = new_name(1 + max(map(sequence_of, names), default=0))
        metadata = {"actcache_segment": str(SEGMENT_VERSION), "space": self._folder.name}
        self._files.publish(
            self._segment_path(name), lambda path: self._format.write(path, block, metadata), replace=True
        )
        self._settled.add(name)
        self._index_if_due()

    def delete(self, keys: NDArray[np.uint8]) -> int:
        self._check_writable()
        deleted: dict[str, list[int]] = {}
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        with self._lock:
            snapshot = self.snapshot()
            count = int(snapshot.locate(keys).found.sum())
            for number, entry in snapshot.copies(keys).tolist():
                deleted.setdefault(self._segments[number].name, []).append(entry)
        if deleted:
            with translated(f"cannot list {self._folder}"):
                names = self._list("tombstones", ".json")
            name = new_name(1 + max(map(sequence_of, names), default=0))
            self._files.publish_bytes(
                self._folder / "tombstones" / f"{name}.json", tombstone.dumps(deleted), replace=True
            )
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
            logger.warning("could not write the index of %s: %s", self._folder, error)

    def _write_index(self) -> None:
        """Publish an index that covers all readable segments, and remove the ones that it replaces."""
        table = Table.merged([t for t in (self._base, self._recent) if t is not None], self._listed)
        old = self._list("index", ".index")
        name = new_name(1 + max(map(sequence_of, old), default=0))
        self._files.publish(self._index_path(name), table.write, replace=True)
        for replaced in old:
            self._files.remove(self._index_path(replaced))

    def close(self) -> None:
        if self._writable and not self._closed:
            self._index_if_due(closing=True)
        with self._lock:
            self._closed = True
            self._base, self._base_name, self._recent = None, "", Table.of_segments([])
        self._workers.close()
        self._rows.close()

    def _segment_path(self, name: str) -> Path:
        return self._folder / "segments" / f"{name}{self._format.suffix}"

    def _index_path(self, name: str) -> Path:
        return self._folder / "index" / f"{name}.index"

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._folder} was opened with mode='r'; open the store with mode='a' to write")
