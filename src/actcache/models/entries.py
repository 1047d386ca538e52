"""Which entries of a space belong to a document: itself, or its windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DocumentError, MissingEntryError, UsageError
from actcache.key import Document, Keys, document_key
from actcache.windows import Windows


class Container(Protocol):
    """What is asked of a space."""

    def contains(self, keys: Keys) -> NDArray[np.bool_]: ...


def check_texts(texts: object) -> None:
    """Refuse what can be iterated over but is not documents.

    Raises:
        UsageError: it is one text, whose characters would be taken for documents, or a mapping, whose keys would be.
    """
    if isinstance(texts, str | bytes):
        raise UsageError("give a list or an iterable of documents, not one text")
    if isinstance(texts, Mapping):
        raise UsageError(f"give a list or an iterable of documents, not a {type(texts).__name__}: one of its values?")


def listed(texts: Iterable[Document]) -> list[Document]:
    """Return documents as a list.

    Raises:
        UsageError: see ``check_texts``.
    """
    check_texts(texts)
    return list(texts)


def document_keys(documents: Sequence[Document], first: int = 0) -> list[bytes]:
    """Return the documents' keys.

    Raises:
        DocumentError: a document has none; it names its position, counted from ``first``.
    """
    keys = []
    for position, document in enumerate(documents, first):
        try:
            keys.append(document_key(document))
        except DocumentError as error:
            raise DocumentError(f"position {position} of the texts: {error}") from None
    return keys


def entry_keys(document: bytes, count: int, spec: Windows | None) -> list[bytes]:
    """Return the keys of a document's ``count`` entries."""
    return [document] if spec is None else spec.keys(document, count)


def find_entries(space: Container, documents: list[bytes], spec: Windows | None) -> list[list[bytes]]:
    """Return the keys of each document's entries, in order; none where the document is not wholly in the space."""
    if spec is None:
        there = space.contains(documents).tolist()
        return [[key] if is_there else [] for key, is_there in zip(documents, there, strict=True)]
    found: list[list[bytes]] = [[] for _ in documents]
    unfinished = list(range(len(documents)))
    for number in itertools.count():  # one look-up a round: window 0 of all, window 1 of those that go on, ...
        if not unfinished:
            break
        probes = [[spec.key(documents[i], number, last=last) for last in (True, False)] for i in unfinished]
        there = space.contains([key for pair in probes for key in pair]).reshape(-1, 2).tolist()
        going_on = []
        for i, (last, further), (is_last, goes_on) in zip(unfinished, probes, there, strict=True):
            if is_last:
                found[i].append(last)
            elif goes_on:
                found[i].append(further)
                going_on.append(i)
            else:
                found[i] = []
        unfinished = going_on
    return found


def check_found(documents: list[bytes], found: list[list[bytes]]) -> None:
    """Refuse documents without entries.

    Raises:
        MissingEntryError: holding their keys.
    """
    missing = [key for key, entries in zip(documents, found, strict=True) if not entries]
    if missing:
        raise MissingEntryError(
            f"{len(missing)} of {len(documents)} documents are not in the space, the first at position "
            f"{documents.index(missing[0])}: fill them first, or have a reader skip them (on_missing='skip')",
            missing,
        )
