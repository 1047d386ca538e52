"""Collections of filled corpora: their entries in the corpus's order, under the caller's ids."""

from __future__ import annotations

from collections.abc import Sequence

from actcache.corpus import Document
from actcache.key import document_key
from actcache.models.entries import check_found, find_entries
from actcache.space import Space
from actcache.store import Store
from actcache.windows import Windows


def put_collection(
    store: Store, space: Space, name: str, documents: Sequence[Document], windows: Windows | None
) -> int:
    """Store a collection of the entries of some documents, each document's windows one after another; return how many.

    Where documents have ids, each entry has its document's; a document without one has an empty id.

    Raises:
        UsageError: the name is none.
        MissingEntryError: a document is not in the space.
    """
    keys = [document_key(document.text) for document in documents]
    found = find_entries(space, keys, windows)
    check_found(keys, found)
    ids: list[str] | None = None
    if any(document.id is not None for document in documents):
        ids = [document.id or "" for document, entries in zip(documents, found, strict=True) for _ in entries]
    entries = [key for keys_of_one in found for key in keys_of_one]
    store.put_collection(name, entries, ids)
    return len(entries)
