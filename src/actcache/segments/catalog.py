"""The catalog of one folder of segments: finds, describes and indexes them, publishes more, knows what is deleted.

Which segments there are is told by a listing of their folder; or, where a store is ``journaled``, by its index files
alone, one of which is published with each segment: a listing grows with the segments, and costs a request a thousand.
There, too, whatever deletes, moves or removes something goes by a listing, so that it misses nothing.
"""

from __future__ import annotations

import errno
import functools
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Columns, SegmentFiles, SegmentFormat
from actcache.errors import DataError, FormatError, SegmentGoneError, StoreError
from actcache.format import frames
from actcache.format.ragged import PAYLOAD
from actcache.io.files import translated
from actcache.segments.index import Table
from actcache.segments.index_files import IndexFiles
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.places.place import Place, steady, unique_names
from actcache.segments.segment import Segment, metadata, next_name
from actcache.segments.snapshot import SegmentedSnapshot
from actcache.segments.tombstones import Tombstones

logger = logging.getLogger(__name__)

#: A new index is written when what it does not cover is so many entries, or segments, and a quarter of what it covers.
_UNCOVERED = 1 << 16
_UNCOVERED_SEGMENTS = 64  # a segment takes a millisecond to open without an index

#: Seconds after which every listing shows what was put.
_SETTLED = 3600.0

#: Failures that are one segment's own; after others (too many open files, no memory, no network) none can be read.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}


class Catalog:
    """Knows one folder of segments, ``spaces/<fingerprint>``. Thread-safe, and safe beside other processes.

    Only a writable one syncs names that others gave, and writes an index in the end. ``journaled``: the index files of
    this store name all segments.
    """

    def __init__(
        self,
        format: SegmentFormat,
        place: Place,
        fingerprint: str,
        columns: Columns,
        *,
        writable: bool,
        journaled: bool = False,
    ) -> None:
        self._format, self._fingerprint, self._writable = format, fingerprint, writable
        self._journaled = journaled
        self._indexes_each = journaled or place.indexes_each
        self._lists = not (journaled and place.indexes_each)  # whether each look lists the segments
        self.place = place
        self.folder = f"spaces/{fingerprint}"
        self.where = f"{place.where}/{self.folder}"
        self.columns = columns
        self.segments: list[Segment] = []  # all ever seen; a snapshot's look-ups name them by their position here
        self._numbers: dict[str, int] = {}  # name -> position in ``segments``
        self._rows = place.rows(self.segments)
        self._index = IndexFiles(place, self.folder, self._files_of, columns)
        self._indexed = True  # whether the index is looked at
        self._recent = Table.of_segments([])  # segments that the index does not cover
        self.tombstones = Tombstones(place, self.folder)
        self.listed: frozenset[str] = frozenset()  # names of the readable segments, as of the last snapshot
        self.replaced: frozenset[str] = frozenset()  # those of them that compacted ones replace
        self.unnamed: frozenset[str] = frozenset()  # listed ones that no index names, where one should
        self.damaged: dict[str, str] = {}  # segments that cannot be read, and why
        self._synced: set[str] = set()  # segments whose names this object has synced
        self._unlisted: set[str] = set()  # those that this object has published and no listing has shown yet
        self._gone: set[str] = set()  # those that an index may name still, and that were found gone
        self._removed: set[str] = set()  # those of them that were removed for certain
        self._closed = False
        self.lock = threading.RLock()  # held while something is looked at or changed that the next snapshot shows

    # --- reading -----------------------------------------------------------------------------------------------------

    def snapshot(self, *, exact: bool = False) -> SegmentedSnapshot:
        """Return a view of all that is visible now; ``exact``: by a listing, whatever the index names."""
        with self.lock, translated(f"cannot read {self.where}"):
            # Tombstones first: one that comes later names an entry of a segment that is found below.
            self.tombstones.refresh()
            if not self._lists:
                self._note_lost()
            names, damaged, gone = steady(lambda: self._look(exact))
            if not self.listed.issubset(names):  # compacted away, or the whole store has gone
                self.place.check()
            if self._writable and not self._synced.issuperset(names):
                # Names that other writers gave: ``put`` skips keys that stand, and ``flush`` vouches for them.
                self.place.sync_names(f"{self.folder}/segments")
                self._synced.update(names)
            self.damaged, self.listed = damaged, frozenset(names) - damaged.keys() - gone
            if self._journaled and self._writable and self._indexed and self._recent.segments:
                # ``put`` skips keys that stand in them, and so ``flush`` has to vouch that everybody finds them.
                self._index_also(Table.of_segments([]))
            tables = self._tables()
            replaced = frozenset(source for segment in self.described() for source in segment.sources)
            self.replaced = replaced & self.listed
            served = self.listed - replaced
            numbers = [
                np.array([self._number(s) if s.name in served else -1 for s in table.segments], np.int64)
                for table in tables
            ]
            dead = self.tombstones.deleted()
            again = functools.partial(self.snapshot, exact=exact)
            return SegmentedSnapshot(list(self.segments), tables, numbers, dead, self._rows, damaged, again)

    def _look(self, exact: bool) -> tuple[tuple[list[str], dict[str, str], set[str]], bool]:
        """Find and cover the segments; what vanished meanwhile was replaced by one that the look may have missed."""
        names, listed = self._find(exact)
        damaged, gone = self._cover(names, listed)
        return (names, damaged, gone), not gone and (not exact or self._bring())

    def _bring(self) -> bool:
        """Have the arrays of the index here, as everything will be looked at; return whether they could be had."""
        try:
            for table in self._tables():
                table.bring()
        except SegmentGoneError:  # another writer has taken a file in meanwhile
            return False
        return True

    def _find(self, exact: bool) -> tuple[list[str], bool]:
        """Look at the index, and return the names of all segments and whether they were listed."""
        if not self._lists and self._indexed and not exact:
            self._load_index()
            if self._index.whole and self._index.tables:
                return sorted((self._named() or set()) - self._gone), False
        names = self._listing()
        self._load_index()
        named = self._named()
        if named is None:
            return names, True
        # A writer that was killed between the two has not flushed what no index names; and who has put the same keys
        # since did not see it: it would come before theirs.
        self.unnamed = frozenset(names) - named
        return sorted(named.intersection(names)), True

    def _named(self) -> set[str] | None:
        """Return the segments that index files name; None where they do not name all, or cannot be read."""
        files = self._index.all()
        if not self._journaled or self._index.lost or not files:
            return None
        return {segment.name for table in files.values() for segment in table.segments}

    def _listing(self) -> list[str]:
        """List the segments, and add those that this object knows that it has published: a listing may lag."""
        names = unique_names(self.place, f"{self.folder}/segments", self._format.suffix)
        self._unlisted.difference_update(names)
        self._gone.difference_update(names)
        self._removed.difference_update(names)
        return sorted({*names, *self._unlisted})

    def _note_lost(self) -> None:
        """Take note of segments that somebody found gone while reading, and look whether they are."""
        lost = {name.removesuffix(self._format.suffix) for name in self.place.lost(f"{self.folder}/segments")}
        gone = {name for name in lost if self.age(name) is None}
        if gone:
            self.place.check()  # else the whole store is gone, and they may come back with it
            self._gone |= gone
            self._unlisted -= gone

    def _tables(self) -> list[Table]:
        return [*self._index.tables.values(), self._recent]

    def described(self) -> list[Segment]:
        """Return the readable segments of the last snapshot, replaced ones among them."""
        described = {segment.name: segment for table in self._tables() for segment in table.segments}
        return [segment for name, segment in described.items() if name in self.listed]

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
            self._index.refresh()
            self._leave_recent()

    def _leave_recent(self) -> None:
        """Leave to the index what it covers."""
        recent, covered = {segment.name for segment in self._recent.segments}, self.covered()
        if recent & covered:
            self._recent = Table.merged([self._recent], frozenset(recent - covered))

    @contextmanager
    def without_index(self) -> Iterator[dict[str, str]]:
        """Go by what the segments say of themselves: what is removed because of a flipped bit in an index is lost.

        Afterwards, too, but for index files that are written later. Yields the segments that cannot be read so, and
        why; of these, what was known before is all there is.
        """
        with self.lock, translated(f"cannot read {self.where}"):
            self.snapshot(exact=True)
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
            self._recent = Table.merged([known, *read], self.listed)
            self._index.ignore()
            self._indexed = False
            try:
                yield unread
            finally:
                self._indexed = True

    def covered(self) -> frozenset[str]:
        """Return the segments of whose entries only the index has been read."""
        return self._index.covered()

    def holds(self, names: Collection[str]) -> bool:
        """Return whether all these segments are there now."""
        return set(names) <= set(self._listing())

    def age(self, name: str) -> float | None:
        """Return the seconds since a segment was published; None where it is gone."""
        return self.place.age(self.segment_name(name))

    def _cover(self, names: list[str], listed: bool) -> tuple[dict[str, str], set[str]]:
        """Read the keys of segments that no table has yet; return which cannot be read, and which are gone.

        Of ``listed`` ones that the index covers it is looked whether they are large enough, which a listing tells.
        """
        base = {segment.name: segment for table in self._index.tables.values() for segment in table.segments}
        recent = {segment.name for segment in self._recent.segments}
        damaged: dict[str, str] = {}
        vanished: set[str] = set()
        fresh = []
        for name in names:
            if name in recent or (name in base and (name in self._numbers or not listed)):
                continue
            try:
                if name in base:  # the index says where its arrays lie; they are mapped without another look
                    base[name].measure()
                    continue
                fresh.append(Table.of_segments([self.open_segment(name)]))
            except (FileNotFoundError, SegmentGoneError):  # retired by another process since it was listed
                vanished.add(name)
                self._unlisted.discard(name)
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
        with self.lock:
            name = next_name(self._listing() if self._lists else [*self._find(False)[0], *self._gone, *self.unnamed])
        if PAYLOAD in self.columns and VALUES in block.columns:
            block = frames.compressed(block)
        written: list[Table] = []

        def write(path: Path) -> None:
            self._format.write(path, block, metadata(name, self._fingerprint))
            if verify is not None or self._indexes_each:
                segment = self.open_segment(name, LocalSegment(path))
                if verify is not None:
                    verify(segment)
                if self._indexes_each:
                    table = Table.of_segments([segment])
                    there = replace(segment, files=self._files_of(name))
                    written[:] = [replace(table, segments=(there,))]

        self.place.publish(self.segment_name(name), write, replace=True)
        with self.lock:
            self._synced.add(name)
            self._unlisted.add(name)
            for table in written:
                self._index_also(table)
        published = {"space": self._fingerprint, "segment": name, "entries": len(block.keys)}
        logger.debug("published a segment of %s", self.where, extra=published)
        return name

    def _index_also(self, table: Table) -> None:
        """Publish an index file of what no index covers yet, and of what smaller index files cover.

        Where the index files name all segments, this is what makes a segment visible; else a failure is only logged.
        """
        # While nothing is believed of an index, what was read instead is left to the one that covers everything.
        fresh = [table, self._recent] if self._indexed else [table]
        try:
            merged = Table.merged(fresh, self._worth_naming(fresh))
            smaller, tables = steady(lambda: self._taken_in(merged))
            merged = Table.merged(tables, self._worth_naming(tables))
            if merged.segments:
                self._index.add(merged, smaller)
                self._leave_recent()
        except StoreError as error:
            if self._journaled:
                raise
            logger.warning("could not write the index of %s: %s", self.where, error)

    def _taken_in(self, table: Table) -> tuple[tuple[dict[str, Table], list[Table]], bool]:
        """Return the index files that a new one takes in, and all tables that it joins; whether they are all there."""
        smaller = self._index.smaller(table)
        tables = [table]
        for other in smaller.values():
            try:
                other.bring()
                tables.append(other)
            except SegmentGoneError:  # another writer has taken it in meanwhile
                self._index.refresh()
                return ({}, [table]), False
        return (smaller, tables), True

    def _worth_naming(self, tables: Collection[Table]) -> frozenset[str]:
        """Return which segments of some tables an index goes on naming.

        Where it is the index that names them, a segment is left out when it is certain that it is not there any more;
        else a listing shows it whatever the index says.
        """
        names = frozenset(segment.name for table in tables for segment in table.segments)
        return names - self._removed if self._journaled else names & (self.listed | self._unlisted)

    def delete(self, keys: NDArray[np.uint8]) -> int:
        """Delete every stored copy of these keys, durably; return how many of the keys were there."""
        keys = np.unique(np.ascontiguousarray(keys), axis=0)
        snapshot = self.snapshot(exact=True)
        count = int(snapshot.locate(keys).found.sum())
        with self.lock:
            deleted = snapshot.copies(keys, list(self._tables_of_unnamed()))
        if deleted:
            self.tombstones.publish(deleted)
        return count

    def _tables_of_unnamed(self) -> Iterator[Table]:
        """Read the keys of segments that no index names: should one come to be served, what was deleted stays so."""
        for name in sorted(self.unnamed):
            with suppress(DataError, FileNotFoundError):
                yield Table.of_segments([self.open_segment(name)])

    def remove(self, name: str) -> bool:
        """Remove a segment's files; return whether it was there."""
        there = self.place.remove(self.segment_name(name))
        self._gone.add(name)
        self._removed.add(name)
        self._unlisted.discard(name)
        return there

    # --- the index ---------------------------------------------------------------------------------------------------

    def index_if_due(self, *, closing: bool = False) -> None:
        """Write an index when enough is not covered by one, so that all the writing stays linear in the entries.

        A failure is only logged: the index saves time, and what was published is safe without it. Where each segment is
        published with an index file, there is only what was found without one.
        """
        try:
            with self.lock:
                if self._indexes_each:
                    if closing and len(self._recent.segments):
                        self._index_also(Table.of_segments([]))
                    return
                # By the last snapshot first: another one costs listings.
                if closing or self._index_is_due(1):
                    self.snapshot()
                    if self._index_is_due() or (closing and len(self._recent.segments) > 1):
                        self.write_index()
        except (StoreError, FormatError) as error:
            logger.warning("could not write the index of %s: %s", self.where, error)

    def _index_is_due(self, more: int = 0) -> bool:
        covered = sum(map(len, self._index.tables.values()))
        segments = sum(len(table.segments) for table in self._index.tables.values())
        return len(self._recent) > max(_UNCOVERED, covered // 4) or len(self._recent.segments) + more > max(
            _UNCOVERED_SEGMENTS, segments // 4
        )

    def write_index(self) -> None:
        """Publish an index that covers all readable segments, and replaces all others, after an exact snapshot."""
        if not self._indexes_each:
            self._index.put_alone(Table.merged(self._tables(), self.listed))
            return
        known = self._index.all()
        tables = [self._recent, *known.values()]
        for name in {s.name for table in tables for s in table.segments} - self.listed - self.damaged.keys():
            if self.age(name) is None:  # neither listed nor there
                self._removed.add(name)
        # What a damaged one names is listed, and read from the segments, unless it was put just now.
        damaged = [name for name in self._index.damaged if (self.place.age(self._index.path(name)) or 0.0) >= _SETTLED]
        self._index.add(Table.merged(tables, self._worth_naming(tables)), [*known, *damaged])
        self._leave_recent()

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
            self._index.forget()
            self._recent = Table.of_segments([])
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
