"""What export files hold: the ragged arrays of some entries, and what binds them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import checksum
from actcache.ragged import EXTRAS, TOKEN_IDS, VALUES
from actcache.recipe import Recipe

#: Of the files' metadata.
VERSION = "1"
VERSION_NAME, RECIPE_NAME = "actcache_export", "recipe"

PART_BYTES = 16 << 20  # of rows that are read at a time

#: The ragged arrays besides ``values``.
OPTIONAL = (TOKEN_IDS, *sorted(EXTRAS))


@dataclass(frozen=True)
class Sums:
    """Checksums of some entries, ``[n]`` uint64 each."""

    checksums: NDArray[np.uint64]
    extra_checksums: NDArray[np.uint64] | None  # None where there are no optional arrays


def sums_of(
    recipe: Recipe,
    keys: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: Mapping[str, NDArray[Any]],
) -> Sums:
    """Compute the checksums of entries (docs/format.md).

    Args:
        keys: ``[n, 32]``.
        begins, lengths: ``[n]``, which rows of the columns are each entry's.
        columns: the ragged arrays by name, C-contiguous, in stored form.
    """
    seed = checksum.space_seed(recipe.fingerprint, recipe.dtype, recipe.hidden_size)
    seeds = checksum.entry_seeds(seed, keys, lengths, has_token_ids=TOKEN_IDS in columns)
    main = [columns[name] for name in (TOKEN_IDS, VALUES) if name in columns]
    sums = checksum.chain(seeds.tolist(), main, begins, lengths)
    extras = [columns[name] for name in sorted(EXTRAS) if name in columns]
    more = np.array(checksum.chain(sums, extras, begins, lengths), np.uint64) if extras else None
    return Sums(np.array(sums, np.uint64), more)
