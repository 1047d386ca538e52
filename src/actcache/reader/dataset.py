"""Entries as data sets of torch, for ``torch.utils.data.DataLoader``, the Hugging Face ``Trainer`` and others.

Map-style: an item only says which document it is. ``collate``, which loaders call with the items of a batch, reads all
of them by one batched read, with any sampler, also in a loader's workers, to which the store's URL travels. Iterable:
the batches of the reader itself. Imported only where a data set is asked for: it needs torch.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils.collate import default_collate_fn_map  # the way that its documentation names

from actcache.entries.batch import Batch, Inputs
from actcache.errors import CorruptEntryError, ShapeError, UsageError
from actcache.io.cached import cached_property
from actcache.reader.delivery import Delivered, HostDelivery
from actcache.reader.epoch import Work, read_and_deliver, read_computed
from actcache.reader.labels import IGNORED, TokenLabels

_ONE_PROCESS = (
    "documents are computed in one process only: take a loader without workers, or fill them first (recycler.fill)"
)


class Item(Mapping[str, Any]):
    """One document of a data set: a batch of one, which is read when something of it is asked for.

    It has the attributes of ``Batch``; as a mapping it is the keyword arguments of a reduced model's ``forward``, all
    ``[1, ...]``. What groups documents by length (the ``Trainer``) asks for ``len(item["input_ids"])``: under this name
    are the positions of the tokens, ``[tokens]``, and nothing is read for it.
    """

    def __init__(self, dataset: EntryDataset, position: int) -> None:
        self._dataset, self._position = dataset, position

    @cached_property
    def _batch(self) -> Batch:
        return self._dataset.read([self._position])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is being unpickled there is nothing to read from
            raise AttributeError(name)
        return getattr(self._batch, name)

    def __getitem__(self, name: str) -> Any:
        if name == "input_ids":
            return range(int(self._dataset.lengths[self._position]))
        return self._batch.model_inputs()[name]

    def __contains__(self, name: object) -> bool:
        if name == "label_ids":  # the Trainer's own collator asks, and would stack what has a batch's axis already
            raise UsageError(
                "items of a data set are put into a batch by its collate alone: give the Trainer "
                "data_collator=dataset.collate (an item's labels are its 'labels')"
            )
        return name == "input_ids" or name in self._batch.model_inputs()

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.model_inputs())

    def __len__(self) -> int:
        return len(self._batch.model_inputs())

    def __repr__(self) -> str:
        return f"<document {self._position} of {len(self._dataset)}>"


class Stateful(Protocol):
    """What a ``BatchDataset`` goes through: a reader, or whatever else keeps its place."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BatchDataset(IterableDataset[Any]):
    """The batches of a reader as an iterable data set of torch, an epoch an iteration. Made by ``Reader.batches``.

    For loaders and trainers that take torch's own alone: ``DataLoader(reader.batches(), batch_size=None)``, and with
    ``collate_fn=Batch.model_inputs`` for those that take mappings alone (Accelerate). It has the protocol by which
    torchdata's ``StatefulDataLoader`` saves its place in an epoch. The reader reads ahead and deals out ranks itself,
    so a loader's workers have no part in it.
    """

    def __init__(self, reader: Stateful) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[Any]:
        """Return the batches of an epoch; ``UsageError`` in a loader's worker."""
        if get_worker_info() is not None:
            raise UsageError(
                "a reader reads ahead by a thread of its own: give the loader num_workers=0, or, to read in workers, "
                "reader.dataset() with its collate"
            )
        return iter(self._reader)

    def __len__(self) -> int:
        return len(self._reader)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; see ``Reader.set_epoch``."""
        self._reader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration is; see ``Reader.state_dict``."""
        return self._reader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iteration go on at a state; see ``Reader.load_state_dict``."""
        self._reader.load_state_dict(state)


class EntryDataset(Dataset[Any]):
    """The documents of a reader, by position. Made by ``Reader.dataset``. Not thread-safe.

    Give a loader ``collate_fn=dataset.collate`` (the ``Trainer``: ``data_collator=dataset.collate``): batches are then
    the keyword arguments of a reduced model's ``forward``, as torch tensors of the CPU, padded. Where the reader
    computes what is missing (``on_missing="compute"``), so does the data set, in the process that made it; what was
    computed is durable when all documents have been asked for.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._delivery: HostDelivery | None = None
        self._pid = os.getpid()
        self._unseen = np.ones(len(work.keys), bool)  # what may have to be computed

    def __len__(self) -> int:
        return len(self._work.keys)

    def __getitem__(self, position: Any) -> Any:
        """Return one document's ``Item``; of several, their ``Batch``, read at once.

        Args:
            position: 0..n-1, or from the end on, -1..-n. Several: a slice, a list or array of positions, ``[m]``, or a
                mask of truth values, ``[n]``.

        Raises:
            IndexError: there is no such document, or a mask is of another length.
            TypeError: it is none of these.
        """
        if isinstance(position, slice):
            return self.read(range(*position.indices(len(self))))
        if not np.ndim(position):
            return Item(self, self._checked(position))
        several = np.asarray(position)
        if several.ndim == 1 and several.dtype == np.bool_:
            if len(several) != len(self):
                raise IndexError(f"a mask of {len(several)} truth values for {len(self)} documents")
            return self.read(np.flatnonzero(several).tolist())
        return self.read([self._checked(one) for one in position])

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """Return the items of some documents, as loaders ask for them."""
        return [Item(self, self._checked(position)) for position in positions]

    def read(self, positions: Sequence[int]) -> Batch:
        """Return the documents at some positions (0..n-1) as one batch of CPU tensors.

        Raises:
            MissingEntryError, CorruptEntryError, StoreError: they cannot be read.
            UsageError: they would have to be computed in a loader's worker.
        """
        if self._delivery is None:
            self._delivery = HostDelivery(self._work.source.recipe.dtype, torch, packed=False, depth=2)
        members = np.asarray(positions, np.int64)
        read = read_and_deliver if self._work.miss_computer is None else self._read_or_compute
        batch = read(self._work, self._delivery, members).batch
        assert isinstance(batch, Batch)
        if self._work.miss_computer is not None and self._unseen.any() and os.getpid() == self._pid:
            self._unseen[members] = False
            if not self._unseen.any():
                self._work.miss_computer.flush()
        return batch

    def _read_or_compute(self, work: Work, delivery: HostDelivery, members: NDArray[np.int64]) -> Delivered:
        corrupt: Sequence[bytes] = []
        if (work.source.lengths(work.keys[members]) > 0).all():
            try:
                return read_and_deliver(work, delivery, members)
            except CorruptEntryError as error:
                corrupt = error.keys
        if os.getpid() != self._pid:
            raise UsageError(_ONE_PROCESS)
        return read_computed(work, delivery, members, corrupt)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, ``[n]``."""
        work = self._work
        lengths = work.info.lengths.copy()
        missing = np.flatnonzero(lengths == 0)
        if work.miss_computer is not None and len(missing):
            lengths[missing] = work.miss_computer.lengths(work.origins[missing])
        return lengths

    @property
    def of_tokens(self) -> bool:
        """Whether labels are those of tokens, and padded like them."""
        return isinstance(self._work.labels, TokenLabels)

    @staticmethod
    def collate(items: Sequence[Item], *, collate_fn_map: Any = None) -> Inputs:
        """Return the keyword arguments of a reduced model for the items of one data set, or of several; ``ShapeError``
        where these have unlike shapes, or labels and none."""
        places: dict[int, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(id(item._dataset), []).append(place)
        parts = []
        for members in places.values():
            dataset = items[members[0]]._dataset
            parts.append((dataset, dataset.read([items[place]._position for place in members])))
        if len(parts) == 1:
            return parts[0][1].model_inputs()
        width = max(batch.activations.shape[1] for _, batch in parts)
        inputs = [_widened(batch.model_inputs(), width, dataset.of_tokens) for dataset, batch in parts]
        kinds = [{name: (tensor.ndim, *tensor.shape[2:]) for name, tensor in one.items()} for one in inputs]
        if any(kind != kinds[0] for kind in kinds):
            raise ShapeError(
                "these data sets do not fit into one batch: they are all of one hidden size, with labels of one shape "
                "or without, and with token ids or without"
            )
        order = torch.from_numpy(np.argsort(np.concatenate(list(places.values()))))
        return Inputs({name: torch.cat([one[name] for one in inputs])[order] for name in kinds[0]})

    def _checked(self, position: Any) -> int:
        try:
            if isinstance(position, bool) or getattr(position, "dtype", None) == torch.bool:  # indices to Python
                raise TypeError
            number = operator.index(position)
        except TypeError:
            raise TypeError(
                f"a position is a whole number, not {position!r:.80}; several are a slice, a list or array of "
                f"positions, [m], or a mask of truth values, [{len(self)}]"
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"position {number} of {len(self)} documents")
        return number % len(self)

    def __getstate__(self) -> dict[str, Any]:
        work = self._work
        if work.miss_computer is not None:
            if not (work.source.lengths(work.keys) > 0).all():
                raise UsageError(_ONE_PROCESS)
            work = replace(work, miss_computer=None)
        return {**vars(self), "_work": work, "_delivery": None}


def _widened(inputs: Mapping[str, Any], width: int, of_tokens: bool) -> dict[str, torch.Tensor]:
    """Return inputs ``[B, L, ...]`` as ``[B, width, ...]``; labels only where they are those of tokens."""
    wide = dict(inputs)
    for name, tensor in inputs.items():
        if name != "labels" or of_tokens:
            added = [0, 0] * (tensor.ndim - 2) + [0, width - tensor.shape[1]]
            wide[name] = pad(tensor, added, value=IGNORED if name == "labels" else 0)
    return wide


default_collate_fn_map[Item] = EntryDataset.collate
