"""Documents as a fill by a cluster is given them: also those of Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from actcache.errors import UsageError
from actcache.format.keys import Document
from actcache.models.documents import Field, documents_in

_ROWS = 1024  # of a batch that is brought here


class DatasetRows(Iterable[Mapping[str, Any]]):
    """The rows of a ``ray.data.Dataset``, batch by batch; it can be gone through more than once."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._dataset.iter_batches(batch_size=_ROWS, batch_format="pyarrow"):
            yield from batch.to_pylist()


def documents_of(texts: Any, field: Field | None) -> Iterable[Document]:
    """Return documents as ``documents_in`` does; ``UsageError`` for a Ray data set without a field."""
    if type(texts).__module__.startswith("ray.data."):
        if field is None:
            names = ", ".join(map(repr, texts.columns() or []))
            raise UsageError(f"say which column of this Ray data set holds the documents (field=...): it has {names}")
        return documents_in(DatasetRows(texts), field)
    return documents_in(texts, field)
