"""Look-ups that serve several times: a reader asks for a batch ahead, and for its checksums, and then reads it."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import Located, Snapshot

_KEPT = 8  # a few batches ahead of each of several readers
_MOST_KEYS = 1 << 16  # of a batch; more than that is a whole corpus, which is looked up once


class Lookahead:
    """Remembers where the entries of the last batches lie, as long as the snapshot is the same. Thread-safe."""

    def __init__(self) -> None:
        self._kept: deque[tuple[bytes, weakref.ref[Snapshot], Located]] = deque(maxlen=_KEPT)

    def locate(self, snapshot: Snapshot, keys: NDArray[np.uint8]) -> Located:
        """Return where the entries of ``[n, 32]`` keys lie."""
        if len(keys) > _MOST_KEYS:
            return snapshot.locate(keys)
        name = xxhash.xxh3_128_digest(keys.data)
        for kept, of, located in tuple(self._kept):
            if kept == name and of() is snapshot:
                return located
        located = snapshot.locate(keys)
        self._kept.append((name, weakref.ref(snapshot), located))
        return located
