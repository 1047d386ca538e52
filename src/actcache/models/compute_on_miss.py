"""Documents that are computed and stored when a reader comes to them and they are missing."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format.keys import Document
from actcache.models.canary import Encoder
from actcache.models.filling import Filler
from actcache.models.lower_half import TOKEN_BUDGET
from actcache.models.processing import Made
from actcache.reader.epoch import MissComputer
from actcache.reader.labels import of_entries
from actcache.reader.reader import Reader
from actcache.store.document_entries import entry_keys, find_entries
from actcache.store.space import Space


class ComputeOnMiss:
    """What ``actcache.reader.epoch.MissComputer`` asks of a recycler, for some documents and the key of each.

    Attributes:
        keys: of all entries, in the order of the texts. Missing documents are tokenized to count their windows; where
            documents are cut into passages, ``keys`` and ``owners`` say it.
        documents: ``[entries]``, position of the text that each entry comes from.

    Raises:
        DocumentError, DocumentTooLongError: a document cannot be stored; it names its position.
    """

    def __init__(
        self,
        space: Space,
        filler: Filler,
        encoder: Encoder,
        texts: Sequence[Document],
        keys: list[bytes],
        owners: NDArray[np.int64] | None = None,
    ) -> None:
        self._space, self._filler, self._encoder, self._texts = space, filler, encoder, texts
        self._lengths: dict[int, list[int]] = {}  # of the windows of missing documents, tokenized to count them
        found = [[key] for key in keys]
        if encoder.windows is not None:
            found = find_entries(space, keys, encoder.windows)
            missing = [i for i, entries in enumerate(found) if not entries]
            self._lengths = self._tokenized(missing)
            for i in missing:
                found[i] = entry_keys(keys[i], len(self._lengths[i]), encoder.windows)
        counts = np.array([len(entries) for entries in found], np.int64)
        if owners is not None:
            counts = np.bincount(owners, minlength=len(texts))
        self.keys = list(itertools.chain.from_iterable(found))
        self.documents: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)
        self._numbers = np.arange(len(self.keys)) - np.repeat(np.cumsum(counts) - counts, counts)  # within its document

    def _tokenized(self, documents: list[int]) -> dict[int, list[int]]:
        """Return the tokens of each entry of some documents."""
        encoded: Sequence[Sequence[Made]] = self._encoder.encode([self._texts[i] for i in documents], documents)
        return {i: [one.length for one in entries] for i, entries in zip(documents, encoded, strict=True)}

    def lengths(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many tokens some of the entries have."""
        documents, numbers = self.documents[positions].tolist(), self._numbers[positions].tolist()
        others = self._tokenized([i for i in dict.fromkeys(documents) if i not in self._lengths])
        lengths = [(self._lengths.get(i) or others[i])[number] for i, number in zip(documents, numbers, strict=True)]
        return np.array(lengths, np.int64)

    def supply(self, positions: NDArray[np.int64], corrupt: Sequence[bytes]) -> None:
        """Compute and put what some of the entries come from; those that are corrupt in the place of what is stored."""
        if corrupt:
            self._space.delete(corrupt)
        documents = np.unique(self.documents[positions]).tolist()
        self._filler.supply([self._texts[i] for i in documents], documents, TOKEN_BUDGET)

    def reader(self, labels: Any, **options: Any) -> Reader:
        """Return a reader of all entries; see ``Recycler.reader``. Labels of passages are one a passage."""
        of_passages = labels is None or self._encoder.passages is not None
        return self._space.reader(
            self.keys,
            labels=labels if of_passages else of_entries(labels, self.documents, len(self._texts)),
            documents=self.documents,
            on_missing="compute",
            miss_computer=MissComputer(self.lengths, self.supply, self._space.flush, self._space.refresh),
            **options,
        )
