"""Copying a store into another one, and proving it: its spaces one after another, their blobs, and its collections."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import Progress, each_space, select_spaces, step_of
from actcache.backend import EXTRAS, OWN, TOKEN_IDS, VALUES, Block
from actcache.entries.entry import PackedEntries, columns_of
from actcache.entries.read import read_intact
from actcache.entries.writer import SEGMENT_BYTES
from actcache.errors import DataError, UsageError
from actcache.format import checksum, codec
from actcache.format.keys import key_array, key_list
from actcache.format.ragged import offsets_of, runs
from actcache.format.recipe import Recipe
from actcache.segments import registry
from actcache.store import stored_errors
from actcache.store.collection import Collection
from actcache.store.space import Space
from actcache.store.store import Store

_PIECE_BYTES = 32 << 20  # of rows that are read by one call
_COLUMNS = (TOKEN_IDS, *sorted((*EXTRAS, OWN)))
ERRORS = stored_errors.BLOB_NAME
_NOT_COPIED = {"recipe.json", "used.json", "pinned.json"}  # the target's space has its own

#: Keys, ``[n, 32]``, and the names of the optional arrays that all their entries have.
Selection = tuple[NDArray[np.uint8], tuple[str, ...]]


@dataclass(frozen=True)
class SpaceMigration:
    """What became of one space.

    The digests are BLAKE2b-128 over key, tokens and checksums of all entries of the source, sorted by key: what the
    target should hold, by the source's rows, and what it does hold, by its own checksums, which its bytes were read
    and compared with.
    """

    source: str  # fingerprint
    target: str  # the same, unless the dtype changed
    stored_as: str  # how the target stores rows, see ``Recipe.stored_as``
    via: list[str]  # dtypes that show in the target's rows, so that no recycler for the target's dtype finds them
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
    force: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
    progress: Progress | None = None,
) -> Migration:
    """Copy spaces, with their blobs, and collections into another store; run it again where it was interrupted.

    Memory: two segments, some tens of MiB for rows, and about 200 bytes an entry.

    Args:
        source: opened with ``mode="r"``, better, though nothing is written to it either way.
        dtype: how the target stores rows; None keeps each space's own. Another dtype is another recipe, and not always
            that of rows which were computed for it: see ``Recipe.stored_again``.
        force: whether rows that a codec has scaled before (``int8``, ...) may be stored as yet another lossy one.
        segment_bytes: of the target, see ``Store.space``.

    Raises:
        UsageError: a prefix fits no space, or two spaces would become one (see ``collisions``), or lossy rows would
            become lossy ones once more: nothing was copied; a row is too large for the dtype: what was copied before
            stays.
        StoreError: disk full, network, ...: likewise.
    """
    for collision in collisions(source, target.url, prefixes=prefixes, dtype=dtype):
        raise UsageError(f"{collision}: name one of them in prefixes, and give the other another target")

    if codec.is_name(dtype) and not force:
        for fingerprint in select_spaces(source, prefixes):
            with suppress(DataError):
                _check_loss(source.recipe(fingerprint), str(dtype))

    def copy(space: Space) -> SpaceMigration:
        with target.space(_recipe_for(space.recipe, dtype), segment_bytes=segment_bytes) as other:
            _copy_blobs(source, space, other)
            return _SpaceCopy(space, other, segment_bytes, progress).run()

    spaces, unreadable = each_space(source, prefixes, copy)
    collections = {name: _copy_collection(source, target, name) for name in source.collections()}
    return Migration(list(spaces.values()), unreadable, collections)


def collisions(
    source: Store, target: str | Path, *, prefixes: Sequence[str] = (), dtype: str | None = None
) -> list[str]:
    """Say which spaces would become one space of the target, a sentence for each; none where each gets its own.

    Their entries may be of other numbers, by the digits that one of them has lost, or by the batches that they were
    computed in. Which of the two stands in the target would depend on the order, and nothing would be equal to both.
    A space that stays where it is, because the store is its own target, meets nobody: it is what others become. The
    target is not opened, and may not be there.
    """
    in_place = _location(source.url) == _location(target)
    become: dict[Recipe, list[Recipe]] = {}
    for fingerprint in select_spaces(source, prefixes):
        with suppress(DataError):  # migrate leaves it out, and says so
            recipe = source.recipe(fingerprint)
            if recipe is not None and not (in_place and recipe == _recipe_for(recipe, dtype)):
                become.setdefault(_recipe_for(recipe, dtype), []).append(recipe)

    def label(recipe: Recipe) -> str:
        return f"{recipe.fingerprint[:12]} ({recipe.stored_as})"

    return [
        f"{' and '.join(map(label, recipes))} of {source.url} would become one space, {label(one)}"
        for one, recipes in become.items()
        if len(recipes) > 1
    ]


def _check_loss(recipe: Recipe | None, dtype: str) -> None:
    """Refuse to lose digits twice: a codec that scales rows takes those that were computed, not another one's."""
    if recipe is None or codec.base(dtype) == codec.base(recipe.dtype) or codec.get(dtype).rounds_alone:
        return
    if lossy := [one for one in (*recipe.via, recipe.dtype) if not codec.get(one).rounds_alone]:
        raise UsageError(
            f"space {recipe.fingerprint[:12]} is {recipe.stored_as}, and {dtype} would take digits from what "
            f"{lossy[-1]} has left: migrate a space of floats, or force it (--force)"
        )


def _location(url: str | Path) -> str:
    return registry.parse(str(registry.resolve(url)))[1]


def _recipe_for(recipe: Recipe, dtype: str | None) -> Recipe:
    return recipe if dtype is None else recipe.stored_again(dtype)


def _copy_blobs(store: Store, source: Space, target: Space) -> None:
    for path in store.driver.blobs(f"spaces/{source.recipe.fingerprint}"):
        name = path.rpartition("/")[2]
        foreign = name == ERRORS and source.recipe != target.recipe  # measured for another codec
        data = source.blob(name) if name not in _NOT_COPIED and not foreign else None
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


class _SpaceCopy:
    """Copies one space into another: reads, publishes and reads back, each a segment behind the other."""

    def __init__(self, source: Space, target: Space, segment_bytes: int, progress: Progress | None) -> None:
        self._source, self._target = source, target
        self._parts = _PartReader(source, target.recipe, segment_bytes)
        name = source.recipe.fingerprint[:8]
        self._tell_copied, self._tell_checked = step_of(progress, f"{name} copy"), step_of(progress, f"{name} check")
        self._corrupt: set[bytes] = set()
        self._copied = self._nbytes = 0

    def run(self) -> SpaceMigration:
        keys = self._source.key_array()  # sorted
        expected = self._source.stored_checksums(keys)
        there = self._target.contains(keys)
        if self._parts.same:
            bad = self._copy(keys[~there])
        else:
            # What the target should say follows from the source's rows alone, so all of them are read.
            demanded = np.zeros_like(expected)
            places = {key: i for i, key in enumerate(key_list(keys))}

            def demand(part: _Part) -> None:
                demanded[[places[key] for key in key_list(part.keys)]] = part.demanded

            bad = self._copy(keys, demand)
            expected = demanded
        bad += self._read_back(keys[there])
        if bad:  # of an earlier life of the target: the source has them right
            self._copy(key_array(bad), overwrite=True)
            bad = self._read_back(key_array(bad))
        held = self._target.stored_checksums(keys)
        differs = (held != expected).any(axis=1)
        differing = {*key_list(keys[differs]), *bad} - self._corrupt
        return SpaceMigration(
            source=self._source.recipe.fingerprint,
            target=self._target.recipe.fingerprint,
            stored_as=self._target.recipe.stored_as,
            via=list(self._target.recipe.via),
            entries=len(keys),
            copied=self._copied,
            nbytes=self._nbytes,
            digest=_digest(keys, expected),
            target_digest=_digest(keys, held),
            corrupt=sorted(self._corrupt),
            differing=sorted(differing),
            damaged=self._source.damaged(),
        )

    def _declare_columns(self) -> None:
        """Have the target's own columns be the source's; ``UsageError`` where it has others."""
        schema = self._source.schema
        if schema is not None and (found := self._target.declare(schema)) != schema:
            raise UsageError(
                f"the target has other columns of its own ({', '.join(found.names)}) than the source "
                f"({', '.join(schema.names)}): migrate to a store of its own"
            )

    def _read_back(self, keys: NDArray[np.uint8]) -> list[bytes]:
        """Return which entries of the target fail their checksums when they are read."""
        return self._target.corrupt_among(keys[self._target.contains(keys)], self._tell_checked)[0]

    def _copy(
        self, keys: NDArray[np.uint8], seen: Callable[[_Part], None] | None = None, *, overwrite: bool = False
    ) -> list[bytes]:
        """Read entries, publish those that the target has not, read these back; return the keys of what fails that."""
        waiting, done = iter(self._parts.select(keys)), 0
        self._declare_columns()
        checks: list[Future[tuple[list[bytes], int]]] = []
        with (
            ThreadPoolExecutor(1, thread_name_prefix="actcache-migrate") as reading,
            ThreadPoolExecutor(1, thread_name_prefix="actcache-proof") as checking,
        ):
            coming = self._next(reading, waiting)
            try:
                while coming is not None:
                    part = coming.result()
                    coming = self._next(reading, waiting)
                    if seen is not None:
                        seen(part)
                    self._corrupt.update(part.corrupt)
                    self._nbytes += part.nbytes
                    done += len(part.keys) + len(part.corrupt)
                    if not overwrite:
                        part = part.only(~self._target.contains(part.keys))
                    if len(part.keys):
                        self._target.put_block(part.block())
                        checks.append(checking.submit(self._target.corrupt_among, part.keys))
                    self._copied += len(part.keys)
                    if self._tell_copied is not None:
                        self._tell_copied(done, len(keys))
                    del part  # two are in memory, not three
                return [key for check in checks for key in check.result()[0]]
            finally:
                for future in (coming, *checks):
                    if future is not None:
                        future.cancel()

    def _next(self, pool: ThreadPoolExecutor, waiting: Iterator[Selection]) -> Future[_Part] | None:
        following = next(waiting, None)
        return None if following is None else pool.submit(self._parts.read, *following)


def _digest(keys: NDArray[np.uint8], checksums: NDArray[np.uint64]) -> str:
    """Return the digest of sorted keys and their ``[n, 3]`` tokens and checksums."""
    entries = np.concatenate([keys, checksums.astype("<u8").view(np.uint8).reshape(len(keys), 24)], axis=1)
    return hashlib.blake2b(np.ascontiguousarray(entries).data, digest_size=16, person=b"actcache/migrate").hexdigest()


# --- reading a space in parts, each of which becomes a segment of another space ---------------------------------------


@dataclass(frozen=True)
class _Part:
    """Some entries as the target stores them, all with the same optional arrays."""

    keys: NDArray[np.uint8]  # [n, 32]
    lengths: NDArray[np.int64]  # [n]
    columns: dict[str, NDArray[Any]]
    demanded: NDArray[np.uint64]  # [n, 3] what the target should say of each entry, as ``stored_checksums`` puts it
    corrupt: list[bytes]  # keys that are left out
    nbytes: int  # of rows that were read

    def only(self, which: NDArray[np.bool_]) -> _Part:
        """Return a part without the other entries; itself where there are none."""
        if which.all():
            return self
        rows = np.repeat(which, self.lengths)
        columns = {name: column[rows] for name, column in self.columns.items()}
        keys, lengths, demanded = self.keys[which], self.lengths[which], self.demanded[which]
        return replace(self, keys=keys, lengths=lengths, columns=columns, demanded=demanded)

    def block(self) -> Block:
        more = np.ascontiguousarray(self.demanded[:, 2]) if self.columns.keys() - {VALUES, TOKEN_IDS} else None
        sums = np.ascontiguousarray(self.demanded[:, 1])
        return Block(self.keys, offsets_of(self.lengths), sums, self.columns, more)


class _PartReader:
    """Reads entries of ``source`` as a space of ``recipe`` stores them. Thread-safe."""

    def __init__(self, source: Space, recipe: Recipe, segment_bytes: int) -> None:
        self.same = source.recipe.fingerprint == recipe.fingerprint  #: whether entries have the same checksums
        self._source = source
        self._segment_bytes = segment_bytes
        self._from, self._to = codec.get(source.recipe.dtype), codec.get(recipe.dtype)
        self._columns, self._row_bytes = {**source.ragged, **columns_of(recipe)}, recipe.row_bytes
        self._seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)

    def select(self, keys: NDArray[np.uint8]) -> list[Selection]:
        """Return the entries as they lie, cut into segments, each with the names of the optional arrays they have."""
        keys = self._source.in_order(keys)
        has = [self._source.has(name, keys) for name in _COLUMNS]
        kind = np.array([there.astype(np.int64) << i for i, there in enumerate(has)]).sum(axis=0)
        parts = []
        for one in np.unique(kind).tolist():
            names, some = tuple(name for i, name in enumerate(_COLUMNS) if one >> i & 1), keys[kind == one]
            sizes = self._source.lengths(some) * self._row_bytes
            parts += [(some[run], names) for run in runs(sizes, self._segment_bytes)]
        return parts

    def read(self, keys: NDArray[np.uint8], names: tuple[str, ...]) -> _Part:
        """Read and verify entries; corrupt ones, and those that were deleted meanwhile, are left out."""
        sizes, corrupt = self._source.lengths(keys), list[bytes]()
        total = int(sizes.sum())
        forms = {name: self._columns[name] for name in (VALUES, *names)}
        columns = {name: np.empty((total, *trailing), dtype) for name, (dtype, trailing) in forms.items()}
        kept, lengths, end = [keys[:0]], [np.empty(0, np.int64)], 0
        for run in runs(sizes * self._source.recipe.row_bytes, _PIECE_BYTES):
            packed, some, bad = read_intact(self._source.read_packed, keys[run])
            corrupt += bad
            begin, end = end, end + int(packed.lengths.sum())
            if end > total:
                raise DataError("entries of the source were replaced while they were read: run it again")
            if begin == end:
                continue
            for name in names:
                if name not in packed.has or not packed.has[name][packed.found].all():
                    raise DataError(f"an entry lost its {name} while it was read: run it again")
                columns[name][begin:end] = packed.columns[name]
            self._convert(some, packed, columns[VALUES][begin:end])
            kept.append(some[packed.found])
            lengths.append(packed.lengths[packed.found])
        columns = {name: column[:end] for name, column in columns.items()}
        return self._part(np.concatenate(kept), np.concatenate(lengths), columns, corrupt)

    def _convert(self, keys: NDArray[np.uint8], packed: PackedEntries, out: NDArray[Any]) -> None:
        """Convert rows to the target's dtype, entry by entry, so that an error names the document."""
        rows = packed.columns[VALUES]
        if self._from.form == self._to.form:
            out[:] = rows
            return
        rows = self._from.decode(rows)
        for key, (begin, end) in zip(key_list(keys), itertools.pairwise(packed.offsets.tolist()), strict=True):
            self._to.encode(rows[begin:end], out[begin:end], what=f"document {key.hex()}")

    def _part(
        self, keys: NDArray[np.uint8], lengths: NDArray[np.int64], columns: dict[str, NDArray[Any]], bad: list[bytes]
    ) -> _Part:
        """Return a part with the checksums that the target should have.

        Of an equal recipe they are the source's, with which the rows were compared just now; else they are computed
        from the source's rows, by docs/format.md.
        """
        offsets = offsets_of(lengths)
        if self.same:
            demanded = self._source.stored_checksums(keys)
        else:
            sums, more = checksum.entry_checksums(self._seed, keys, offsets[:-1], lengths, columns)
            rest = np.zeros_like(sums) if more is None else more
            demanded = np.stack([lengths.astype(np.uint64), sums, rest], axis=1)
        nbytes = int(offsets[-1]) * self._source.recipe.row_bytes
        return _Part(keys, lengths, columns, demanded, bad, nbytes)
