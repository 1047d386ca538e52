"""A fill of a recycler's spaces by the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actcache.errors import UsageError
from actcache.models.cluster.documents import documents_of
from actcache.models.cluster.leader import fill
from actcache.models.documents import ColumnFields, DocumentsWithColumns, Field
from actcache.models.filling import Filler, FillReport
from actcache.models.remote import Blueprint

_REFUSED = {
    "max_bytes": "its promises lie in one machine's memory. Fill by fill(..., max_bytes=...), or watch the store",
    "partition": "the workers are dealt the documents by their keys already. Leave it out",
}


def fill_spaces(
    blueprint: Callable[[], Blueprint],
    filler: Filler,
    texts: Any,
    field: Field | None,
    columns: ColumnFields | None,
    **options: Any,
) -> FillReport:
    """Fill the spaces of a recycler, or of several; see ``Recycler.fill_ray``.

    Args:
        blueprint: makes theirs.
        filler: theirs; its spaces know in the end what was stored.
        options: of ``cluster.fill``.
    """
    for name, why in _REFUSED.items():
        if options.pop(name, None) is not None:
            raise UsageError(f"{name} is not for a fill by Ray's workers: {why}")
    documents = documents_of(texts, field, columns)
    if isinstance(documents, DocumentsWithColumns):
        filler.check_columns(documents.beside)
    encoder = filler.encoder
    try:
        return fill(documents, blueprint(), chunk=encoder.chunk, keys_of=encoder.keys, **options)
    finally:
        for space in filler.spaces:
            space.refresh()  # also where it failed: what was computed is stored
