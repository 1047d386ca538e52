"""Ragged blocks: the rows of many entries, one after another, and where each begins.

The one schema that every backend stores (docs/format.md). All arrays of ``columns`` have T rows; entry i is rows
``offsets[i]:offsets[i + 1]`` of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError

VALUES = "values"
TOKEN_IDS = "token_ids"

#: The optional ragged arrays: name -> (dtype, trailing shape). Labels cannot be aligned without them.
EXTRAS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "spans": ("<i4", (2,)),  # character span of each token in its text, [start, end)
    "word_ids": ("<i4", ()),  # number of the word each token belongs to, -1 for special tokens
    "type_ids": ("|i1", ()),  # token type ids, 1 for the second text of a pair
}


@dataclass(frozen=True)
class Block:
    """Entries in stored form. ``columns`` always has ``values`` [T, hidden] in the stored dtype.

    ``checksums`` binds values, token ids and key (``actcache.checksum``); ``extra_checksums`` the optional arrays, and
    is None where there are none.
    """

    keys: NDArray[np.uint8]  # [n, 32]
    offsets: NDArray[np.int64]  # [n + 1]
    checksums: NDArray[np.uint64]  # [n]
    columns: Mapping[str, NDArray[np.generic]]
    extra_checksums: NDArray[np.uint64] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return all arrays by their stored names, ``values`` first."""
        arrays = {VALUES: self.columns[VALUES], "offsets": self.offsets, "keys": self.keys, "checksums": self.checksums}
        if self.extra_checksums is not None:
            arrays["extra_checksums"] = self.extra_checksums
        return arrays | {name: column for name, column in self.columns.items() if name != VALUES}


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``[n + 1]`` offsets from ``[n]`` lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def check_offsets(offsets: NDArray[np.int64], entries: int, tokens: int, where: str) -> None:
    """Refuse offsets that do not cut ``tokens`` rows into ``entries`` entries of one row or more.

    Raises:
        FormatError: naming ``where``.
    """
    good = (
        len(offsets) == entries + 1 and offsets[0] == 0 and offsets[-1] == tokens and bool((np.diff(offsets) > 0).all())
    )
    if not good:
        raise FormatError(f"{where}: its offsets do not cut {tokens} rows into {entries} entries")


def row_indices(starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int | None) -> NDArray[np.int64]:
    """Return the source row of every row of a batch; row 0 stands for padding.

    Args:
        starts: ``[n]`` first source row of each entry.
        lengths: ``[n]`` rows of each entry.
        width: None for packed rows, ``[sum(lengths)]``; else each entry is padded to ``width``, ``[n * width]``.
    """
    if width is None:
        offsets = offsets_of(lengths)
        return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    column = np.arange(width)
    return np.where(column < lengths[:, None], starts[:, None] + column, 0).reshape(-1)
