"""Moving a store: every space, entry by entry, between any two backends and places, and the proof that it arrived.

Keys are digests of contents, so what stands in the target already is skipped: a migration that was killed goes on when
it is run again. Checksums bind an entry's rows to the fingerprint of its space, so entries of equal recipes have equal
checksums in every backend. Three things are proved: that what was read is what the source had stored, that the target
says of each entry what the source's rows demand, and that the target's bytes say so when they are read back. The source
is only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import checksum, codec
from actcache.backend import EXTRAS, TOKEN_IDS
from actcache.collection import Collection
from actcache.errors import CorruptEntryError, DataError
from actcache.inspection import Progress, chosen, opened
from actcache.key import key_array, key_list
from actcache.ragged import offsets_of
from actcache.space import Space
from actcache.store import Store
from actcache.writer import SEGMENT_BYTES

_PART_BYTES = 32 << 20  # of rows that are read at once
_AHEAD = 2  # parts that are read while one is being put
_COLUMNS = (TOKEN_IDS, *sorted(EXTRAS))
_NOT_COPIED = {"recipe.json", "used.json", "pinned.json"}  # the target's space has its own


@dataclass(frozen=True)
class SpaceMigration:
    """What became of one space.

    The digests are BLAKE2b-128 over key, tokens and checksums of all entries of the source, sorted by key: what the
    target should hold, by the source's rows, and what it does hold, by its own checksums, which its bytes were read
    and compared with.
    """

    source: str  # fingerprint
    target: str  # the same, unless the dtype changed
    entries: int  # of the source
    copied: int  # the others stood in the target
    nbytes: int  # of the rows that were read from the source
    digest: str
    target_digest: str
    corrupt: list[bytes] = field(default_factory=list)  # keys that fail their checksums in the source: not copied
    differing: list[bytes] = field(default_factory=list)  # keys of which the target holds other numbers, or none
    damaged: dict[str, str] = field(default_factory=dict)  # segments of the source that cannot be read

    @property
    def equal(self) -> bool:
        """Whether the target is proved to hold all that the source holds."""
        return self.digest == self.target_digest and not self.damaged and not self.differing


@dataclass(frozen=True)
class Migration:
    """What ``migrate`` did."""

    spaces: list[SpaceMigration]
    unreadable: dict[str, str]  # fingerprints of the source's spaces that were left out, and why
    collections: dict[str, str]  # name -> "copied", "present", or what is wrong

    @property
    def equal(self) -> bool:
        """Whether the target is proved to hold all that was to be migrated."""
        fine = all(state in ("copied", "present") for state in self.collections.values())
        return fine and not self.unreadable and all(space.equal for space in self.spaces)


def migrate(
    source: Store,
    target: Store,
    *,
    prefixes: Sequence[str] = (),
    dtype: str | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    progress: Progress | None = None,
) -> Migration:
    """Copy spaces, with their blobs, and collections into another store; run it again where it was interrupted.

    Memory: some tens of MiB for rows, two segments of the writer, and about 200 bytes an entry.

    Args:
        source: opened with ``mode="r"``, better, though nothing is written to it either way.
        prefixes: of the fingerprints of the spaces; all where there are none.
        dtype: how the target stores rows; None keeps each space's own. Another dtype is another recipe.
        segment_bytes: of the target, see ``Store.space``.
        progress: told what is being done, and entries.

    Raises:
        UsageError: a prefix fits no space; a row is too large for the dtype. What was copied before stays.
        StoreError: disk full, network, ...: likewise.
    """
    spaces, unreadable = [], {}
    for fingerprint in chosen(source, prefixes):
        try:
            with opened(source, fingerprint) as space:
                recipe = space.recipe if dtype is None else dataclasses.replace(space.recipe, dtype=dtype)
                with target.space(recipe, segment_bytes=segment_bytes) as other:
                    _copy_blobs(source, space, other)
                    spaces.append(_Copy(space, other, progress).run())
        except DataError as error:
            unreadable[fingerprint] = str(error)
    collections = {name: _copy_collection(source, target, name) for name in source.collections()}
    return Migration(spaces, unreadable, collections)


def _copy_blobs(store: Store, source: Space, target: Space) -> None:
    for path in store.driver.blobs(f"spaces/{source.recipe.fingerprint}"):
        name = path.rpartition("/")[2]
        data = source.blob(name) if name not in _NOT_COPIED else None
        if data is not None:
            target.put_blob(name, data)


def _copy_collection(source: Store, target: Store, name: str) -> str:
    path = source.collection_blob(name)
    try:
        data = source.driver.read_blob(path)
        if data is None:
            return "deleted meanwhile"
        Collection.from_bytes(data, f"{source.url}: collection {name!r}")
        if target.driver.write_blob(path, data, replace=False):
            return "copied"
        return "present" if target.driver.read_blob(path) == data else "the target has another of that name: delete one"
    except DataError as error:
        return str(error)


@dataclass(frozen=True)
class _Part:
    """Some entries as they were read: one array a key, all with the same optional arrays."""

    keys: NDArray[np.uint8]  # [n, 32]
    rows: list[NDArray[Any]]  # [tokens, hidden] each
    columns: dict[str, list[NDArray[Any]]]  # those of _COLUMNS that these entries have
    corrupt: list[bytes]  # keys that are left out
    nbytes: int  # of rows


class _Copy:
    """Copies one space into another. Not thread-safe."""

    def __init__(self, source: Space, target: Space, progress: Progress | None) -> None:
        self._source, self._target = source, target
        self._progress = progress
        self._name = source.recipe.fingerprint
        self._same = source.recipe.fingerprint == target.recipe.fingerprint
        self._codec = codec.get(target.recipe.dtype)
        recipe = target.recipe
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
        self._corrupt: set[bytes] = set()
        self._copied = self._nbytes = 0

    def run(self) -> SpaceMigration:
        keys = self._source.key_array()  # sorted
        expected = self._source.stored_checksums(keys)
        if self._same:
            self._copy(keys[~self._target.contains(keys)], None)
        else:
            # What the target should say follows from the source's rows alone, so all of them are read.
            demanded = np.zeros_like(expected)
            places = {key: i for i, key in enumerate(key_list(keys))}
            self._copy(keys, lambda part: self._demand(part, places, demanded))
            expected = demanded
        bad = self._read_back(keys)
        if bad:  # of an earlier life of the target: the source has them right
            self._copy(key_array(bad), None, overwrite=True)
            bad = self._read_back(key_array(bad))
        held = self._target.stored_checksums(keys)
        differs = (held != expected).any(axis=1)
        differing = {*key_list(keys[differs]), *bad} - self._corrupt
        return SpaceMigration(
            self._name,
            self._target.recipe.fingerprint,
            len(keys),
            self._copied,
            self._nbytes,
            _digest(keys, expected),
            _digest(keys, held),
            sorted(self._corrupt),
            sorted(differing),
            self._source.damaged(),
        )

    def _read_back(self, keys: NDArray[np.uint8]) -> list[bytes]:
        """Return the keys of entries of the target that fail their checksums when they are read."""
        self._target.flush()
        tell = None if self._progress is None else self._tell
        return self._target.corrupt_among(keys[self._target.contains(keys)], tell)[0]

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(f"{self._name[:8]} check", done, total)

    # --- copying -----------------------------------------------------------------------------------------------------

    def _copy(self, keys: NDArray[np.uint8], seen: Callable[[_Part], None] | None, *, overwrite: bool = False) -> None:
        """Read entries and put them; the next parts are read, and the last segment is published, meanwhile."""
        parts = self._plan(keys)
        done, total = 0, len(keys)
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-migrate") as pool:
            coming: deque[Future[_Part]] = deque()
            waiting = iter(parts)
            try:
                while True:
                    coming.extend(
                        pool.submit(self._read, *part) for part in itertools.islice(waiting, 1 + _AHEAD - len(coming))
                    )
                    if not coming:
                        break
                    part = coming.popleft().result()
                    if seen is not None:
                        seen(part)
                    self._copied += self._target.put(part.keys, part.rows, overwrite=overwrite, **part.columns)
                    self._corrupt.update(part.corrupt)
                    self._nbytes += part.nbytes
                    done += len(part.keys) + len(part.corrupt)
                    if self._progress is not None:
                        self._progress(f"{self._name[:8]} copy", done, total)
            finally:
                for future in coming:
                    future.cancel()

    def _plan(self, keys: NDArray[np.uint8]) -> list[tuple[NDArray[np.uint8], tuple[str, ...]]]:
        """Return the entries in parts, as they lie, each with the names of the optional arrays that they have."""
        keys = self._source.in_order(keys)
        has = [self._source.has(name, keys) for name in _COLUMNS]
        kind = np.array([there.astype(np.int64) << i for i, there in enumerate(has)]).sum(axis=0)
        lengths = self._source.lengths(keys) * self._row_bytes
        parts = []
        for one in np.unique(kind).tolist():
            here = np.flatnonzero(kind == one)
            starts = offsets_of(lengths[here])
            cuts = np.searchsorted(starts, np.arange(0, int(starts[-1]), _PART_BYTES))
            names = tuple(name for i, name in enumerate(_COLUMNS) if one >> i & 1)
            edges = np.unique(np.r_[cuts, len(here)]).tolist()
            parts += [(keys[here[first:last]], names) for first, last in itertools.pairwise(edges)]
        return parts

    @property
    def _row_bytes(self) -> int:
        return codec.get(self._source.recipe.dtype).stored.itemsize * self._source.recipe.hidden_size

    def _read(self, keys: NDArray[np.uint8], names: tuple[str, ...]) -> _Part:
        """Read and verify entries; corrupt ones, and those that were deleted meanwhile, are left out."""
        corrupt: list[bytes] = []
        read = self._rows if set(names) <= {TOKEN_IDS} else self._entries
        while True:
            keys = keys[self._source.contains(keys)]
            try:
                return read(keys, names, corrupt)
            except CorruptEntryError as error:
                corrupt += error.keys
                bad = set(error.keys)
                keys = keys[[key not in bad for key in key_list(keys)]]

    def _rows(self, keys: NDArray[np.uint8], names: tuple[str, ...], corrupt: list[bytes]) -> _Part:
        """Read entries in one go."""
        recipe = self._source.recipe
        total = int(self._source.lengths(keys).sum())
        stored = codec.get(recipe.dtype)
        values = np.empty((total, recipe.hidden_size), stored.stored)
        ids = np.empty(total, np.int32) if names else None
        offsets = self._source.read_into(keys, values, token_ids=ids).offsets.tolist()
        cuts = list(itertools.pairwise(offsets))
        rows = stored.decode(values)
        columns = {} if ids is None else {TOKEN_IDS: [ids[first:last] for first, last in cuts]}
        return _Part(keys, [rows[first:last] for first, last in cuts], columns, corrupt, values.nbytes)

    def _entries(self, keys: NDArray[np.uint8], names: tuple[str, ...], corrupt: list[bytes]) -> _Part:
        """Read entries that have spans, word or type ids."""
        entries = [entry for entry in self._source.get(keys) if entry is not None]
        columns: dict[str, list[NDArray[Any]]] = {}
        for name in names:
            columns[name] = [e.extras[name] if name in EXTRAS else _ids(e.token_ids) for e in entries]
        rows = [entry.activations for entry in entries]
        return _Part(keys, rows, columns, corrupt, sum(map(len, rows)) * self._row_bytes)

    # --- what the target should hold ---------------------------------------------------------------------------------

    def _demand(self, part: _Part, places: dict[bytes, int], demanded: NDArray[np.uint64]) -> None:
        """Compute the checksums that the target should have for a part, by docs/format.md, from the source's rows."""
        for found, key in zip(self._checksums(part), key_list(part.keys), strict=True):
            demanded[places[key]] = found

    def _checksums(self, part: _Part) -> Iterator[tuple[int, int, int]]:
        extras = [name for name in sorted(EXTRAS) if name in part.columns]
        lengths = np.array([len(rows) for rows in part.rows], np.int64)
        seeds = checksum.entry_seeds(self._seed, part.keys, lengths, has_token_ids=TOKEN_IDS in part.columns)
        for i, (rows, seed) in enumerate(zip(part.rows, seeds.tolist(), strict=True)):
            main = [np.ascontiguousarray(part.columns[TOKEN_IDS][i], "<i4")] if TOKEN_IDS in part.columns else []
            more = [np.ascontiguousarray(part.columns[name][i], EXTRAS[name][0]) for name in extras]
            whole = np.array([0]), lengths[i : i + 1]
            (one,) = checksum.chain([seed], [*main, self._codec.stored_rows(rows)], *whole)
            (other,) = checksum.chain([one], more, *whole) if more else (0,)
            yield len(rows), one, other


def _ids(ids: NDArray[np.int32] | None) -> NDArray[np.int32]:
    if ids is None:
        raise DataError("an entry lost its token ids while it was read: run it again")
    return ids


def _digest(keys: NDArray[np.uint8], checksums: NDArray[np.uint64]) -> str:
    """Return the digest of sorted keys and their ``[n, 3]`` tokens and checksums."""
    entries = np.concatenate([keys, checksums.astype("<u8").view(np.uint8).reshape(len(keys), 24)], axis=1)
    return hashlib.blake2b(np.ascontiguousarray(entries).data, digest_size=16, person=b"actcache/migrate").hexdigest()
