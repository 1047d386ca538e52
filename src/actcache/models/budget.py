"""A bound on the bytes that a fill's spaces take on the medium."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, MutableSequence, Sequence
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


class Account:
    """What the writers of one bound have on the medium, and have promised to write. Thread-safe by its ``lock``.

    Args:
        numbers: bytes measured last, then those promised by each writer; shared memory where writers are processes.
        lock: over them.
    """

    def __init__(self, numbers: MutableSequence[int], lock: AbstractContextManager[object]) -> None:
        self._numbers, self.lock = numbers, lock
        numbers[0] = _UNKNOWN

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._numbers[0] != _UNKNOWN

    @property
    def total(self) -> int:
        """Bytes at most, when all is written that is promised."""
        return sum(self._numbers)

    def promise(self, writer: int, nbytes: int) -> None:
        self._numbers[1 + writer] += nbytes

    def measured(self, nbytes: int, writer: int | None = None) -> None:
        """Take note of what lies on the medium, after all that ``writer`` had promised."""
        self._numbers[0] = nbytes
        if writer is not None:
            self._numbers[1 + writer] = 0


class ByteBudget:
    """Says how many entries may still be written. Not thread-safe.

    What lies on the medium is measured, what is promised since is counted from above, for all writers of the account:
    so the bound holds, and measuring again after a flush tells how much of it is really left.

    Args:
        limit: bytes.
        measure: returns how many bytes lie on the medium.
        number: of this writer in the account.
    """

    def __init__(self, limit: int, measure: Callable[[], int], account: Account | None = None, number: int = 0) -> None:
        self._limit, self._measure = limit, measure
        self._account, self._number = account or Account([0, 0], threading.Lock()), number

    @classmethod
    def of(
        cls, limit: int | str, store: Store, spaces: Sequence[Space], account: Account | None = None, number: int = 0
    ) -> ByteBudget:
        """Return the budget of some spaces of a store, as ``du`` counts their bytes: what was replaced counts, too.

        It holds where nobody compacts them meanwhile, nor merges small segments (``Space.merge_tiers``).

        Args:
            limit: bytes, or a size like ``"8GiB"``.

        Raises:
            UsageError: ``limit`` is neither.
        """
        names = [space.recipe.fingerprint for space in spaces]
        # Closing writes an index of all entries where there is none yet.
        reserve = RESERVE + 64 * sum(space.usage().entries for space in spaces)
        return cls(nbytes_of("max_bytes", limit) - reserve, lambda: taken(store, names), account, number)

    def admit(self, sizes: Sequence[int]) -> int:
        """Promise to write as many things of these sizes, from the first on, as surely fit; return how many."""
        account = self._account
        with account.lock:
            if not account.known:
                account.measured(self._measure())
            left = self._limit - account.total
            count = int(np.searchsorted(np.cumsum(sizes, dtype=np.int64), left, "right"))
            account.promise(self._number, sum(sizes[:count]))
            return count

    def remeasure(self) -> None:
        """Measure anew, after a flush of all that this writer has promised."""
        with self._account.lock:
            self._account.measured(self._measure(), self._number)


def taken(store: Store, fingerprints: Sequence[str]) -> int:
    """Return how many bytes some spaces of a store take, as ``du`` counts them."""
    found = footprint_of(store.driver.listing())
    return sum(found.of_space(name) for name in fingerprints)


def most_bytes(recipe: Recipe, extras: Sequence[str], tokens: int) -> int:
    """Return how many bytes an entry takes at most, on any backend."""
    columns = columns_of(recipe)
    row = sum(_itemsize(columns[name]) for name in (VALUES, TOKEN_IDS, *extras))
    return math.ceil(tokens * row * (1 + row / _BLOCK_BYTES)) + _ENTRY_BYTES


def _itemsize(column: tuple[str, tuple[int, ...]]) -> int:
    dtype, trailing = column
    return np.dtype(dtype).itemsize * math.prod(trailing)
