"""The snapshot of a space that nobody has written to yet, opened for reading."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from actcache.backend import EntryLocations, Snapshot, Usage


class EmptySnapshot(Snapshot):
    """See ``Snapshot``. Stateless."""

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        zeros = np.zeros(len(keys), np.int64)
        return EntryLocations(zeros, zeros.astype(np.uint64), zeros, zeros)

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        return np.zeros(len(located.tokens), bool)

    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        return np.zeros(len(located.tokens), np.uint64)

    def gather(
        self,
        located: EntryLocations,
        out: Mapping[str, NDArray[np.generic]],
        width: int | None,
        done: Callable[[int, int], None],
    ) -> None:
        for buffer in out.values():
            buffer[: len(located.tokens) * (width or 0)] = 0
        done(0, len(located.tokens))

    def read_ahead(self, located: EntryLocations) -> None:
        """Do nothing."""

    def keys(self) -> NDArray[np.uint8]:
        return np.empty((0, 32), np.uint8)

    def usage(self) -> Usage:
        return Usage(0, 0, 0, 0)

    def damaged(self) -> dict[str, str]:
        return {}
