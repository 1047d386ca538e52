"""Documents that are computed on the way: when a reader comes to them and they are not stored."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format.keys import Document
from actcache.models.filling import TOKEN_BUDGET, Filler
from actcache.models.tokenizing import DocumentEncoder
from actcache.reader.epoch import MissComputer
from actcache.reader.labels import of_entries
from actcache.reader.reader import Reader
from actcache.store.document_entries import entry_keys, find_entries
from actcache.store.space import Space


class ComputeOnMiss:
    """What ``actcache.reader.epoch.MissComputer`` asks of a recycler.

    Args:
        texts, keys: the documents, and the key of each.

    Attributes:
        keys: of all entries, in the order of the texts. How many windows a document that is missing has is found out by
            tokenizing it.
        documents: ``[entries]``, position of the text that each entry comes from.

    Raises:
        DocumentError, DocumentTooLongError: a document cannot be stored; it names its position.
    """

    def __init__(
        self,
        space: Space,
        filler: Filler,
        encoder: DocumentEncoder,
        texts: Sequence[Document],
        keys: list[bytes],
    ) -> None:
        self._space, self._filler, self._encoder, self._texts = space, filler, encoder, texts
        found = [[key] for key in keys]
        if encoder.windows is not None:
            found = find_entries(space, keys, encoder.windows)
            missing = [i for i, entries in enumerate(found) if not entries]
            for i, entries in zip(missing, encoder.encode([texts[i] for i in missing], missing), strict=True):
                found[i] = entry_keys(keys[i], len(entries), encoder.windows)
        counts = np.array([len(entries) for entries in found], np.int64)
        self.keys = list(itertools.chain.from_iterable(found))
        self.documents: NDArray[np.int64] = np.repeat(np.arange(len(keys)), counts)
        self._numbers = np.arange(len(self.keys)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its document

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens some of the entries have."""
        documents, which = np.unique(self.documents[positions], return_inverse=True)
        encoded = self._encoder.encode([self._texts[i] for i in documents], documents.tolist())
        numbers = self._numbers[positions].tolist()
        return np.array([len(encoded[i][n].token_ids) for i, n in zip(which.tolist(), numbers, strict=True)], np.int64)

    def supply(self, positions: NDArray[np.int64], corrupt: Sequence[bytes]) -> None:
        """Compute and put what some of the entries come from; those that are corrupt in the place of what is stored."""
        if corrupt:
            self._space.delete(corrupt)
        documents = np.unique(self.documents[positions]).tolist()
        self._filler.supply([self._texts[i] for i in documents], documents, TOKEN_BUDGET)

    def reader(self, labels: Any, **options: Any) -> Reader:
        """Return a reader of all entries; see ``Recycler.reader``."""
        return self._space.reader(
            self.keys,
            labels=None if labels is None else of_entries(labels, self.documents, len(self._texts)),
            documents=self.documents,
            on_missing="compute",
            supplier=MissComputer(self.lengths, self.supply, self._space.flush),
            **options,
        )
