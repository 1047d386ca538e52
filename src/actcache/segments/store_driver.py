"""The store that the core builds around a ``SegmentFormat`` or a ``SpaceEngine``, in any place.

    actcache.json                       the marker: format version and backend
    spaces/<fingerprint>/...            blobs of a space (recipe.json, canaries.npz)
    spaces/<fingerprint>/segments/      immutable segments (an engine keeps its own files instead)
    spaces/<fingerprint>/tombstones/    which entries of them are deleted
    spaces/<fingerprint>/index/         sorted tables over the segments, rebuildable
    spaces/<fingerprint>/quarantine/    what was found corrupt
    collections/                        blobs
    tmp/                                what is being written; never listed

No locks: segment names are unique, published whole, and never change.

The folder of a store may be moved, removed or unmounted while it is open, and the objects of a prefix may be deleted.
Nothing is published or removed then: it would lie in no store, or in another one that was made there meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actcache.backend import Columns, SegmentFormat, SpaceDriver, SpaceEngine, StoredFile, StoreDriver
from actcache.errors import BackendError, NotAStoreError, ReadOnlyError, StoreGoneError
from actcache.format.recipe import is_fingerprint
from actcache.io.files import translated
from actcache.segments.places import marker
from actcache.segments.places.local_place import LocalPlace
from actcache.segments.places.place import Place
from actcache.segments.space_driver import SegmentedSpace

OpenSpace = Callable[[str, Columns], SpaceDriver]


def _passed(method: str, *, checked: bool = False) -> Callable[..., Any]:
    """Return a method that calls the wrapped object's, ``checked`` after a look whether the store is still there."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if checked:
            self.check()
        return getattr(self._wrapped, method)(*args, **options)

    return call


_checked = partial(_passed, checked=True)


class StandingPlace(Place):
    """Wraps a place. All that changes something looks first, a small read, whether its marker is still ``standing``.

    Else it raises ``StoreGoneError``, and nothing was changed.
    """

    def __init__(self, place: Place, standing: marker.Marker) -> None:
        self.where, self._wrapped, self._marker = place.where, place, standing.data
        self.indexes_each = place.indexes_each

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
    lost, publish_along, beginning = map(_passed, ("lost", "publish_along", "beginning"))
    publish, publish_bytes, remove = map(_checked, ("publish", "publish_bytes", "remove"))
    move, remove_folder, sweep = map(_checked, ("move", "remove_folder", "sweep"))


class StandingSpace(SpaceDriver):
    """Wraps an engine's space, whose files do not go through the place.

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


class PlacedStore(StoreDriver):
    """Implements ``StoreDriver`` at a place. Thread-safe. ``locks`` are names of files that readers write to, too.

    Raises (every method):
        StoreGoneError: the store that was opened is not there any more; nothing was changed.
    """

    def __init__(
        self,
        place: Place,
        standing: marker.Marker,
        open_space: OpenSpace,
        *,
        mode: str,
        locks: frozenset[str] = frozenset(),
    ) -> None:
        self._place = place
        self.identity = standing.data
        self._locks = locks
        self._open_space = open_space
        self._writable = mode == "a"

    def _check_writable(self) -> None:
        if not self._writable:
            raise ReadOnlyError(f"{self._place.where} was opened with mode='r'; open it with mode='a' to write")

    def read_blob(self, name: str) -> bytes | None:
        data = self._place.read(name)
        # What lies under a fingerprint is that space's, in whatever store; other names are each store's own.
        if data is None or not name.startswith("spaces/"):
            self._place.check()
        return data

    def write_blob(self, name: str, data: bytes, *, replace: bool) -> bool:
        self._check_writable()
        return self._place.publish_bytes(name, data, replace=replace)

    def delete_blob(self, name: str) -> bool:
        self._check_writable()
        return self._place.remove(name)

    def blobs(self, prefix: str) -> list[str]:
        self._place.check()
        return [f"{prefix}/{name}" for name in self._place.names(prefix) if "." in name]

    def spaces(self) -> list[str]:
        self._place.check()
        return [name for name in self._place.names("spaces") if is_fingerprint(name)]

    def space(self, fingerprint: str, columns: Columns) -> SpaceDriver:
        return self._open_space(fingerprint, columns)

    def delete_space(self, fingerprint: str) -> bool:
        self._check_writable()
        return self._place.remove_folder(f"spaces/{fingerprint}")

    def listing(self) -> dict[str, StoredFile]:
        self._place.check()
        found = self._place.listing(exact=self._writable)
        for name in [name for name in found if name.rpartition("/")[2] in self._locks]:
            found[name] = replace(found[name], age=math.inf)
        return found

    def sweep(self, older_than: float) -> int:
        self._check_writable()
        return self._place.sweep(older_than)

    def close(self) -> None:
        self._place.close()


def open_segmented(
    format: SegmentFormat, place: Place, *, mode: str, create: bool, standing: marker.Marker | None = None
) -> PlacedStore:
    """Open a store of segments. Raises as ``marker.claim`` does."""
    marked = marker.claim(place, format.name, create=create, standing=standing)
    checked, writable = StandingPlace(place, marked), mode == "a"

    def open_space(fingerprint: str, columns: Columns) -> SpaceDriver:
        journaled = marked.version >= marker.JOURNALED
        return SegmentedSpace(format, checked, fingerprint, columns, writable=writable, journaled=journaled)

    return PlacedStore(checked, marked, open_space, mode=mode)


def open_engine(engine: SpaceEngine, root: Path, *, mode: str, create: bool, options: Mapping[str, Any]) -> PlacedStore:
    """Open a store whose spaces an engine keeps in folders.

    Raises as ``marker.claim`` does, ``BackendError`` for an option, and ``StoreError`` where the engine cannot work.
    """
    check_options(engine.name, options, engine.options)
    check_folder(root)
    engine.check_folder(root)
    place = LocalPlace(root)
    marked = marker.claim(place, engine.name, create=create)
    standing, writable = StandingPlace(place, marked), mode == "a"

    def open_space(fingerprint: str, columns: Columns) -> SpaceDriver:
        standing.check()  # before an engine makes anything
        opened = engine.open(root / "spaces" / fingerprint, columns, writable=writable, options=options)
        return StandingSpace(opened, standing)

    return PlacedStore(standing, marked, open_space, mode=mode, locks=engine.locks)


def check_folder(root: Path) -> None:
    """Raise ``NotAStoreError`` for what is there and is no folder."""
    with translated(f"cannot look at {root}"):
        if root.exists() and not root.is_dir():
            raise NotAStoreError(f"{root} is a file; a store is a folder")


def check_options(backend: str, options: Mapping[str, Any], known: frozenset[str]) -> None:
    """Raise ``BackendError`` for options that a backend does not have."""
    unknown = sorted(set(options) - known)
    if unknown:
        has = f"it has {', '.join(map(repr, sorted(known)))}" if known else "it has none"
        raise BackendError(f"a {backend} store has no option {unknown[0]!r}; {has}")
