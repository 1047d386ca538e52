"""Batches whose entries come from two places: read apart, then put where they belong in one buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from actcache.format.keys import Keys
from actcache.format.ragged import offsets_of, row_indices
from actcache.format.recipe import Recipe
from actcache.reader.fetch import Source

Ids: TypeAlias = NDArray[np.int32] | None


@dataclass(frozen=True)
class Part:
    """Some entries of a batch, their rows one after another or anywhere else in an array."""

    which: NDArray[np.int64]  # positions in the batch
    rows: NDArray[Any]  # [R, hidden]
    ids: Ids  # [R]
    begins: NDArray[np.int64]  # of each entry, its first row


def flat(out: NDArray[Any], ids: Ids) -> tuple[NDArray[Any], Ids, int | None]:
    """Return the rows of a batch's buffers, and how many each entry is padded to; None where they are packed."""
    width = out.shape[1] if out.ndim == 3 else None
    return out.reshape(-1, out.shape[-1]), None if ids is None else ids.reshape(-1), width


def join(parts: Iterable[Part], lengths: NDArray[np.int64], out: NDArray[Any], ids: Ids) -> None:
    """Put the rows of all entries into a batch's buffers, packed or padded with zeros (see ``Space.read_into``).

    ``lengths``, ``[n]``, are of all entries; those of length 0 are in no part, or take no rows.
    """
    rows, flat_ids, width = flat(out, ids)
    firsts = offsets_of(lengths, width)
    if width is not None:
        for buffer in (rows, flat_ids):
            if buffer is not None:
                buffer[: firsts[-1]] = 0
    for part in parts:
        to, come_from = (row_indices(b, lengths[part.which], None) for b in (firsts[part.which], part.begins))
        rows[to] = part.rows[come_from]
        if flat_ids is not None and part.ids is not None:
            flat_ids[to] = part.ids[come_from]


class Wrapper:
    """Wraps a source, and passes on what a cache does not answer itself."""

    _source: Source

    @property
    def recipe(self) -> Recipe:
        return self._source.recipe

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]:
        return self._source.has(column, keys)

    def lengths(self, keys: Keys) -> NDArray[np.int64]:
        return self._source.lengths(keys)

    def checksums(self, keys: Keys) -> NDArray[np.uint64]:
        return self._source.checksums(keys)
