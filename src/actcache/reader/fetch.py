"""From keys to host buffers: one batch is looked up, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.backend import TOKEN_IDS
from actcache.entries.entry import OwnColumns
from actcache.errors import ShapeError
from actcache.format import codec
from actcache.format.columns import Schema
from actcache.format.keys import Keys
from actcache.format.recipe import Recipe
from actcache.io.buffers import BufferPool

_TRIES = 5  # each finds how long entries are by then


class Source(Protocol):
    """What a reader needs of a space; a wrapper that has it can stand in for one. All calls take keys in batches."""

    @property
    def recipe(self) -> Recipe: ...

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]: ...

    def lengths(self, keys: Keys) -> NDArray[np.int64]: ...

    def checksums(self, keys: Keys) -> NDArray[np.uint64]: ...

    def read_ahead(self, keys: Keys) -> bool: ...

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any: ...


class OwnSource(Source, Protocol):
    """A source that gives columns of the caller's own, too."""

    @property
    def schema(self) -> Schema | None: ...

    def read_columns(self, keys: Keys) -> OwnColumns: ...

    def scatter_into(
        self, keys: Keys, out: NDArray[Any], targets: NDArray[np.int64], *, token_ids: NDArray[np.int32] | None = None
    ) -> Any: ...


@dataclass(frozen=True)
class HostBatch:
    """What was read, in stored form. Absent entries have length 0."""

    values: NDArray[Any]  # [B, L, width], or packed [T, width]; see ``Codec.width``
    token_ids: NDArray[np.int32] | None  # [B, L] or [T]
    lengths: NDArray[np.int64]  # [B]


@dataclass(frozen=True)
class EntryInfo:
    """What was known of entries when a reader was made. They may have been replaced or deleted since."""

    lengths: NDArray[np.int64]  # [n], 0 where it was absent
    has_ids: NDArray[np.bool_]  # [n]
    complete: bool  # whether all are there, with their token ids

    @classmethod
    def of(cls, source: Source, keys: NDArray[np.uint8]) -> EntryInfo:
        lengths = source.lengths(keys)
        has_ids = source.has(TOKEN_IDS, keys) | (lengths == 0)
        return cls(lengths, has_ids, bool(lengths.all() and has_ids.all()))

    def __getitem__(self, members: NDArray[np.generic]) -> EntryInfo:
        lengths, has_ids = self.lengths[members], self.has_ids[members]
        return EntryInfo(lengths, has_ids, self.complete or bool(lengths.all() and has_ids.all()))


def fetch(
    source: Source,
    keys: NDArray[np.uint8],
    buffers: BufferPool,
    *,
    packed: bool,
    info: EntryInfo | None = None,
    id_buffers: BufferPool | None = None,
) -> HostBatch:
    """Read the entries of ``[B, 32]`` keys; ``info`` spares a look at their lengths, as long as it is right. Without
    ``id_buffers``, token ids are read into fresh memory.

    Raises:
        CorruptEntryError, StoreError, DataError: see ``Space.read_into``.
    """
    known = info if info is not None and info.complete else None
    left = _TRIES - (known is None)
    while True:
        try:
            read = _fetch(source, keys, buffers, id_buffers, known or EntryInfo.of(source, keys), packed=packed)
        except ShapeError:  # entries were replaced by longer ones between the looks at their lengths and at their rows
            if not left:
                raise
        else:
            if known is None or bool((read.lengths == known.lengths).all()):
                return read
            buffers.give_back(read.values, None)
        known, left = None, left - 1


def _fetch(
    source: Source,
    keys: NDArray[np.uint8],
    buffers: BufferPool,
    id_buffers: BufferPool | None,
    info: EntryInfo,
    *,
    packed: bool,
) -> HostBatch:
    recipe, lengths = source.recipe, info.lengths
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    shape = (total,) if packed else (len(keys), longest)
    kind = codec.get(recipe.dtype)
    values = buffers.take((*shape, kind.width(recipe.hidden_size)), kind.stored)
    make = np.empty if id_buffers is None else id_buffers.take
    ids: NDArray[np.int32] | None = make(shape, np.int32) if info.complete or info.has_ids.all() else None
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
