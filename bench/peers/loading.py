"""What all contestants deliver: the documents of a batch as one tensor, and their lengths."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, get_worker_info

#: ``[T, hidden]`` or ``[B, L, hidden]`` float16, and ``[B]`` int64.
Delivered = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Wanted:
    """How the batches should be."""

    batch: int  # documents
    hidden: int
    padded: bool
    persistent: bool  # whether a loader keeps its workers from one epoch to the next

    def collate(self, documents: Sequence[np.ndarray]) -> Delivered:
        """Join the rows of documents, each flat or ``[tokens, hidden]``."""
        rows = [document.reshape(-1, self.hidden) for document in documents]
        lengths = np.array([len(document) for document in rows], np.int64)
        longest = int(lengths.max())
        if not self.padded:
            out = _empty((int(lengths.sum()), self.hidden))
            np.concatenate(rows, out=out.numpy())
            return out, torch.from_numpy(lengths)
        out = _empty((len(rows), longest, self.hidden))
        array = out.numpy()
        for i, document in enumerate(rows):
            array[i, : len(document)] = document
            array[i, len(document) :] = 0
        return out, torch.from_numpy(lengths)

    def joined(self, flat: np.ndarray, lengths: np.ndarray) -> Delivered:
        """Return what is one array already: the rows of all documents, one after another, and their lengths."""
        rows = flat.reshape(-1, self.hidden)
        if self.padded:
            return self.collate(np.split(rows, np.cumsum(lengths)[:-1]))
        if get_worker_info() is not None:
            return self.collate([rows])[0], torch.from_numpy(lengths)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(rows), torch.from_numpy(lengths)


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """Return memory for a batch. A worker takes it from what it shares with the parent, as torch's own collate does."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.float16)
    storage = torch.UntypedStorage._new_shared(2 * int(np.prod(shape)))
    return torch.empty(0, dtype=torch.float16).set_(storage, 0, shape)  # type: ignore[call-overload]


@dataclass
class Loader:
    """A contestant that stands open.

    Attributes:
        epoch: number -> its batches, each document once, in an order of its own.
        close: releases everything.
    """

    epoch: Callable[[int], Iterable[Delivered]]
    close: Callable[[], None]


def torch_loader(dataset: Any, wanted: Wanted, workers: int, *, batched: bool, collate: Any) -> Loader:
    """Have torch's ``DataLoader`` shuffle a map-style data set.

    Args:
        batched: whether the data set is asked for a whole batch by ``dataset[[...]]``, without one in between; else for
            document after document, or by its ``__getitems__`` where it has that.
        collate: makes a batch of what the data set returns.
    """
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": collate}
    if workers and wanted.persistent:
        options["persistent_workers"] = True
    if batched:
        sampler = BatchSampler(RandomSampler(dataset), wanted.batch, drop_last=False)
        loaders = [DataLoader(dataset, batch_size=None, sampler=sampler, **options)]
    else:
        loaders = [DataLoader(dataset, batch_size=wanted.batch, shuffle=True, **options)]
    return Loader(lambda number: loaders[0], loaders.clear)
