"""Which entries of a space belong to a document: itself, or its windows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from actcache.errors import MissingEntryError
from actcache.format.keys import Keys, Windows


class Container(Protocol):
    """What is asked of a space."""

    def contains(self, keys: Keys) -> NDArray[np.bool_]: ...


class StoredWindow(NamedTuple):
    """A window that a space has."""

    document: int  # position of the document that it is of
    number: int  # from 0
    last: bool
    key: bytes


def entry_keys(document: bytes, count: int, spec: Windows | None) -> list[bytes]:
    """Return the keys of a document's ``count`` entries."""
    return [document] if spec is None else spec.keys(document, count)


def stored_windows(space: Container, documents: Sequence[bytes], spec: Windows) -> Iterator[StoredWindow]:
    """Yield the windows of documents that a space has: number 0 of all, then number 1 of those that go on, ...

    There is one look-up a number. Windows behind one that is missing are not found.
    """
    going_on = list(range(len(documents)))
    for number in itertools.count():
        if not going_on:
            return
        probes = [
            StoredWindow(i, number, last, spec.key(documents[i], number, last=last))
            for i in going_on
            for last in (True, False)
        ]
        found = list(itertools.compress(probes, space.contains([probe.key for probe in probes]).tolist()))
        yield from found
        going_on = [window.document for window in found if not window.last]


def find_entries(space: Container, documents: Sequence[bytes], spec: Windows | None) -> list[list[bytes]]:
    """Return the keys of each document's entries, in order; none where the document is not wholly in the space."""
    if spec is None:
        there = space.contains(documents).tolist()
        return [[key] if is_there else [] for key, is_there in zip(documents, there, strict=True)]
    found: list[list[bytes]] = [[] for _ in documents]
    whole = [False] * len(documents)
    for window in stored_windows(space, documents, spec):
        if not whole[window.document]:
            found[window.document].append(window.key)
            whole[window.document] = window.last
    return [keys if is_whole else [] for keys, is_whole in zip(found, whole, strict=True)]


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
