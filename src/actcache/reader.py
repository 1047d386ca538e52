"""The reader: batches of entries, epoch after epoch.

A plain iterator: it asks the operating system for the next batch's rows while the caller works on this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache import codec, order
from actcache.arrays import to_numpy
from actcache.backend import TOKEN_IDS
from actcache.batch import Batch
from actcache.errors import MissingEntryError, ShapeError, UsageError
from actcache.key import Keys, key_array, key_list
from actcache.recipe import Recipe


class Source(Protocol):
    """What a reader needs of a space; a wrapper that has it can stand in for one. All calls take keys in batches."""

    @property
    def recipe(self) -> Recipe: ...

    def has(self, column: str, keys: Keys) -> NDArray[np.bool_]: ...

    def lengths(self, keys: Keys) -> NDArray[np.int64]: ...

    def read_ahead(self, keys: Keys) -> None: ...

    def read_into(self, keys: Keys, out: Any, *, token_ids: Any = None) -> Any: ...


class Reader:
    """Iterates over the entries of keys in batches; each iteration is one epoch, and the next has the next order.

    One thread at a time; several readers of one space are fine. Absent entries are found when the reader is made; one
    that is deleted after that is a ``MissingEntryError`` when its turn comes.

    Args:
        space: where the entries are.
        keys: of the documents, in the given order; a key may stand more than once.
        batch_size: documents of a batch.
        shuffle: whether each epoch has a random order, decided by ``seed`` and the number of the epoch.
        labels: one label a key (numbers, or arrays of one shape), or None. Whole numbers and truth values are delivered
            as int64, which losses want.
        documents: one position a key, delivered as ``Batch.documents``; the key's own position by default.
        device: a torch device for the batches; None for NumPy arrays.
        on_missing: ``"raise"`` or ``"skip"`` documents that are absent.
        drop_last: whether to leave out an epoch's last batch where it is not full.

    Raises:
        MissingEntryError: entries are absent; it names them.
        ShapeError, UsageError: an option does not fit.
    """

    def __init__(
        self,
        space: Source,
        keys: Keys,
        *,
        batch_size: int = 32,
        shuffle: bool = False,
        seed: int = 0,
        labels: Any = None,
        documents: Any = None,
        device: Any = None,
        on_missing: str = "raise",
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size {batch_size} is not positive")
        if on_missing not in ("raise", "skip"):
            raise UsageError(f"on_missing is 'raise' or 'skip', not {on_missing!r}")
        wanted = key_array(keys)
        positions = np.arange(len(wanted)) if documents is None else np.asarray(documents, np.int64)
        wanted_labels = None if labels is None else to_numpy(labels)
        for name, values in (("labels", wanted_labels), ("documents", positions)):
            if values is not None and (not values.ndim or len(values) != len(wanted)):
                raise ShapeError(
                    f"{len(wanted)} documents and labels or documents of shape {list(values.shape)} ({name})"
                )
        if wanted_labels is not None:
            if wanted_labels.dtype.kind not in "biuf":
                raise ShapeError(f"labels are numbers, not {wanted_labels.dtype}: give each class a number")
            if wanted_labels.dtype.kind != "f":
                wanted_labels = wanted_labels.astype(np.int64)
        found = space.lengths(wanted) > 0
        if on_missing == "raise" and not found.all():
            missing = key_list(wanted[~found])
            raise MissingEntryError(
                f"{len(missing)} of {len(wanted)} documents are not in the space, the first at position "
                f"{int(np.argmin(found))}: fill them first, or pass on_missing='skip'",
                missing,
            )
        self._space = space
        self._keys = wanted[found]
        self._documents = positions[found]
        self._labels = None if wanted_labels is None else wanted_labels[found]
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._drop_last = drop_last
        self._device = device
        self._epoch = 0

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        full, rest = divmod(len(self._keys), self._batch_size)
        return full + (rest > 0 and not self._drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Batch]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        plan = order.batches(
            len(self._keys),
            self._batch_size,
            shuffle=self._shuffle,
            seed=self._seed,
            epoch=epoch,
            drop_last=self._drop_last,
        )
        return self._deliver(plan)

    def _deliver(self, plan: list[NDArray[np.int64]]) -> Iterator[Batch]:
        for number, which in enumerate(plan):
            if number + 1 < len(plan):
                self._space.read_ahead(self._keys[plan[number + 1]])
            yield self._read(which)

    def _read(self, which: NDArray[np.int64]) -> Batch:
        recipe = self._space.recipe
        keys = self._keys[which]
        lengths = self._space.lengths(keys)
        shape = (len(keys), int(lengths.max()))
        values = np.empty((*shape, recipe.hidden_size), codec.get(recipe.dtype).stored)
        has_ids = bool(self._space.has(TOKEN_IDS, keys).all())
        ids = np.empty(shape, np.int32) if has_ids else None
        # What was read, not what was there a moment ago: entries are deleted and replaced meanwhile.
        lengths = self._space.read_into(keys, values, token_ids=ids).lengths
        if not lengths.all():
            missing = key_list(keys[lengths == 0])
            raise MissingEntryError(
                f"{len(missing)} documents of this batch were deleted since the reader was made, the first at position "
                f"{self._documents[which][int(np.argmin(lengths))]}: fill them again and make a new reader",
                missing,
            )
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        arrays = {
            "attention_mask": mask,
            "token_ids": None if ids is None else ids.astype(np.int64),
            "lengths": lengths,
            "documents": self._documents[which],
            "labels": None if self._labels is None else self._labels[which],
        }
        if self._device is None:
            return Batch(codec.get(recipe.dtype).decode(values), keys=key_list(keys), **arrays)
        return self._on_device(values, key_list(keys), arrays)

    def _on_device(self, values: NDArray[Any], keys: list[bytes], arrays: dict[str, Any]) -> Batch:
        import torch  # only those who name a device need it

        activations = torch.from_numpy(values)
        if self._space.recipe.dtype == "bfloat16":
            activations = activations.view(torch.bfloat16)
        tensors = {n: None if a is None else torch.from_numpy(a).to(self._device) for n, a in arrays.items()}
        return Batch(activations.to(self._device), keys=keys, **tensors)
