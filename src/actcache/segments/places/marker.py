"""The marker: the file that says that a place holds a store, of which format version and of which backend."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass

from actcache.errors import BackendError, FormatVersionError, NotAStoreError, StoreNotFoundError
from actcache.segments.places.place import Place

FORMAT_VERSION = 3
#: From this version on the index files of a space name all its segments: nobody may write one without the other.
JOURNALED = 3
_PLAIN = 1
NAME = "actcache.json"


@dataclass(frozen=True)
class Marker:
    """``data`` are its bytes; they hold a random number, so that no two stores that were made have the same."""

    version: int
    backend: str
    data: bytes


def read(place: Place) -> Marker | None:
    """Return what a place says about itself; None where it has no marker.

    Raises ``NotAStoreError`` for a damaged or foreign marker, ``FormatVersionError`` for one of a newer release.
    """
    text = place.read(NAME)
    if text is None:
        return None
    try:
        value = json.loads(text)
        marker = Marker(value["format_version"], value["backend"], bytes(text))
        if not isinstance(marker.version, int) or not isinstance(marker.backend, str):
            raise TypeError("wrong types")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotAStoreError(
            f"{place.where}/{NAME} is damaged or not actcache's ({error}); restore it from a copy"
        ) from None
    if marker.version > FORMAT_VERSION:
        raise FormatVersionError(
            f"{place.where} has format version {marker.version} and this release reads up to {FORMAT_VERSION}: "
            "upgrade actcache"
        )
    return marker


def claim(place: Place, backend: str, *, create: bool, standing: Marker | None = None) -> Marker:
    """Make sure that a place is a store of this backend; make one of an empty place where ``create`` allows it.
    ``standing`` is what the place has just said.

    Raises ``BackendError`` for another backend's store, ``NotAStoreError`` where the place holds other things, and
    ``StoreNotFoundError`` where it is empty or absent.
    """
    marker = read(place) if standing is None else standing
    if marker is None:
        names = place.names("")
        strangers = [name for name in names if name != "tmp"]
        created = NAME in names  # by another process, a moment ago
        if strangers and not created:
            raise NotAStoreError(f"{place.where} holds other files ({strangers[0]}, ...) and no {NAME}: it is no store")
        if not created:
            place.check_bucket()
        if not created and not create:
            raise StoreNotFoundError(f"there is no store at {place.where}; open it with mode='a' to create one")
        if not created:
            version = JOURNALED if place.indexes_each else _PLAIN
            value = {"format": "actcache", "format_version": version, "backend": backend}
            text = json.dumps({**value, "id": secrets.token_hex(16)})
            place.make()
            # Another process may be creating the same store: whichever marker came first stands, and is read below.
            place.publish_bytes(NAME, text.encode() + b"\n", replace=False)
        marker = read(place)
        if marker is None:
            raise NotAStoreError(f"{place.where}/{NAME} vanished while the store was being made; try again")
    if marker.backend != backend:
        raise BackendError(
            f"{place.where} is a {marker.backend} store: open it as {marker.backend}:{place.where} or by its path"
        )
    return marker
