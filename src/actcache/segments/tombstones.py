"""Tombstones: small JSON files that say which entries of which segments are deleted.

Like the entries, they have a checksum: a flipped digit would serve what was deleted and lose another entry.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

import xxhash

from actcache.errors import FormatError
from actcache.format.recipe import canonical_json
from actcache.segments.places.place import Place, steady, unique_names
from actcache.segments.segment import next_name

_MOST_ENTRIES = 1 << 32
_SUFFIX = ".json"


class Tombstones:
    """The tombstones of a space. Not thread-safe."""

    def __init__(self, place: Place, folder: str) -> None:
        self._place = place
        self._folder = f"{folder}/tombstones"
        # Those of the last ``refresh``: name -> segment of origin -> numbers of entries.
        self.known: dict[str, dict[str, list[int]]] = {}

    def path(self, name: str) -> str:
        """Return the name of a tombstone's file at the place."""
        return f"{self._folder}/{name}{_SUFFIX}"

    def refresh(self) -> None:
        """Read those that are new; they never change. Raises ``FormatError`` where one is damaged."""
        before = set(self.known)

        def look() -> tuple[dict[str, dict[str, list[int]] | None], bool]:
            nonlocal before
            found = {name: self._read(name) for name in unique_names(self._place, self._folder, _SUFFIX)}
            # Else one was joined with others, in a new one that the listing may have missed.
            whole = None not in found.values() and before <= found.keys()
            before = set(found)
            return found, whole

        self.known = {name: deleted for name, deleted in steady(look).items() if deleted is not None}

    def deleted(self, names: Iterable[str] | None = None) -> dict[str, set[int]]:
        """Return what these tombstones (all of them) have deleted, by origin: segment -> numbers of entries."""
        dead: dict[str, set[int]] = {}
        for name in self.known if names is None else names:
            for origin, entries in self.known[name].items():
                dead.setdefault(origin, set()).update(entries)
        return dead

    def publish(self, deleted: Mapping[str, Collection[int]]) -> None:
        """Delete entries, named by their origins, durably."""
        name = next_name(unique_names(self._place, self._folder, _SUFFIX))
        data = dumps({origin: sorted(entries) for origin, entries in deleted.items()})
        self._place.publish_bytes(self.path(name), data, replace=True)

    def _read(self, name: str) -> dict[str, list[int]] | None:
        if name in self.known:
            return self.known[name]
        data = self._place.read(self.path(name))
        try:
            return None if data is None else loads(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            # Passing over it would serve deleted entries again.
            raise FormatError(
                f"{self._place.where}/{self.path(name)} is damaged ({error}); move it away to see its deletions undone"
            ) from None


def dumps(deleted: Mapping[str, Sequence[int]]) -> bytes:
    """Return the tombstone of these entries, segment name -> numbers of entries."""
    return canonical_json({"deleted": deleted, "checksum": _checksum(deleted)}).encode() + b"\n"


def loads(data: bytes) -> dict[str, list[int]]:
    """Return what ``dumps`` was given.

    Damaged data raise ValueError, KeyError, TypeError, AttributeError or RecursionError.
    """
    value = json.loads(data)
    deleted: dict[str, list[int]] = value["deleted"]
    for entries in deleted.values():
        if not all(type(entry) is int and 0 <= entry < _MOST_ENTRIES for entry in entries):
            raise ValueError("it names entries by what is no number of one")
    if value["checksum"] != _checksum(deleted):
        raise ValueError("it fails its checksum")
    return deleted


def _checksum(deleted: Mapping[str, Sequence[int]]) -> str:
    return xxhash.xxh3_64_hexdigest(canonical_json(deleted).encode())
