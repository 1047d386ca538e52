"""Tombstones: small JSON files that say which entries of which segments are deleted.

Like the entries, they have a checksum: a flipped digit would serve what was deleted and lose another entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import xxhash

from actcache.recipe import canonical_json

_MOST_ENTRIES = 1 << 32


def dumps(deleted: Mapping[str, Sequence[int]]) -> bytes:
    """Return the tombstone of these entries, segment name -> numbers of entries."""
    return canonical_json({"deleted": deleted, "checksum": _checksum(deleted)}).encode() + b"\n"


def loads(data: bytes) -> dict[str, list[int]]:
    """Return what ``dumps`` was given.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: the data are damaged or no tombstone.
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
