"""Documents that are computed on the way: when a reader comes to them and they are not stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from actcache.key import Document
from actcache.models.filling import TOKEN_BUDGET, Filler
from actcache.models.tokenizing import DocumentEncoder
from actcache.space import Space


class OnTheWay:
    """What ``actcache.reading.epoch.Supplier`` asks of a recycler.

    Args:
        prepare: called once, before the first document is computed.
    """

    def __init__(
        self,
        space: Space,
        filler: Filler,
        encoder: DocumentEncoder,
        texts: Sequence[Document],
        prepare: Callable[[], None],
    ) -> None:
        self._space, self._filler, self._encoder, self._texts = space, filler, encoder, texts
        self._prepare = prepare
        self._prepared = False

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens some of the texts have."""
        encoded = self._encoder.encode([self._texts[i] for i in positions], positions.tolist())
        return np.array([sum(len(entry.token_ids) for entry in entries) for entries in encoded], np.int64)

    def supply(self, positions: NDArray[np.int64], corrupt: Sequence[bytes]) -> None:
        """Compute and put some of the texts; those that are corrupt in the place of what is stored."""
        if not self._prepared:
            self._prepare()
            self._prepared = True
        if corrupt:
            self._space.delete(corrupt)
        self._filler.supply([self._texts[i] for i in positions], positions.tolist(), TOKEN_BUDGET)
