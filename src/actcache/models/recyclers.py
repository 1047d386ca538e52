"""Several layers of one model, recorded in one pass: to learn which layer suits a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from actcache.errors import UsageError
from actcache.format.arguments import whole_numbers
from actcache.format.keys import Document
from actcache.models import error_budget
from actcache.models.documents import Field, documents_in, listed
from actcache.models.filling import Filler, FillReport
from actcache.models.lower_half import TOKEN_BUDGET
from actcache.models.pretrained import load_pretrained
from actcache.models.recycler import Recycler
from actcache.reader.rows import RowReader
from actcache.store.store import Store, open_store


class Recyclers(Mapping[int, Recycler]):
    """The recyclers of one model by layer; each layer is a space of its own. Not thread-safe.

    A space that was filled this way is the one that a ``Recycler`` of that layer finds, and the other way round.

    Args:
        layers: 1-based, in any order; a list, range or array. A ``UsageError`` where there are none, or one twice.
        store: a ``Store``, or a URL or path of one, which this then opens and closes.
        options: the other arguments of ``Recycler``.

    Attributes:
        filler: fills all of them; for ``actcache.models.parallel``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layers: Sequence[int],
        store: Store | str | Path,
        **options: Any,
    ) -> None:
        layers = checked_layers(layers)
        self._store = store if isinstance(store, Store) else open_store(store)
        self._owns_store = self._store is not store
        self._recyclers: dict[int, Recycler] = {}
        try:
            for layer in layers:
                self._recyclers[layer] = Recycler(model, tokenizer, layer=layer, store=self._store, **options)
        except BaseException:
            self.close()
            raise
        self.filler = Filler(self._store, [recycler.agreement for recycler in self._recyclers.values()])

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layers: Sequence[int],
        store: Store | str | Path,
        device: str | torch.device | None = None,
        revision: str | None = None,
        **options: Any,
    ) -> Recyclers:
        """Load base model and tokenizer, and return their recyclers; see ``Recycler.from_pretrained``."""
        layers = checked_layers(layers)
        model, tokenizer = load_pretrained(name_or_path, layers, device, revision)
        return cls(model, tokenizer, layers=layers, store=store, **options)

    def fill(
        self,
        texts: Iterable[Document],
        *,
        field: Field | None = None,
        token_budget: int = TOKEN_BUDGET,
        progress: bool = True,
        max_bytes: int | str | None = None,
        max_error: float | None = None,
        metric: str = "rows",
    ) -> FillReport:
        """Compute each document once, as far as the deepest layer that lacks it, and store it at each layer that does.

        Else as ``Recycler.fill``; ``computed`` counts the documents that any layer lacked, and ``max_bytes`` is for all
        layers together; ``max_error`` is for each of them.
        """
        agreements = [recycler.agreement for recycler in self._recyclers.values()]
        self._store.check_writable()
        texts = error_budget.measured(documents_in(texts, field), agreements, max_error, metric)
        return self.filler.fill(texts, token_budget, progress, max_bytes)

    def rows(self, texts: Iterable[Document] | None = None, *, device: Any = "cpu", **options: Any) -> RowReader:
        """Return batches of rows ``[n, layers, hidden]``, mixed across documents and aligned row by row, the layers in
        the order in which they were given; else as ``Recycler.rows``.

        ``MissingEntryError``, ``ShapeError``: layers hold other documents than the first one.
        """
        given = None if texts is None else listed(texts)
        told = [recycler.row_keys(given) for recycler in self._recyclers.values()]
        return RowReader([recycler.space for recycler in self._recyclers.values()], **told[0], device=device, **options)

    def pooled(self, texts: Iterable[Document] | None = None, how: Any = "mean") -> NDArray[np.float32]:
        """Return one row a document and layer, ``[documents, layers, hidden]`` float32, the layers in their order here;
        else as ``Recycler.pooled``.

        ``MissingEntryError``: a layer lacks a document of the first one.
        """
        given = None if texts is None else listed(texts)
        if given is not None:
            return np.stack([recycler.pooled(given, how) for recycler in self._recyclers.values()], axis=1)
        keys = next(iter(self._recyclers.values())).space.key_array()
        return np.stack([recycler.space.pooled(keys, how) for recycler in self._recyclers.values()], axis=1)

    def close(self) -> None:
        """Close all spaces, and the store where this opened it. Does nothing the second time."""
        with ExitStack() as stack:  # all of them, also where one fails
            if self._owns_store:
                stack.callback(self._store.close)
            for recycler in self._recyclers.values():
                stack.callback(recycler.close)

    def __getitem__(self, layer: int) -> Recycler:
        return self._recyclers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._recyclers)

    def __len__(self) -> int:
        return len(self._recyclers)

    def __enter__(self) -> Recyclers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Recyclers of layers {', '.join(map(str, self))}>"


def checked_layers(layers: Sequence[int]) -> list[int]:
    """Return layers as Python's own numbers; raises ``UsageError`` where there are none, or one twice or no number."""
    numbers: list[int] = whole_numbers("layers", layers).tolist()
    if not numbers or len(set(numbers)) != len(numbers):
        raise UsageError(f"layers are different numbers, such as [3, 6], not {layers!r}")
    return numbers
