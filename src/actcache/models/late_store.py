"""A store that is opened when all that can be wrong before has been found out: what is refused leaves none behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from actcache.format.keys import Document
from actcache.models.sites import Site
from actcache.store.store import Store, open_store


class LateStore:
    """Given to recyclers in the place of a store, which it opens once. Not thread-safe.

    Args:
        place: the store, or its URL or path.
        first: documents that must be such as can be stored, or else nothing is opened and made.

    Attributes:
        digests: of the lower halves of several sites, where their recyclers open together.
    """

    def __init__(
        self,
        place: Store | str | Path,
        first: Sequence[Document] = (),
    ) -> None:
        self._place, self.first = place, first
        self.digests: Mapping[Site, str] | None = None
        self._opened: Store | None = None

    @classmethod
    def of(cls, place: Store | str | Path | LateStore) -> LateStore:
        return place if isinstance(place, LateStore) else cls(place)

    @property
    def owned(self) -> bool:
        """Whether it opens the store, which is then to be closed."""
        return not isinstance(self._place, Store)

    def open(self) -> Store:
        """Return the store; raises as ``open_store``."""
        if isinstance(self._place, Store):
            return self._place
        if self._opened is None:
            self._opened = open_store(self._place)
        return self._opened

    def close(self) -> None:
        """Close the store where it was opened here."""
        if self._opened is not None:
            self._opened.close()
