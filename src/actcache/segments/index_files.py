"""The files of a space's index: one that covers all, or a few that do so together.

Where segments lie in files, one index covers them all; it is made when enough is not covered, and replaces the older
ones. Where a segment costs requests to look into, each is published with an index file of its own, which takes in the
smaller ones that stand already and says so (``replaces``). So they grow geometrically, as the levels of an LSM tree: a
handful of files covers everything, and a flush writes about as many bytes of them as it adds, times the logarithm of
all. Nothing is locked. Of two writers that take in the same file at once, each has its entries, and looks up the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from actcache.backend import Columns
from actcache.errors import FormatError, FormatVersionError
from actcache.format import safetensors
from actcache.segments.index import RemoteTable, Table, is_of_before
from actcache.segments.places.place import Place, steady, unique_names
from actcache.segments.segment import Access, next_name

logger = logging.getLogger(__name__)

#: A new index file takes in those that have up to so many times its own bytes, one after the other. With 3 there are
#: seven files at most after ten thousand flushes of a thousand entries each, and each entry is written 12 times.
_RATIO = 3
_LEAST_BYTES = 64 << 10  # smaller files are taken in as if they had so many
_SEGMENT_BYTES = 700  # of the description of a segment
_AT_ONCE = 4 << 20  # bytes of a file that comes with one request
_HEAD_BYTES = 1 << 20  # of a larger one; the descriptions of 2,000 segments or so
_MOST_HEADER = 64 << 20
_AT_A_TIME = 8  # files that are opened
#: How long a file that was taken in stays, for readers that have listed it.
_GRACE_SECONDS = 300.0


class IndexFiles:
    """The index files of one space that are looked at. Not thread-safe.

    ``tables``: by their names, the newest first. ``damaged``: names of those that cannot be read, beside a newer
    release's. ``lost``: whether there is one that cannot be read and that no other replaces. ``whole``: whether
    everything that is there is looked at.
    """

    def __init__(self, place: Place, folder: str, access: Access, columns: Columns) -> None:
        self._place, self._folder, self._access, self._columns = place, f"{folder}/index", access, columns
        self._listed: set[str] = set()
        self._unlisted: set[str] = set()  # those that this object has published and no listing has shown yet
        self._unread: set[str] = set()
        self._ignored: dict[str, Table] = {}
        self.damaged: set[str] = set()
        self.tables: dict[str, Table] = {}
        self.whole, self.lost = True, False

    def path(self, name: str) -> str:
        return f"{self._folder}/{name}.index"

    # --- reading -----------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look which files there are, and open those that are new and needed.

        A damaged one is passed over; so is one that a listing goes on showing after it was removed: whoever removed it
        had replaced it long before.
        """
        steady(lambda: (None, not self._look()))

    def _look(self) -> set[str]:
        """List and open; return the names of files that were listed and are not there."""
        self._listed = set(unique_names(self._place, self._folder, ".index"))
        self._unlisted -= self._listed
        known = {name: t for name, t in self.tables.items() if name in self._listed | self._unlisted}
        found: dict[str, Table] = {}
        missing: set[str] = set()
        replaced = {old for name, table in {**known, **self._ignored}.items() for old in self._replaced_by(name, table)}
        fresh = sorted(self._listed - known.keys() - self._ignored.keys() - self._unread, reverse=True)
        ahead: dict[str, Future[Table]] = {}
        with ThreadPoolExecutor(_AT_A_TIME, thread_name_prefix="actcache-index") as pool:
            for name in fresh:
                if name in replaced:
                    continue
                try:
                    found[name] = ahead[name].result() if name in ahead else self._open(name)
                except FileNotFoundError:  # another process has replaced it since it was listed
                    missing.add(name)
                    continue
                except FormatError as error:
                    self._pass_over(name, error)
                    continue
                replaced.update(self._replaced_by(name, found[name]))
                if not ahead and found[name].replaces is not None:  # the newest one tells which others are needed
                    ahead = {n: pool.submit(self._open, n) for n in fresh if n < name and n not in replaced}
        for name, table in known.items():
            if isinstance(table, RemoteTable) and table.damaged:
                self._pass_over(name, FormatError(f"{self.path(name)} is damaged"))
            else:
                found[name] = table
        self._ignored = {name: table for name, table in self._ignored.items() if name not in replaced}
        self.damaged &= self._listed - replaced
        self.lost = bool(self._unread & self._listed - replaced)
        self.whole = not self._ignored and not self.lost
        self.tables = {name: found[name] for name in sorted(found, reverse=True) if name not in replaced}
        return missing

    def _replaced_by(self, name: str, table: Table) -> Iterable[str]:
        return [n for n in self._listed if n < name] if table.replaces is None else table.replaces

    def _pass_over(self, name: str, error: FormatError) -> None:
        logger.warning("ignoring an index: %s", error)
        self._unread.add(name)
        if not isinstance(error, FormatVersionError):
            self.damaged.add(name)

    def _open(self, name: str) -> Table:
        """Open an index file: map it, or read it at once where it is small; else its arrays come when they are needed.

        Raises as ``Table.open``.
        """
        path = self.path(name)
        where = f"{self._place.where}/{path}"
        begins = self._place.beginning(path, min(_HEAD_BYTES, _AT_ONCE), _AT_ONCE)
        if begins is None:
            return Table.open(self._place.local_copy(path), self._access, self._columns)
        data, size = begins
        if len(data) == size:
            return Table.loads(data, where, self._access, self._columns)
        try:
            length = safetensors.LENGTH_BYTES + safetensors.header_length(data, size, _MOST_HEADER)
            if length > len(data):
                data = (self._place.beginning(path, length) or begins)[0]
            metadata, extents = safetensors.parse_header(data[safetensors.LENGTH_BYTES : length], size)
        except ValueError as error:
            raise FormatError(f"{where} is truncated or no index: {error}") from None
        if is_of_before(metadata):
            return Table.open(self._place.local_copy(path), self._access, self._columns)
        shapes = {name: extent.shape for name, extent in extents.items()}
        return RemoteTable(metadata, shapes, where, self._access, self._columns, lambda: self._place.local_copy(path))

    def covered(self) -> frozenset[str]:
        """Return the names of the segments that the files describe."""
        return frozenset(segment.name for table in self.tables.values() for segment in table.segments)

    def ignore(self) -> None:
        """Look at none of these files any more; those that come later count."""
        self._ignored |= self.tables
        self.tables = {}

    def forget(self) -> None:
        self.tables, self._ignored = {}, {}

    # --- writing -----------------------------------------------------------------------------------------------------

    def smaller(self, table: Table) -> dict[str, Table]:
        """Return the files that a new one takes in, so that there are few of them."""
        nbytes = _nbytes(table)
        found: dict[str, Table] = {}
        for name, other in sorted(self.tables.items(), key=lambda item: _nbytes(item[1])):
            if _nbytes(other) > _RATIO * nbytes:
                break
            found[name] = other
            nbytes += _nbytes(other)
        return found

    def all(self) -> dict[str, Table]:
        """Return all files, those that are ignored last: what they say and nothing else does is not lost."""
        return {**self.tables, **self._ignored}

    def add(self, table: Table, replaced: Collection[str]) -> None:
        """Publish a file that has what those others have, which go when nobody can be about to read them."""
        now = time.time()
        known = self.all()
        gone: dict[str, float] = {}
        for before in (table.replaces or {} for table in known.values()):
            # Whoever reads this one first knows which others are needed. For longer than they stay: a listing may lag.
            gone |= {n: when for n, when in before.items() if n in self._listed or now - when < 2 * _GRACE_SECONDS}
        gone |= dict.fromkeys(replaced, now)
        table = replace(table, replaces=gone)
        name = next_name([*self._listed, *known])
        self._place.publish_along(self.path(name), table.write)
        kept = {n: t for n, t in self.tables.items() if n not in gone}
        self._ignored = {n: t for n, t in self._ignored.items() if n not in gone}
        self.tables = {name: table, **kept}
        self._unlisted.add(name)
        for old in [n for n, when in gone.items() if now - when >= _GRACE_SECONDS and n in self._listed]:
            self._place.remove(self.path(old))
            self._listed.discard(old)

    def put_alone(self, table: Table) -> None:
        """Publish a file that covers everything there is, and remove all others."""
        old = unique_names(self._place, self._folder, ".index")
        self._place.publish(self.path(next_name(old)), table.write, replace=True)
        for replaced in old:
            self._place.remove(self.path(replaced))


def _nbytes(table: Table) -> int:
    """Return about how large a table's file is; small ones count as ``_LEAST_BYTES``."""
    return max(_LEAST_BYTES, 64 * len(table) + _SEGMENT_BYTES * len(table.segments))
