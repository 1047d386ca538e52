"""From keys to host buffers: one batch is looked up, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS
from actcache.errors import ShapeError
from actcache.format import codec
from actcache.format.keys import Keys
from actcache.format.recipe import Recipe

_LOOKS = 5


class Source(Protocol):
    """What a reader needs of a space; a wrapper that has it can stand in for one. All calls take keys in batches."""

    @property
    def recipe(self) -> Recipe: ...

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]: ...

    def lengths(self, keys: Keys) -> NDArray[np.int64]: ...

    def checksums(self, keys: Keys) -> NDArray[np.uint64]: ...

    def read_ahead(self, keys: Keys) -> None: ...

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any: ...


class Buffers(Protocol):
    """Where host buffers come from."""

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]: ...

    def give_back(self, array: NDArray[Any], copied: Any) -> None: ...


@dataclass(frozen=True)
class HostBatch:
    """What was read, in the stored dtype. Absent entries have length 0."""

    values: NDArray[Any]  # [B, L, hidden], or packed [T, hidden]
    token_ids: NDArray[np.int32] | None  # [B, L] or [T]
    lengths: NDArray[np.int64]  # [B]

    @property
    def packed(self) -> bool:
        return self.values.ndim == 2


@dataclass(frozen=True)
class EntryInfo:
    """What was known of entries when a reader was made. They may have been replaced or deleted since."""

    lengths: NDArray[np.int64]  # [n], 0 where it was absent
    has_ids: NDArray[np.bool_]  # [n]

    @classmethod
    def of(cls, source: Source, keys: NDArray[np.uint8]) -> EntryInfo:
        lengths = source.lengths(keys)
        return cls(lengths, source.has(TOKEN_IDS, keys) | (lengths == 0))

    def __getitem__(self, which: NDArray[np.generic]) -> EntryInfo:
        return EntryInfo(self.lengths[which], self.has_ids[which])


def fetch(
    source: Source, keys: NDArray[np.uint8], buffers: Buffers, *, packed: bool, info: EntryInfo | None = None
) -> HostBatch:
    """Read the entries of ``[B, 32]`` keys.

    Args:
        info: spares a look at their lengths, as long as it is right.

    Raises:
        CorruptEntryError, StoreError, DataError: see ``Space.read_into``.
    """
    if info is not None and info.lengths.all() and info.has_ids.all():
        try:
            read = _fetch(source, keys, buffers, info, packed=packed)
        except ShapeError:
            pass
        else:
            if np.array_equal(read.lengths, info.lengths):
                return read
            buffers.give_back(read.values, None)
    for _ in range(_LOOKS - 1):
        try:
            return _fetch(source, keys, buffers, EntryInfo.of(source, keys), packed=packed)
        except ShapeError:  # entries were replaced by longer ones between the looks at their lengths and at their rows
            continue
    return _fetch(source, keys, buffers, EntryInfo.of(source, keys), packed=packed)


def _fetch(source: Source, keys: NDArray[np.uint8], buffers: Buffers, info: EntryInfo, *, packed: bool) -> HostBatch:
    recipe, lengths = source.recipe, info.lengths
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    shape = (total,) if packed else (len(keys), longest)
    values = buffers.take((*shape, recipe.hidden_size), codec.get(recipe.dtype).stored)
    ids = np.empty(shape, np.int32) if info.has_ids.all() else None
    # What was read, not what was there a moment ago: entries are deleted and replaced meanwhile.
    try:
        lengths = source.read_into(keys, values, token_ids=ids).lengths
    except BaseException:
        buffers.give_back(values, None)
        raise
    if packed:
        total = int(lengths.sum())
        values, ids = values[:total], None if ids is None else ids[:total]
    return HostBatch(values, ids, lengths)
