"""A bound on the bytes that a fill's spaces take on the medium."""

from __future__ import annotations

import math
import threading
from collections.abc import MutableSequence, Sequence
from contextlib import AbstractContextManager

import numpy as np

from actcache.entries.entry import columns_of
from actcache.format.arguments import nbytes_of
from actcache.format.ragged import TOKEN_IDS, VALUES
from actcache.format.recipe import Recipe
from actcache.store.footprint import footprint_of
from actcache.store.space import Space
from actcache.store.store import Store

# What an entry may take beside its arrays: rounding up to a page (lmdb), key, offset, checksums, its line of the index.
_ENTRY_BYTES = 4096 + 256
RESERVE = 256 << 10  # a segment's own description, a page here and there
_BLOCK_BYTES = 1 << 20  # zarr pads a segment by less than a row for each of these
_UNKNOWN = -1

#: What the writers of one bound share: bytes measured last, then those promised by each of them; and a lock.
Shared = tuple[MutableSequence[int], AbstractContextManager[object]]


class ByteBudget:
    """Says how many entries one of the writers of a bound may still write. Not thread-safe.

    What lies on the medium is measured, as ``du`` counts it: what was replaced counts, too. What is promised since is
    counted from above, for all writers: so the bound holds, and measuring again after a flush tells how much of it is
    really left. It holds where nobody compacts meanwhile, nor merges small segments (``Space.merge_tiers``).

    Args:
        limit: bytes that the spaces take at most, or a size like ``"8GiB"``; a ``UsageError`` where it is neither.
        shared: with the other writers, each of which has a ``number``; in shared memory where they are processes.
    """

    def __init__(
        self, limit: int | str, store: Store, spaces: Sequence[Space], shared: Shared | None = None, number: int = 0
    ) -> None:
        self._store, self._names = store, [space.recipe.fingerprint for space in spaces]
        # Closing writes an index of all entries where there is none yet.
        reserve = RESERVE + 64 * sum(space.usage().entries for space in spaces)
        self._limit = nbytes_of("max_bytes", limit) - reserve
        self._numbers, self._lock = shared or ([0, 0], threading.Lock())
        self._own = 1 + number
        with self._lock:
            self._numbers[0] = _UNKNOWN

    def admit(self, sizes: Sequence[int]) -> int:
        """Promise to write as many things of these sizes, from the first on, as surely fit; return how many."""
        with self._lock:
            if self._numbers[0] == _UNKNOWN:
                self._numbers[0] = taken(self._store, self._names)
            left = self._limit - sum(self._numbers)
            count = int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), left, "right"))
            self._numbers[self._own] += sum(sizes[:count])
            return count

    def remeasure(self) -> None:
        """Measure anew, after a flush of all that this writer has promised."""
        with self._lock:
            self._numbers[0], self._numbers[self._own] = taken(self._store, self._names), 0


def taken(store: Store, fingerprints: Sequence[str]) -> int:
    """Return how many bytes some spaces of a store take, as ``du`` counts them."""
    found = footprint_of(store.driver.listing())
    return sum(found.of_space(name) for name in fingerprints)


def most_bytes(recipe: Recipe, extras: Sequence[str], tokens: int) -> int:
    """Return how many bytes an entry takes at most, on any backend."""
    columns = [columns_of(recipe)[name] for name in (VALUES, TOKEN_IDS, *extras)]
    row = sum(np.dtype(dtype).itemsize * math.prod(trailing) for dtype, trailing in columns)
    return math.ceil(tokens * row * (1 + row / _BLOCK_BYTES)) + _ENTRY_BYTES
