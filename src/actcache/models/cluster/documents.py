"""Documents as a fill by a cluster is given them: also those of Ray Data."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from actcache.errors import UsageError
from actcache.format.keys import Document
from actcache.models.documents import ColumnFields, Field, documents_in, documents_with_columns

_ROWS = 1024  # of a batch that is brought here


class DatasetRows(Iterable[Mapping[str, Any]]):
    """The rows of a ``ray.data.Dataset``, batch by batch; it can be gone through more than once."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for batch in self._dataset.iter_batches(batch_size=_ROWS, batch_format="pyarrow"):
            yield from batch.to_pylist()


def documents_of(texts: Any, field: Field | None, columns: ColumnFields | None = None) -> Iterable[Document]:
    """Return documents as ``documents_in`` does, or ``documents_with_columns``.

    Raises:
        UsageError: see there; or they are paths, or a Ray data set without a field.
    """
    if isinstance(texts, os.PathLike) or (isinstance(texts, list | tuple) and texts and _is_path(texts[0])):
        some = os.fspath(texts if isinstance(texts, os.PathLike) else texts[0])
        raise UsageError(
            f"{some} is a path, not documents: give what reads it, such as ray.data.read_parquet or read_json with "
            f"field=..., or fill from the file by cachectl fill STORE {some} --ray ADDRESS"
        )
    if type(texts).__module__.startswith("ray.data."):
        if field is None:
            names = ", ".join(map(repr, texts.columns() or []))
            raise UsageError(f"say which column of this Ray data set holds the documents (field=...): it has {names}")
        texts = DatasetRows(texts)
    return documents_in(texts, field) if columns is None else documents_with_columns(texts, field, columns)


def _is_path(one: object) -> bool:
    return isinstance(one, os.PathLike)
