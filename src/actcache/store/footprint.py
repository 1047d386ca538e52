"""What a listing of a store's files says: the bytes of each space by its parts, its segments, its age."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from actcache.backend import StoredFile


@dataclass(frozen=True)
class Footprint:
    """What lies in a store, in bytes: each space by its parts (``segments``, ``index``, ...), and the rest.

    A space's part is its subfolder's name; files of the space's own folder (its recipe, canaries) are ``blobs``.
    """

    spaces: dict[str, dict[str, int]] = field(default_factory=dict)
    collections: int = 0
    temporary: int = 0  # what is being written, or was left behind
    other: int = 0

    @property
    def total(self) -> int:
        return sum(map(self.of_space, self.spaces)) + self.collections + self.temporary + self.other

    def of_space(self, fingerprint: str) -> int:
        """Return the bytes of a space, 0 where it is not there."""
        return sum(self.spaces.get(fingerprint, {}).values())


def footprint_of(files: dict[str, StoredFile]) -> Footprint:
    """Add up a listing (``store.driver.listing()``)."""
    spaces: dict[str, dict[str, int]] = {}
    rest = {"collections": 0, "tmp": 0, "": 0}
    for name, file in files.items():
        first, *parts = name.split("/")
        if first == "spaces" and len(parts) > 1:
            parts_of_space = spaces.setdefault(parts[0], {})
            part = parts[1] if len(parts) > 2 else "blobs"
            parts_of_space[part] = parts_of_space.get(part, 0) + file.nbytes
        else:
            rest[first if parts and first in rest else ""] += file.nbytes
    return Footprint(dict(sorted(spaces.items())), rest["collections"], rest["tmp"], rest[""])


#: Where a space keeps its entries, below its own folder: segments, or an engine's files.
_NOT_ENTRIES = {"index", "statistics", "quarantine", "tombstones", "blobs", "fills"}


def segments_in(files: dict[str, StoredFile], fingerprint: str) -> dict[str, StoredFile]:
    """Return the segments (or an engine's own folders) of a space from a listing, each with all its files as one."""
    found: dict[str, StoredFile] = {}
    for parts, file in _files_of(files, fingerprint):
        if len(parts) > 1 and parts[0] not in _NOT_ENTRIES:
            known = found.get(parts[1], StoredFile(0, math.inf))
            found[parts[1]] = StoredFile(known.nbytes + file.nbytes, min(known.age, file.age), file.owner)
    return dict(sorted(found.items()))


def age_of_last_write(files: dict[str, StoredFile], fingerprint: str) -> float | None:
    """Return the seconds since entries were last written to or deleted from a space, or it was made; None: no files."""
    ages = [
        file.age
        for parts, file in _files_of(files, fingerprint)
        if parts[0] not in ("index", "quarantine", "statistics", "fills")
        and (len(parts) > 1 or parts[0] == "recipe.json")
    ]
    return min(ages, default=None)


def _files_of(files: dict[str, StoredFile], fingerprint: str) -> Iterator[tuple[list[str], StoredFile]]:
    """Yield the files of a space, each by the parts of its name below the space's folder."""
    prefix = f"spaces/{fingerprint}/"
    for name, file in files.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix).split("/"), file
