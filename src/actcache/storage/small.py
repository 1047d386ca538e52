"""The small segments of one writer, which are merged on the way: sixteen of about one size into one, and so on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from actcache.backend import GRACE_SECONDS, VALUES
from actcache.errors import DataError, StoreError
from actcache.storage import compactor

if TYPE_CHECKING:
    from actcache.storage.space import SegmentedSpace

logger = logging.getLogger(__name__)

_AT_ONCE = 16
_BYTES = 16 << 20  # of rows; larger ones are not worth writing twice


class SmallSegments:
    """What a space object has published and may merge. Not thread-safe."""

    def __init__(self, space: SegmentedSpace) -> None:
        self._space = space
        dtype, trailing = space.columns[VALUES]
        self._most_tokens = _BYTES // (np.dtype(dtype).itemsize * int(np.prod(trailing)))
        self._tokens: dict[str, int] = {}  # of each segment

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, name: str, tokens: int) -> None:
        """Take note of a segment; merge what there is enough of.

        A failure is only logged: what was published is safe, in more segments than it need be.
        """
        if tokens > self._most_tokens:
            return
        self._tokens[name] = tokens
        alike = [other for other, size in self._tokens.items() if _tier(size) == _tier(tokens)]
        if len(alike) < _AT_ONCE:
            return
        for other in alike:
            del self._tokens[other]
        try:
            merged = compactor.merge_some(self._space, alike)
            compactor.remove_replaced(self._space, GRACE_SECONDS)
        except (StoreError, DataError, FileNotFoundError) as error:
            logger.warning("could not merge small segments of %s: %s", self._space.place.where, error)
            return
        for new, size in merged.items():
            self.add(new, size)


def _tier(tokens: int) -> int:
    """Return the order of magnitude of a segment, so that merging costs each row a few copies at most."""
    return max(tokens, 1).bit_length() // 4
