"""One space's entries in a local cache: looked up, read and added; see ``local_folder`` for what bounds them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS, VALUES, Block, EntryLocations
from actcache.entries.entry import columns_of
from actcache.entries.read import LookupCache, Request
from actcache.entries.writer import Rows, Writer
from actcache.errors import FormatError, SegmentGoneError, StoreError
from actcache.format import checksum
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of, row_indices
from actcache.format.recipe import Recipe
from actcache.io.files import translated
from actcache.reader.caches.batches import Ids, flat
from actcache.reader.caches.local_folder import CacheFolder, Lease
from actcache.segments.catalog import Catalog
from actcache.segments.snapshot import SegmentedSnapshot

logger = logging.getLogger(__name__)

_SEGMENT_BYTES = 64 << 20
_SEGMENTS = 16  # at least, so that eviction has a choice; of a small cache, so many that their own needs are small
_SMALL_BYTES, _FEW_SEGMENTS = 256 << 10, 4
_SEGMENT_SECONDS = 30.0
_PAUSE_SECONDS = 60.0  # where there is no room, until it is looked for again
_EXIT_PRIORITY = 10


class LocalEntries:
    """Thread-safe. What is added is readable at once and published in segments by a thread of its own.

    Raises ``StoreError`` where the folder cannot be read, or no lease is to be had.
    """

    def __init__(self, folder: CacheFolder, recipe: Recipe) -> None:
        columns = columns_of(recipe)
        self._folder = folder
        self._fingerprint = recipe.fingerprint
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
        with translated(f"cannot use {folder.root}"):
            self._lease = Lease(folder.leases)
        # Without a driver, which merges on its way: replaced segments would take up room for their grace period.
        self._catalog = Catalog(folder.format, folder.place, recipe.fingerprint, columns, writable=True)
        size = min(_SEGMENT_BYTES, max(folder.nbytes // _SEGMENTS, min(_SMALL_BYTES, folder.nbytes // _FEW_SEGMENTS)))
        self._writer = Writer(self._append, columns, self._seed, segment_bytes=size, segment_seconds=_SEGMENT_SECONDS)
        self._ahead = LookupCache()
        self._lock = threading.RLock()
        self._pending: dict[bytes, int] = {}  # checksums of what the writer holds
        self._leaving: list[bytes] = []  # keys of the block that was published last
        self._bad: NDArray[np.int64] = np.empty(0, np.int64)  # numbers of segments with entries that are corrupt
        self._used: set[int] = set()  # numbers of segments that the lease has
        self._paused = 0.0  # until then nothing is added
        self._closed = self._broken = False
        self._look()
        # At exit, also of a child that multiprocessing made, to which ``atexit`` does not come.
        self._at_exit = Finalize(None, self.close, exitpriority=_EXIT_PRIORITY)

    # --- reading -----------------------------------------------------------------------------------------------------

    def find(self, keys: NDArray[np.uint8], checksums: NDArray[np.uint64]) -> tuple[Request, NDArray[np.bool_]]:
        """Look keys up; return the request to read them by, and which are there with just these contents, ``[n]``."""
        # Before the request is made: what is added meanwhile is newer than what it will be taken for.
        get = self._pending.get
        pending = np.array([get(name, 0) for name in key_list(keys)], np.uint64) if self._pending else None
        request = Request(lambda: self._snapshot, self._writer, self._seed, keys, self._ahead)
        found = request.checksums
        if pending is not None:
            found = np.where(found == 0, pending, found)
        hits: NDArray[np.bool_] = (found == checksums) & (request.lengths > 0) & (checksums != 0)
        if self._broken:
            hits[:] = False
        if len(self._bad):
            hits &= ~np.isin(request.located.segment, self._bad)
        return request, hits

    def read(self, request: Request, out: NDArray[Any], ids: Ids) -> list[int]:
        """Read all of a request's entries, packed or padded (see ``Space.read_into``); return which are corrupt.

        Raises ``SegmentGoneError``: a segment was evicted, or nothing can be read here any more: refresh, look again.
        """
        rows, flat_ids, width = flat(out, ids)
        try:
            token_ids = np.empty(len(rows), np.int32) if flat_ids is None else flat_ids
            return request.read({VALUES: rows, TOKEN_IDS: token_ids}, width, verify=True)
        except StoreError as error:
            self._fail(error)
            raise SegmentGoneError(str(error)) from error

    def read_ahead(self, located: EntryLocations) -> bool:
        """Ask the operating system to load some entries soon."""
        return self._snapshot.read_ahead(located)

    def use(self, located: EntryLocations) -> None:
        """Take the segments of some entries into use: nobody evicts them as long as this is open."""
        numbers = set(np.unique(located.segment).tolist()) - self._used - {-1}
        if numbers:
            self._used |= numbers
            try:
                names = [self._catalog.segments[number].name for number in numbers]
                self._lease.add(names)
                for name in names:
                    os.utime(f"{self._folder.root}/{self._catalog.segment_name(name)}")
            except FileNotFoundError:
                pass  # evicted just now
            except OSError as error:
                self._give_up(error)

    def stale(self) -> bool:
        """Return whether segments came or went since the last look."""
        return self._changed_at() != self._seen

    def _changed_at(self) -> int:
        """Return when segments came or went, by the file system's clock; 0 where there are none."""
        try:
            return os.stat(f"{self._folder.root}/{self._catalog.folder}/segments").st_mtime_ns
        except FileNotFoundError:
            return 0

    def refresh(self) -> None:
        """See what others have added and evicted."""
        try:
            self._look()
        except (StoreError, FormatError) as error:
            self._fail(error)

    def _look(self) -> None:
        with self._lock:
            self._seen = self._changed_at()  # before the look: what comes meanwhile is looked at again
            self._snapshot: SegmentedSnapshot = self._catalog.snapshot()

    def _fail(self, error: Exception) -> None:
        """Serve nothing any more: the disk cannot be read, or the process has no more descriptors, say."""
        if not self._broken:
            self._broken = True
            self._paused = np.inf
            logger.warning("going on without the local cache %s: %s", self._folder.root, error)

    # --- changing ----------------------------------------------------------------------------------------------------

    @property
    def accepts(self) -> bool:
        """Whether there may be room for more."""
        return not self._closed and self._paused <= time.monotonic()

    def add(
        self,
        keys: NDArray[np.uint8],
        lengths: NDArray[np.int64],
        begins: NDArray[np.int64],
        columns: Mapping[str, NDArray[Any]],
        digests: NDArray[np.uint64],
    ) -> None:
        """Add entries in stored form. Never fails: a cache is no reason to stop.

        Args:
            keys: ``[n, 32]``.
            lengths, begins: ``[n]`` which rows of the columns are each entry's.
            digests: ``[n]`` their checksums.
        """
        with self._lock:
            if not self.accepts:
                return
            fresh: list[int] = []
            for i, (name, digest) in enumerate(zip(key_list(keys), digests.tolist(), strict=True)):
                if name not in self._pending:
                    self._pending[name] = digest
                    fresh.append(i)
        rows = row_indices(begins[fresh], lengths[fresh], None)

        def fill(out: Rows) -> None:
            for name, buffer in out.items():
                np.take(columns[name], rows, axis=0, out=buffer, mode="clip")  # which needs no copy between

        try:
            # Without the lock: it may wait for the thread that publishes.
            self._writer.add(keys[fresh], lengths[fresh], frozenset(columns), fill)
        except (StoreError, FormatError) as error:
            self._give_up(error)
            self._writer.abandon()

    def drop(self, request: Request, corrupt: list[int]) -> None:
        """Remove the segments of corrupt entries. Their other entries are copies, too."""
        numbers = np.unique(request.located.segment[corrupt])
        with self._lock:
            self._bad = np.union1d(self._bad, numbers)
        for number in numbers[numbers >= 0].tolist():
            name = self._catalog.segments[number].name
            logger.warning("removing a damaged segment of the local cache %s: %s", self._folder.root, name)
            try:
                self._catalog.remove(name)
            except StoreError as error:
                self._give_up(error)

    def _append(self, block: Block) -> None:
        """Publish what the writer has collected. Where there is no room for it, it is dropped."""
        with self._folder.changing() as allowed:
            if allowed and self._paused != np.inf:
                self._publish(block)
            else:  # whoever holds the lock does not move: reading shall not wait for it again so soon
                self._pause()
        # The writer holds this block until it has another one to publish, and no longer the one before.
        with self._lock:
            for name in self._leaving:
                self._pending.pop(name, None)
        self._leaving = key_list(block.keys)

    def _publish(self, block: Block) -> None:
        if self.stale():
            self.refresh()
        fresh = self._snapshot.locate(block.keys).checksums != block.checksums  # others may have added some
        block = block if fresh.all() else _part(block, fresh)
        if not len(block):
            return
        arrays = block.arrays().values()
        needed = sum(array.nbytes for array in arrays) + 4096 * (len(arrays) + 8)  # at most, beside its arrays
        if not self._folder.make_room(needed + self._catalog.index_bytes(len(block)), self._fingerprint):
            self._pause()
            return
        self._catalog.publish(block)
        self._catalog.index_if_due()
        self.refresh()
        located = self._snapshot.locate(block.keys)  # not by a request: that waits for the writer, which waits for this
        self.use(located[located.found])

    def _pause(self) -> None:
        self._paused = max(self._paused, time.monotonic() + _PAUSE_SECONDS)

    def _give_up(self, error: Exception) -> None:
        if self._paused != np.inf:
            self._paused = np.inf
            # As text: who keeps a log's records would keep the error, its traceback, and by that all files here open.
            logger.warning("adding no more to the local cache %s: %s", self._folder.root, str(error))

    def close(self) -> None:
        """Publish what was added and end the lease. Does nothing the second time."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._at_exit.cancel()
        try:
            if self._paused == np.inf:
                self._writer.abandon()
            self._writer.close()
            with self._folder.changing() as allowed:
                room = allowed and self._folder.make_room(self._catalog.index_bytes(0), self._fingerprint)
                self._catalog.close(index=room)
        except (StoreError, FormatError) as error:
            logger.warning("could not write the last entries to the local cache %s: %s", self._folder.root, str(error))
            self._catalog.close(index=False)
        finally:
            self._lease.release()

    def forget(self) -> None:
        """Let go of everything in a fork's child, where a thread that is not there may hold the locks."""
        self._lock = threading.RLock()
        self._closed = True
        self._lease.forget()


def _part(block: Block, which: NDArray[np.bool_]) -> Block:
    """Return some entries of a block whose columns are arrays."""
    lengths = np.diff(block.offsets)
    rows = row_indices(block.offsets[:-1][which], lengths[which], None)
    columns = {name: np.asarray(column)[rows] for name, column in block.columns.items()}
    return Block(block.keys[which], offsets_of(lengths[which]), block.checksums[which], columns)
