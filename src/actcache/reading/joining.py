"""Batches whose entries come from two places: read apart, then put where they belong in one buffer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.ragged import offsets_of, row_indices


@dataclass(frozen=True)
class Part:
    """Some entries of a batch, their rows one after another or anywhere else in an array."""

    which: NDArray[np.int64]  # positions in the batch
    rows: NDArray[Any]  # [R, hidden]
    ids: NDArray[np.int32] | None  # [R]
    begins: NDArray[np.int64]  # of each entry, its first row


def join(parts: Iterable[Part], lengths: NDArray[np.int64], out: NDArray[Any], ids: NDArray[np.int32] | None) -> None:
    """Put the rows of all entries into a batch's buffers, packed or padded with zeros (see ``Space.read_into``).

    Args:
        lengths: ``[n]``, of all entries; those of length 0 are in no part, or take no rows.
    """
    width = out.shape[1] if out.ndim == 3 else None
    rows, flat_ids = out.reshape(-1, out.shape[-1]), None if ids is None else ids.reshape(-1)
    if width is None:
        firsts = offsets_of(lengths)[:-1]
    else:
        firsts = np.arange(len(lengths), dtype=np.int64) * width
        rows[: len(lengths) * width] = 0
        if flat_ids is not None:
            flat_ids[: len(lengths) * width] = 0
    for part in parts:
        to, come_from = (row_indices(begins, lengths[part.which], None) for begins in (firsts[part.which], part.begins))
        rows[to] = part.rows[come_from]
        if flat_ids is not None and part.ids is not None:
            flat_ids[to] = part.ids[come_from]
