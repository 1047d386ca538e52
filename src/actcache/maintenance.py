"""Looking after a space: whether all of it is intact, what to do where it is not, and giving back space."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache import codec
from actcache.backend import (
    EXTRAS,
    GRACE_SECONDS,
    TOKEN_IDS,
    VALUES,
    Block,
    BytesDone,
    Compaction,
    Snapshot,
    SpaceDriver,
)
from actcache.errors import ShapeError, UsageError
from actcache.key import Keys, key_array, key_list
from actcache.lastuse import LastUse
from actcache.plain import whole
from actcache.ragged import offsets_of
from actcache.recipe import Recipe
from actcache.request import Request, looking_again
from actcache.storage.workers import available_cpus
from actcache.writer import Writer

if TYPE_CHECKING:
    from actcache.store import Store

COMPACT_BYTES = 2 << 30
_PART_BYTES = 16 << 20  # read and checked at once by a thread

#: Called with the entries that have been checked and how many there are.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What ``verify`` found."""

    entries: int  # that were read and checked
    nbytes: int  # of their activations
    corrupt: list[bytes] = field(default_factory=list)  # keys of entries that fail their checksums
    damaged: dict[str, str] = field(default_factory=dict)  # segments that cannot be read, name -> what is wrong

    @property
    def intact(self) -> bool:
        return not self.corrupt and not self.damaged


@dataclass(frozen=True)
class Repair:
    """What ``repair`` did."""

    quarantined: list[bytes]  # keys of corrupt entries, which are misses now
    set_aside: list[str]  # segments that could not be read, which are out of the way now


class Maintained:
    """The part of ``Space`` that looks after it."""

    recipe: Recipe
    _codec: codec.Codec
    _seed: int
    _driver: SpaceDriver
    _store: Store
    _used: LastUse
    _write_lock: threading.RLock

    def verify(self, progress: Progress | None = None, *, sample: int | None = None) -> Verification:
        """Read every stored entry and compare it with its checksum, on all processors; changes nothing.

        Segments are looked at without the help of an index, too.

        Args:
            sample: entries that are read, drawn at random; None for all.

        Raises:
            UsageError: ``sample`` is no whole number of 0 or more.
            FormatError: nothing of the space can be read safely (lmdb).
        """
        if sample is not None:
            sample = whole("sample", sample, 0)
        damaged = self._driver.examine()  # first: what is damaged there may be unsafe to read
        self.refresh()
        keys = self._view().keys()
        if sample is not None and sample < len(keys):
            keys = keys[np.random.default_rng().choice(len(keys), sample, replace=False)]
        corrupt, nbytes = self.corrupt_among(keys, progress)
        return Verification(len(keys), nbytes, corrupt, damaged)

    def put_stored(self, keys: Keys, arrays: Sequence[Any], **others: Sequence[Any]) -> int:
        """Store entries that come from a space of this recipe, as ``get`` returns them; what is there is skipped.

        As ``put``, but the rows are what the recipe's lineage (``Recipe.via``) has made of them already. So they are
        not rounded to its dtypes again, which refuses what bfloat16 has rounded up out of float16's range.

        Raises:
            ShapeError: also where rows are of another dtype than ``get`` returns.
        """
        stored = codec.get(self.recipe.dtype)
        for i, array in enumerate(arrays):
            if (given := getattr(array, "dtype", None)) != stored.delivered:
                raise ShapeError(f"array {i} holds {given}, and get returns {stored.delivered}: use put")
        return self._put(keys, {VALUES: arrays, **others}, stored, overwrite=False)

    def in_order(self, keys: Keys) -> NDArray[np.uint8]:
        """Return keys as ``[n, 32]`` in the order in which their published entries lie, absent ones first."""
        wanted = key_array(keys)
        located = self._view().locate(wanted)
        return wanted[np.lexsort((located.row, located.segment))]

    @looking_again
    def stored_checksums(self, keys: Keys) -> NDArray[np.uint64]:
        """Return tokens, checksum and checksum of the optional arrays of each published entry, ``[n, 3]``; 0 where
        it is absent or has none. Reads no activations."""
        view = self._view()
        located = view.locate(key_array(keys))
        columns = (located.tokens.astype(np.uint64), located.checksums, view.extra_checksums(located))
        return np.stack(columns, axis=1) * located.found[:, None]

    @looking_again
    def whereabouts(self, keys: Keys) -> tuple[list[str], NDArray[np.int64]]:
        """Return names of segments, and which of them holds each published entry, ``[n]``; -1 where it is absent.

        A backend that has no segments returns no names, and -1 throughout.
        """
        view = self._view()
        return view.whereabouts(view.locate(key_array(keys)))

    def corrupt_among(self, keys: Keys, progress: Progress | None = None) -> tuple[list[bytes], int]:
        """Read published entries on all processors; return which fail their checksums, and the bytes of rows read."""
        keys = self.in_order(keys)
        lengths = self._view().locate(keys).tokens
        starts = offsets_of(lengths) * self._codec.stored.itemsize * self.recipe.hidden_size
        wanted = np.arange(0, int(starts[-1]), _PART_BYTES)
        cuts = np.unique(np.r_[np.searchsorted(starts, wanted), len(keys)]).tolist() if len(keys) else [0]
        parts = [keys[first:last] for first, last in itertools.pairwise(cuts)]
        corrupt: list[bytes] = []
        checked = 0
        with ThreadPoolExecutor(available_cpus(), thread_name_prefix="actcache-verify") as pool:
            futures = [pool.submit(self._corrupt, part) for part in parts]
            try:
                for part, future in zip(parts, futures, strict=True):
                    corrupt += key_list(part[future.result()])
                    checked += len(part)
                    if progress is not None:
                        progress(checked, len(keys))
            finally:
                for future in futures:
                    future.cancel()
        return corrupt, int(starts[-1])

    def repair(self, found: Verification | None = None) -> Repair:
        """Quarantine what is corrupt: such entries become misses, which a fill computes again; the bytes are kept.

        Args:
            found: what ``verify`` said; None verifies first. What has been mended since is left alone.

        Raises:
            StoreError: read-only, disk full, ...; nothing is lost.
        """
        self._writing()
        found = self.verify() if found is None else found
        with self._write_lock:
            corrupt = key_array(found.corrupt)
            if len(corrupt):
                self._driver.examine()  # no index has a say in what is deleted
                self.refresh()
                corrupt = corrupt[self._corrupt(corrupt)]
            if len(corrupt):
                self._driver.quarantine(corrupt)
            repair = Repair(key_list(corrupt), self._driver.set_aside() if found.damaged else [])
            self.refresh()
        return repair

    def merge_small_segments(self, allowed: bool) -> None:
        """Say whether this object's writer may merge its own small segments on the way, which it does unless told.

        For ten minutes, for those who read them, what it merged lies there twice. What stays is for ``compact``.
        """
        self._driver.merges_small = allowed

    def compact(
        self,
        *,
        target_bytes: int = COMPACT_BYTES,
        waste: float = 0.1,
        grace: float = GRACE_SECONDS,
        progress: BytesDone = lambda done, total: None,
    ) -> Compaction:
        """Join small segments, and give back the space of deleted and overwritten entries.

        Others may read, write and compact at the same time. Memory: some tens of MiB, and 200 bytes an entry.

        Args:
            target_bytes: of activations, about what a merged segment gets at most.
            waste: the share of deleted or overwritten rows from which on a segment is rewritten.
            grace: seconds for which what was replaced stays, for readers that still use it; a later compaction
                removes it.
            progress: called with the bytes that are moved and how many there are to move.

        Raises:
            StoreError: read-only, disk full, ...; nothing is lost.
            UsageError: ``target_bytes`` is no whole number; ``grace`` is negative: a replacement that is gone would
                count as old enough.
        """
        if not grace >= 0:
            raise UsageError(f"grace is a number of seconds, 0 or more, not {grace}")
        target_bytes = whole("target_bytes", target_bytes, 1)
        with self._write_lock:
            self._writing().flush()
            done = self._driver.compact(target_bytes=target_bytes, waste=waste, grace=grace, progress=progress)
            self.refresh()
        return done

    @looking_again
    def _corrupt(self, keys: NDArray[np.uint8]) -> list[int]:
        """Return the positions of published entries that fail their checksums; absent ones do not."""
        view = self._view()  # one for all: another might know of other arrays
        request = Request(lambda: view, None, self._seed, keys)
        total = int(request.lengths.sum())
        rows = {VALUES: np.empty((total, self.recipe.hidden_size), self._codec.stored)}
        found = set(request.read({**rows, TOKEN_IDS: np.empty(total, np.int32)}, None, verify=True))
        had = np.array([request.has(name) for name in EXTRAS]).T
        for kind in np.unique(had[had.any(axis=1)], axis=0):  # entries with the same optional arrays at once
            which = np.flatnonzero((had == kind).all(axis=1))
            part = Request(lambda: view, None, self._seed, keys[which])
            columns = [column for column, there in zip(EXTRAS.items(), kind.tolist(), strict=True) if there]
            total = int(part.lengths.sum())
            out = {name: np.empty((total, *trailing), dtype) for name, (dtype, trailing) in columns}
            found.update(which[part.read(out, None, verify=True)].tolist())
        return sorted(found)

    @looking_again
    def salvaged_ids(self, keys: Keys) -> list[NDArray[np.int32] | None]:
        """Return the token ids of published entries as they lie, intact or not; None where there are none to be read.

        An entry's checksum is over ids and rows together: of a corrupt entry, nothing here says that the ids are right.
        """
        request = Request(self._view, None, self._seed, key_array(keys))
        has, offsets = request.has(TOKEN_IDS), offsets_of(request.lengths)
        ids = np.empty(int(offsets[-1]), np.int32)
        lost = set(request.read({TOKEN_IDS: ids}, None, verify=False))
        cuts = enumerate(itertools.pairwise(offsets.tolist()))
        return [ids[begin:end] if has[i] and i not in lost else None for i, (begin, end) in cuts]

    def put_block(self, block: Block) -> None:
        """Publish entries that are in stored form already, as one segment; durable when this returns.

        For whoever has read them, verified, where they stood under an equal recipe: nothing is looked at, computed or
        copied. What stands here under one of the keys is replaced.

        Raises:
            StoreError: read-only, disk full, ...; nothing of the block is there.
        """
        with self._write_lock:
            self._writing().flush()  # what was put before is older
            self._append(block)

    def leave_no_trace(self) -> None:
        """Have nothing that is done through this object from here on count as a use of the space."""
        self._used.stop()

    # --- blobs -----------------------------------------------------------------------------------------------------

    def blob(self, name: str) -> bytes | None:
        """Return a small named file of the space (its canaries, say), None where there is none."""
        return self._store.driver.read_blob(f"spaces/{self.recipe.fingerprint}/{name}")

    def put_blob(self, name: str, data: bytes, *, replace: bool = False) -> bool:
        """Write a small named file of the space, durably; return False where it stands and ``replace`` is False."""
        return self._store.driver.write_blob(f"spaces/{self.recipe.fingerprint}/{name}", data, replace=replace)

    def refresh(self) -> None:
        raise NotImplementedError

    def _view(self) -> Snapshot:
        raise NotImplementedError

    def _writing(self) -> Writer:
        raise NotImplementedError

    def _append(self, block: Block) -> None:
        raise NotImplementedError

    def _put(self, keys: Keys, lists: Mapping[str, Sequence[Any]], stored_as: codec.Codec, *, overwrite: bool) -> int:
        raise NotImplementedError
