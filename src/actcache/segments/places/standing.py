"""A place that holds a certain store: nothing is published or removed there once that store has gone.

The folder of a store may be moved, removed or unmounted while it is open, and the objects of a prefix may be deleted.
What would be written afterwards would lie in no store, or in another one that somebody has made there meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from actcache.backend import SpaceDriver
from actcache.errors import StoreGoneError
from actcache.segments.places import marker
from actcache.segments.places.place import Place


def _passed(method: str) -> Callable[..., Any]:
    """Return a method that calls the wrapped object's."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return getattr(self._wrapped, method)(*args, **options)

    return call


def _checked(method: str) -> Callable[..., Any]:
    """Return one that looks first whether the store is still there."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        self.check()
        return getattr(self._wrapped, method)(*args, **options)

    return call


class StandingPlace(Place):
    """Wraps a place; see ``Place``. All that changes something looks at the marker first, a small read.

    Args:
        place: where the store lies.
        standing: its marker, as of when it was opened.

    Raises (what changes something):
        StoreGoneError: the store is not there any more; nothing was changed.
    """

    def __init__(self, place: Place, standing: marker.Marker) -> None:
        self.where = place.where
        self._wrapped = place
        self._marker = standing.data

    def check(self) -> None:
        found = self._wrapped.read(marker.NAME)
        if found is None:
            raise StoreGoneError(
                f"the store that was opened at {self.where} is not there any more (there is no {marker.NAME}): it was "
                "moved, removed or unmounted; bring it back, or open it at its new place"
            )
        if found != self._marker:
            raise StoreGoneError(
                f"another store lies at {self.where} than the one that was opened: that one was moved or removed; "
                "bring it back, or open the one that is there now"
            )

    make, names, read, sync_names, age = map(_passed, ("make", "names", "read", "sync_names", "age"))
    segment, local_copy, rows, listing, close = map(_passed, ("segment", "local_copy", "rows", "listing", "close"))
    publish, publish_bytes, remove = map(_checked, ("publish", "publish_bytes", "remove"))
    move, remove_folder, sweep = map(_checked, ("move", "remove_folder", "sweep"))


class StandingSpace(SpaceDriver):
    """Wraps an engine's space, whose files do not go through the place; see ``SpaceDriver``.

    A snapshot that was taken before the store went serves what it showed: the engine has its files open.
    """

    def __init__(self, space: SpaceDriver, place: Place) -> None:
        self._wrapped = space
        self.check = place.check

    @property
    def merges_tiers(self) -> bool:
        return self._wrapped.merges_tiers

    @merges_tiers.setter
    def merges_tiers(self, allowed: bool) -> None:
        self._wrapped.merges_tiers = allowed

    append, delete, snapshot, compact = map(_checked, ("append", "delete", "snapshot", "compact"))
    quarantine, examine, set_aside = map(_checked, ("quarantine", "examine", "set_aside"))
    close = _passed("close")
