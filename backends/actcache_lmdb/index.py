"""The heads of a snapshot in memory, for whoever looks up more keys than it would take to read them all."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from actcache_lmdb.record import HEAD, KEY_BYTES

_KEPT = np.dtype(
    [("id", "<u8"), ("page", "<u8"), ("checksum", "<u8"), ("tokens", "<u4"), ("columns", "u1"), ("rest", "V24")]
)


class HeadIndex:
    """Live heads by key, 61 bytes each. Immutable, thread-safe.

    Args:
        steps: records of live heads, each key once, in the order of their bytes.
    """

    def __init__(self, steps: Iterable[NDArray[np.void]]) -> None:
        prefixes, kept = [np.zeros(0, np.uint64)], [np.zeros(0, _KEPT)]
        for records in steps:
            keys = np.ascontiguousarray(records["key"])
            part = np.zeros(len(records), _KEPT)
            for name in ("id", "page", "checksum", "tokens", "columns"):
                part[name] = records["head"][name]
            part["rest"] = np.ascontiguousarray(keys[:, 8:]).view("V24").reshape(-1)
            prefixes.append(_prefixes(keys))
            kept.append(part)
        self._prefix, self._kept = np.concatenate(prefixes), np.concatenate(kept)
        # Among equal prefixes a look-up would have to try each; nearly never is there any.
        self.usable = bool((self._prefix[1:] != self._prefix[:-1]).all())

    def find(self, keys: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return the head of each of ``[n, 32]`` keys; zeros where it has none. ``age`` and ``extra`` are always 0."""
        heads = np.zeros(len(keys), HEAD)
        if not len(self._prefix):
            return heads
        wanted = _prefixes(keys)
        order = np.argsort(wanted)  # neighbours in the query are neighbours in the index
        place = np.empty(len(keys), np.int64)
        place[order] = np.minimum(np.searchsorted(self._prefix, wanted[order]), len(self._prefix) - 1)
        found = self._kept[place]
        rest = np.ascontiguousarray(found["rest"]).view(np.uint8).reshape(-1, KEY_BYTES - 8)
        same = (self._prefix[place] == wanted) & (rest == keys[:, 8:]).all(axis=1)
        for name in ("id", "page", "checksum", "tokens", "columns"):
            heads[name] = np.where(same, found[name], 0)
        return heads


def _prefixes(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    first: NDArray[np.uint64] = np.ascontiguousarray(keys[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    return first
