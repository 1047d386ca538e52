"""Reading some entries of a space, or all, against their checksums, and taking their statistics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.report.statistics import Numbers, Statistics
from actcache.entries.entry import Entry
from actcache.errors import CorruptEntryError, UsageError
from actcache.format import codec
from actcache.format.keys import key_list
from actcache.format.ragged import offsets_of
from actcache.store.space import Space

#: Entries that are read where nobody says how many.
SAMPLE = 200

_PART_BYTES = 4 << 20  # of rows that are read at once


@dataclass(frozen=True)
class Sample:
    """Entries that were read: how many, of how many, which fail their checksums, and the statistics of the others."""

    entries: int
    of: int
    corrupt: list[bytes]
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        corrupt = [key.hex() for key in self.corrupt]
        return {"entries": self.entries, "of": self.of, "corrupt": corrupt, "statistics": self.statistics.to_json()}


def read_sample(
    space: Space,
    keys: NDArray[np.uint8],
    count: int | None = SAMPLE,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Sample:
    """Read entries that are drawn at random, in the order in which they lie.

    Args:
        keys: of those among which is drawn, ``[n, 32]``; all are there.
        count: how many are read at most; None for all.
        seed: the same one draws the same entries of the same keys.
        progress: told how many are read, and how many there are to read.

    Raises:
        UsageError: ``count`` or ``seed`` is negative.
        StorageIOError: the operating system refuses.
    """
    if (count is not None and count < 0) or seed < 0:
        raise UsageError(f"a sample has 0 or more entries and a seed of 0 or more, not {count} and {seed}")
    chosen = keys
    if count is not None and count < len(keys):
        chosen = keys[np.random.default_rng(seed).choice(len(keys), count, replace=False)]
    chosen = space.in_order(chosen)
    row_bytes = codec.get(space.recipe.dtype).stored.itemsize * space.recipe.hidden_size
    starts = offsets_of(space.lengths(chosen)) * row_bytes
    wanted = np.arange(0, int(starts[-1]), _PART_BYTES)
    cuts = np.unique(np.r_[np.searchsorted(starts, wanted), len(chosen)]).tolist()
    numbers, corrupt = Numbers(), []
    for first, last in itertools.pairwise(cuts):
        found, bad = read_intact(space, key_list(chosen[first:last]))
        corrupt += bad
        if found:
            numbers.add(np.concatenate([entry.activations for entry in found]))  # at once: most entries are short
        if progress is not None:
            progress(last, len(chosen))
    return Sample(len(chosen), len(keys), corrupt, numbers.statistics())


def read_intact(space: Space, keys: list[bytes]) -> tuple[list[Entry], list[bytes]]:
    """Return the entries that are intact, and the keys of those that are not; absent ones are neither."""
    corrupt: list[bytes] = []
    try:
        found = space.get(keys)
    except CorruptEntryError as error:
        corrupt = error.keys
        found = space.get([key for key in keys if key not in set(corrupt)])
    return [entry for entry in found if entry is not None], corrupt
