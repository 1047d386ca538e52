"""Entries of a remote space that stay on a disk of this machine, for later epochs, runs and processes.

What is kept are copies, and never trusted beyond that: an entry is served from here only where the space says that it
has it with the very same checksum (over key, recipe, token ids and rows), and where the copy's bytes still give it. So
whatever becomes of the folder or of the space, what is read is what the space holds.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS, VALUES
from actcache.entries.entry import ReadReport
from actcache.errors import OutOfSpaceError, SegmentGoneError, ShapeError, UsageError
from actcache.format import checksum, codec
from actcache.format.keys import Keys, key_array
from actcache.format.ragged import offsets_of
from actcache.reader.caches.batches import Ids, Part, Wrapper, flat, join
from actcache.reader.caches.local_entries import LocalEntries
from actcache.reader.caches.local_folder import CacheFolder
from actcache.reader.fetch import Source
from actcache.reader.stats import ReaderStats

logger = logging.getLogger(__name__)

_LOOKS = 5  # while others evict what was found


class LocalCache(Wrapper):
    """Wraps a source: reads of entries whose copies are on the local disk do not reach it. Thread-safe.

    Any number of processes may share a folder. When it is full, segments that no living object has looked at are
    evicted, the least recently used first; where there are none, what is read is not kept.

    The folder ``path``, on a local disk, is made where it is absent, and takes up ``nbytes`` at most. Documents that
    come from here are counted in ``stats``. Raises ``UsageError``, ``NotAStoreError`` or ``StoreError`` where ``path``
    cannot be a cache.
    """

    def __init__(
        self, source: Source, path: str | os.PathLike[str], nbytes: int, stats: ReaderStats | None = None
    ) -> None:
        if not nbytes:
            raise UsageError("local_bytes is 0: say how much the local cache may take up, '200GiB', say")
        self._source, self._path, self._nbytes = source, os.path.abspath(os.path.expanduser(path)), nbytes
        self._stats = stats or ReaderStats()
        recipe = source.recipe
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
        kind = codec.get(recipe.dtype)
        self._form = kind.width(recipe.hidden_size), kind.stored  # of a row
        self._closed = False
        self._begin()
        self._open()
        _CACHES.add(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._opened: LocalEntries | None = None
        self._usable = True

    def _open(self) -> LocalEntries | None:
        """Return the entries; None where there is no room for so much as a cache's own files."""
        with self._lock:
            if self._opened is None and self._usable and not self._closed:
                try:
                    self._opened = LocalEntries(CacheFolder(self._path, self._nbytes), self._source.recipe)
                    weakref.finalize(self, _close_elsewhere, self._opened).atexit = False
                except OutOfSpaceError as error:
                    self._usable = False
                    logger.warning("going on without a local cache: %s", error)
            return self._opened

    def use(self, keys: Keys) -> int:
        """Say which entries are going to be read: their copies are not evicted. Return how many there are."""
        entries = self._open()
        if entries is None:
            return 0
        wanted = key_array(keys)
        request, hits = entries.find(wanted, self._source.checksums(wanted))
        entries.use(request.located[hits])
        return int(hits.sum())

    def read_ahead(self, keys: Keys) -> bool:
        wanted, entries = key_array(keys), self._open()
        if entries is None:
            return self._source.read_ahead(wanted)
        request, hits = entries.find(wanted, self._source.checksums(wanted))
        if hits.any():
            entries.use(request.located[hits])
            try:
                entries.read_ahead(request.located[hits])
            except SegmentGoneError:
                entries.refresh()
        if not hits.all():
            self._source.read_ahead(wanted[~hits])
        return True  # what is announced is in use, too, and not evicted

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any:
        """See ``Space.read_into``; ``out`` is a NumPy array."""
        wanted = key_array(keys)
        for _ in range(_LOOKS):
            entries = self._open()
            if entries is None:
                break
            checksums = self._source.checksums(wanted)
            request, hits = entries.find(wanted, checksums)
            if not hits.all() and entries.stale():
                entries.refresh()
                request, hits = entries.find(wanted, checksums)
            lengths = request.lengths
            if not (hits.all() and _fits(lengths, out)):
                lengths = self._source.lengths(wanted)
                hits &= lengths == request.lengths  # or what says so is damaged
            if not hits.any():
                report = self._source.read_into(wanted, out, token_ids=token_ids)
                rows, ids, width = flat(out, token_ids)
                begins = offsets_of(report.lengths, width)[:-1]
                self._keep(entries, wanted, report.lengths, begins, rows, ids)
                return report
            _check_room(lengths, out)
            entries.use(request.located[hits])
            try:
                if not hits.all():
                    mixed = self._mixed(entries, wanted, hits, (lengths, checksums), out, token_ids)
                    if mixed is not None:
                        self._count(hits)
                        return mixed
                elif corrupt := entries.read(request, out, token_ids):
                    entries.drop(request, corrupt)
                else:
                    self._count(hits)
                    return ReadReport(lengths)
            except SegmentGoneError:
                entries.refresh()
        return self._source.read_into(wanted, out, token_ids=token_ids)

    def _mixed(
        self,
        entries: LocalEntries,
        wanted: NDArray[np.uint8],
        hits: NDArray[np.bool_],
        contents: tuple[NDArray[np.int64], NDArray[np.uint64]],
        out: Any,
        ids: Any,
    ) -> ReadReport | None:
        """Read a batch some of which is here; None where that turned out to be corrupt or gone."""
        here, there = np.flatnonzero(hits), np.flatnonzero(~hits)
        lengths, checksums = contents
        request, still = entries.find(wanted[here], checksums[here])
        if not still.all() or (request.lengths != lengths[here]).any():
            return None
        local, local_ids = self._buffers(lengths[here], ids)
        if corrupt := entries.read(request, local, local_ids):
            entries.drop(request, corrupt)
            return None
        fresh, fresh_ids = self._buffers(lengths[there], ids)
        report = self._source.read_into(wanted[there], fresh, token_ids=fresh_ids)
        lengths = lengths.copy()
        lengths[there] = report.lengths
        _check_room(lengths, out)
        begins = offsets_of(report.lengths)[:-1]
        self._keep(entries, wanted[there], report.lengths, begins, fresh, fresh_ids)
        local_begins = offsets_of(lengths[here])[:-1]
        join([Part(here, local, local_ids, local_begins), Part(there, fresh, fresh_ids, begins)], lengths, out, ids)
        return ReadReport(lengths)

    def _count(self, hits: NDArray[np.bool_]) -> None:
        with self._lock:
            self._stats.local_documents += int(hits.sum())

    def _buffers(self, lengths: NDArray[np.int64], ids: Ids) -> tuple[NDArray[Any], Ids]:
        width, dtype = self._form
        values = np.empty((int(lengths.sum()), width), dtype)
        return values, None if ids is None else np.empty(len(values), np.int32)

    def _keep(
        self,
        entries: LocalEntries,
        keys: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        begins: NDArray[np.int64],
        rows: NDArray[Any],
        ids: Ids,
    ) -> None:
        """Keep what was read, where it is just what the space says that it has.

        It is not where an entry was read without its token ids, was overwritten meanwhile, or is not published yet.
        """
        if not entries.accepts:
            return
        columns = {VALUES: rows} if ids is None else {TOKEN_IDS: ids, VALUES: rows}
        found, _ = checksum.entry_checksums(self._seed, keys, begins, lengths, columns)
        good = (found == self._source.checksums(keys)) & (lengths > 0)
        entries.add(keys[good], lengths[good], begins[good], columns, found[good])

    def close(self) -> None:
        """Write what waits to be written, and let others evict; later reads go to the source. Does nothing twice."""
        with self._lock:
            entries, self._opened, self._closed = self._opened, None, True
        if entries is not None:
            entries.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self._source, "path": self._path, "nbytes": self._nbytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["source"], state["path"], state["nbytes"])  # type: ignore[misc]


def _fits(lengths: NDArray[np.int64], out: Any) -> bool:
    if out.ndim == 2:
        return int(lengths.sum()) <= len(out)
    return int(lengths.max(initial=0)) <= out.shape[1] and len(lengths) <= len(out)


def _check_room(lengths: NDArray[np.int64], out: Any) -> None:
    """Refuse a buffer that the entries do not fit."""
    if not _fits(lengths, out):
        longest, total = int(lengths.max(initial=0)), int(lengths.sum())
        raise ShapeError(f"{len(lengths)} entries of {total} rows, up to {longest} each, and out is {list(out.shape)}")


def _close_elsewhere(entries: LocalEntries) -> None:
    """Close in a thread of its own: the collector may have come in the middle of anything."""
    threading.Thread(target=entries.close, name="actcache-cache-close").start()


_CACHES: weakref.WeakSet[LocalCache] = weakref.WeakSet()


def _after_fork() -> None:
    for cache in list(_CACHES):
        entries = cache._opened
        cache._begin()  # the child opens the folder anew, with a lease and a writer of its own
        if entries is not None:
            entries.forget()


os.register_at_fork(after_in_child=_after_fork)
