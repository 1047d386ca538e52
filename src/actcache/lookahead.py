"""Look-ups that serve twice: a reader asks for a batch ahead, and reads it a little later."""

from __future__ import annotations

import weakref
from collections import deque

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import Located, Snapshot

_KEPT = 8  # a few batches ahead of each of several readers


class Lookahead:
    """Remembers where the entries of some batches lie, as long as the snapshot is the same. Thread-safe."""

    def __init__(self) -> None:
        self._kept: deque[tuple[bytes, weakref.ref[Snapshot], Located]] = deque(maxlen=_KEPT)

    def ask(self, snapshot: Snapshot, keys: NDArray[np.uint8]) -> None:
        """Look ``[n, 32]`` keys up, remember it, and have the snapshot read ahead."""
        located = self.locate(snapshot, keys)
        self._kept.append((_name(keys), weakref.ref(snapshot), located))
        snapshot.read_ahead(located)

    def locate(self, snapshot: Snapshot, keys: NDArray[np.uint8]) -> Located:
        """Return where these keys' entries lie; what was asked for ahead is not looked up again."""
        if self._kept:
            name = _name(keys)
            for kept, of, located in tuple(self._kept):
                if kept == name and of() is snapshot:
                    return located
        return snapshot.locate(keys)


def _name(keys: NDArray[np.uint8]) -> bytes:
    return xxhash.xxh3_128_digest(keys.data)
