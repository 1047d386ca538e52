"""Entries as a map-style data set, for ``torch.utils.data.DataLoader`` and the Hugging Face ``Trainer``.

A loader that knows ``__getitems__`` (torch 2 and later) asks for all documents of a batch at once, and gets them by one
batched read; no workers are needed. With workers, each reads for itself: what travels to it is the store's URL.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from actcache.batch import Batch
from actcache.reading.delivery import HostDelivery
from actcache.reading.epoch import Work, read_batch


class EntryDataset:
    """The documents of a reader, by position. Made by ``Reader.dataset``. Items are batches of one document.

    Give a loader ``collate_fn=dataset.collate`` (the ``Trainer``: ``data_collator=dataset.collate``): batches are then
    the keyword arguments of a reduced model's ``forward``, as torch tensors of the CPU, padded.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._delivery: HostDelivery | None = None

    def __len__(self) -> int:
        return len(self._work.keys)

    def __getitem__(self, position: int) -> Batch:
        position = operator.index(position)
        if not -len(self) <= position < len(self):
            raise IndexError(f"position {position} of {len(self)} documents")
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Batch]:
        """Return one batch of these documents, in a list, since a loader expects one."""
        import torch  # who uses a loader has it

        if self._delivery is None:
            self._delivery = HostDelivery(self._work.source.recipe.dtype, torch, packed=False, depth=2)
        which = np.asarray(positions, np.int64)
        batch = read_batch(self._work, self._delivery, which).batch
        assert isinstance(batch, Batch)
        return [batch]

    @staticmethod
    def collate(batches: list[Batch]) -> dict[str, Any]:
        """Return the keyword arguments of a reduced model for what ``__getitems__`` returned.

        Raises:
            ValueError: the loader asked for the documents one by one; take one that knows ``__getitems__``.
        """
        if len(batches) != 1:
            raise ValueError("this loader reads documents one by one; use torch 2 or later, or iterate over the reader")
        return batches[0].model_inputs()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_delivery": None}
