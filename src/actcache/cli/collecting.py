"""Collections of filled corpora: their entries in the corpus's order, under the caller's ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from actcache.cli.corpus import Document
from actcache.format.keys import Windows, document_key
from actcache.store.document_entries import check_found, find_entries
from actcache.store.space import Space
from actcache.store.store import Store


class Notes:
    """The keys and ids of documents that pass through on their way to a fill; their texts are let go.

    Attributes:
        keys: in order.
        ids: beside them; None where the corpus gives none.
    """

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.ids: list[str | None] = []

    def passing(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents."""
        for document in documents:
            self.keys.append(document_key(document.text))
            self.ids.append(document.id)
            yield document


def put_collection(store: Store, space: Space, name: str, notes: Notes, windows: Windows | None) -> int:
    """Store a collection of the entries of some documents, each document's windows one after another; return how many.

    Where documents have ids, each entry has its document's; a document without one has an empty id.

    Raises:
        UsageError: the name is none.
        MissingEntryError: a document is not in the space.
    """
    found = find_entries(space, notes.keys, windows)
    check_found(notes.keys, found)
    ids: list[str] | None = None
    if any(name_of_one is not None for name_of_one in notes.ids):
        ids = [name_of_one or "" for name_of_one, entries in zip(notes.ids, found, strict=True) for _ in entries]
    entries = [key for keys_of_one in found for key in keys_of_one]
    store.put_collection(name, entries, ids)
    return len(entries)
