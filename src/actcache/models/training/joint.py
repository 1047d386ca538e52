"""Several layers of the same documents, read in one batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel

from actcache.entries.batch import Batch
from actcache.errors import DataError, UsageError
from actcache.format.keys import Document
from actcache.format.recipe import Recipe
from actcache.models.documents import listed
from actcache.reader.reader import Reader
from actcache.reader.stats import ReaderStats
from actcache.store.space import Space


class CachedLayer(Protocol):
    """What is asked of the recycler of one layer."""

    recipe: Recipe
    space: Space

    def keys(self, texts: Iterable[Document]) -> list[bytes]: ...

    def reader(self, texts: Iterable[Document], **options: Any) -> Reader: ...

    def reduce(self, task_model: PreTrainedModel) -> PreTrainedModel: ...


class JointReader:
    """Iterates over the readers of several layers at once: each step yields ``{layer: Batch}`` of the same documents.

    Each layer is read ahead by its reader's own thread, into its own buffers. Not thread-safe.

    Raises:
        UsageError: there are no readers, or they do not go through the same documents in the same order and epoch.
    """

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        if not readers:
            raise UsageError("there are no layers to read: give one reader for each")
        self.readers = dict(readers)
        self._first = next(iter(self.readers.values()))
        states = {layer: reader.state_dict() for layer, reader in self.readers.items()}
        first, *others = states
        differ = [layer for layer in others if states[layer] != states[first]]
        if differ:
            raise UsageError(
                f"the readers of layers {first} and {differ[0]} do not go through the same documents in one order: "
                "give them the same texts, options and epoch, and fill both layers before documents are skipped"
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._first)

    def __iter__(self) -> Iterator[dict[int, Batch]]:
        return self._steps([iter(reader) for reader in self.readers.values()])

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        for reader in self.readers.values():
            reader.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration is, for ``load_state_dict`` of a joint reader or of one layer's reader."""
        return self._first.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iteration go on at a state; raises ``UsageError`` for that of readers with another order."""
        for reader in self.readers.values():
            reader.load_state_dict(state)

    def stats(self) -> dict[int, ReaderStats]:
        """Return each layer's statistics."""
        return {layer: reader.stats() for layer, reader in self.readers.items()}

    def close(self) -> None:
        """Close the readers; see ``Reader.close``. Does nothing the second time."""
        for reader in self.readers.values():
            reader.close()

    def _steps(self, epochs: list[Any]) -> Iterator[dict[int, Batch]]:
        with contextlib.ExitStack() as stack:
            for epoch in epochs:
                stack.callback(epoch.close)
            for batches in zip(*epochs, strict=True):
                (first, one), *others = zip(self.readers, batches, strict=True)
                for layer, other in others:
                    same = np.array_equal(one.key_array, other.key_array)
                    if not same or tuple(one.activations.shape[:2]) != tuple(other.activations.shape[:2]):
                        raise DataError(
                            f"layers {first} and {layer} of a batch hold different documents or numbers of tokens: an "
                            "entry was overwritten in one of the spaces; delete it in both and fill again"
                        )
                yield dict(zip(self.readers, batches, strict=True))


def read_jointly(recyclers: Mapping[int, CachedLayer], texts: Iterable[Document], **options: Any) -> JointReader:
    """Return a reader of several layers of these documents.

    Args:
        recyclers: by layer, as ``Recyclers`` is; each layer's space holds the documents.
        options: as of ``Recycler.reader``. A ``local_cache`` may be the same folder for all layers; ``ram_cache`` is
            for each.

    Raises:
        MissingEntryError: documents are not in a layer's space.
        UsageError: the layers' documents differ, as when they were cut into other windows, or the layout is packed.
    """
    if options.get("layout", "padded") != "padded":
        raise UsageError("layers are read jointly as padded batches; packed ones come from each layer's own reader")
    documents = listed(texts)
    return JointReader({layer: recycler.reader(documents, **options) for layer, recycler in recyclers.items()})
