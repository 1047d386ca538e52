"""What a store holds, as plain data: the library side of ``cachectl inspect``, ``ls``, ``du`` and ``verify``.

One damaged space never hides the others: it is named with what is wrong, and the rest is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from actcache.backend import StoredFile, Usage
from actcache.errors import DataError, UsageError
from actcache.maintenance import Repair, Verification
from actcache.recipe import Recipe
from actcache.space import Space
from actcache.store import Store

#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

NO_RECIPE = (
    "has no recipe.json: a deletion was cut short, or the file was lost; opening the space with its recipe writes it "
    "again, deleting the space removes the rest"
)


@dataclass(frozen=True)
class SpaceReport:
    """One space: its recipe, what it holds, and which of its segments could not be read (name -> what is wrong)."""

    recipe: Recipe
    usage: Usage
    damaged: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "fingerprint": self.recipe.fingerprint,
            **self.recipe.to_json(),
            **asdict(self.usage),
            "damaged": self.damaged,
        }


@dataclass(frozen=True)
class StoreReport:
    """A store: its spaces by fingerprint, those that cannot be read (fingerprint -> what is wrong), its collections."""

    spaces: list[SpaceReport]
    unreadable: dict[str, str]
    collections: list[str]


def chosen(store: Store, prefixes: Sequence[str] = ()) -> list[str]:
    """Return the fingerprints that begin with one of some prefixes, in their order; all where none is given.

    Raises:
        UsageError: a prefix fits no space, or several.
    """
    fingerprints = store.fingerprints()
    if not prefixes:
        return fingerprints
    found = set()
    for prefix in prefixes:
        fitting = [name for name in fingerprints if name.startswith(prefix)] if prefix else []
        if len(fitting) != 1:
            what = f"{len(fitting)} spaces begin with {prefix}" if fitting else f"no space begins with {prefix!r}"
            raise UsageError(f"{what} in {store.url}; it has {', '.join(fingerprints) or 'none'}")
        found.add(fitting[0])
    return sorted(found)


@contextmanager
def opened(store: Store, fingerprint: str) -> Iterator[Space]:
    """Open a space by its fingerprint, to look after it: it does not count as used.

    Raises:
        DataError: its recipe is damaged, missing, or of a newer release; or nothing of it can be read safely.
    """
    recipe = store.recipe(fingerprint)
    if recipe is None:
        raise DataError(f"space {fingerprint} {NO_RECIPE}")
    with store.space(recipe) as space:
        space.leave_no_trace()
        yield space


def inspect(store: Store, prefixes: Sequence[str] = ()) -> StoreReport:
    """Describe the spaces of a store. Reads keys, no activations."""
    spaces, unreadable = [], {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                spaces.append(SpaceReport(space.recipe, space.usage(), space.damaged()))
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return StoreReport(spaces, unreadable, store.collections())


# --- bytes on the medium ----------------------------------------------------------------------------------------------


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


def footprint(files: dict[str, StoredFile]) -> Footprint:
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


# --- verifying and repairing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreVerification:
    """What ``verify`` found, by fingerprint."""

    spaces: dict[str, Verification]
    unreadable: dict[str, str]

    @property
    def intact(self) -> bool:
        return not self.unreadable and all(found.intact for found in self.spaces.values())


def verify(
    store: Store, prefixes: Sequence[str] = (), *, sample: int | None = None, progress: Progress | None = None
) -> StoreVerification:
    """Read the entries of a store and compare them with their checksums, on all processors; changes nothing.

    Args:
        prefixes: of the fingerprints of the spaces; all where there are none.
        sample: entries of each space that are read, drawn at random; None for all.
        progress: told the fingerprint, and entries.
    """
    spaces, unreadable = {}, {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                spaces[fingerprint] = space.verify(_named(progress, fingerprint), sample=sample)
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return StoreVerification(spaces, unreadable)


@dataclass(frozen=True)
class StoreRepair:
    """What ``repair`` did, by fingerprint; what is unreadable was left alone."""

    spaces: dict[str, Repair]
    unreadable: dict[str, str]


def repair(store: Store, prefixes: Sequence[str] = (), *, progress: Progress | None = None) -> StoreRepair:
    """Verify the spaces of a store and quarantine what is corrupt: it becomes a miss, its bytes are kept aside."""
    spaces, unreadable = {}, {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                found = space.verify(_named(progress, fingerprint))
                spaces[fingerprint] = space.repair(found) if not found.intact else Repair([], [])
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return StoreRepair(spaces, unreadable)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(what, done, total)


# --- listings ---------------------------------------------------------------------------------------------------------

#: Where a space keeps its entries, below its own folder: segments, or an engine's files.
_NOT_ENTRIES = {"index", "quarantine", "tombstones", "blobs"}


def segments(files: dict[str, StoredFile], fingerprint: str) -> dict[str, StoredFile]:
    """Return the segments (or an engine's own folders) of a space from a listing, each with all its files as one."""
    found: dict[str, StoredFile] = {}
    for parts, file in _files_of(files, fingerprint):
        if len(parts) > 1 and parts[0] not in _NOT_ENTRIES:
            known = found.get(parts[1], StoredFile(0, math.inf))
            found[parts[1]] = StoredFile(known.nbytes + file.nbytes, min(known.age, file.age), file.owner)
    return dict(sorted(found.items()))


def written(files: dict[str, StoredFile], fingerprint: str) -> float | None:
    """Return the seconds since entries were last written to or deleted from a space, or it was made; None: no files."""
    ages = [
        file.age
        for parts, file in _files_of(files, fingerprint)
        if parts[0] not in ("index", "quarantine") and (len(parts) > 1 or parts[0] == "recipe.json")
    ]
    return min(ages, default=None)


def _files_of(files: dict[str, StoredFile], fingerprint: str) -> Iterator[tuple[list[str], StoredFile]]:
    """Yield the files of a space, each by the parts of its name below the space's folder."""
    prefix = f"spaces/{fingerprint}/"
    for name, file in files.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix).split("/"), file


@dataclass(frozen=True)
class Coverage:
    """How much of a collection a space has."""

    documents: int
    present: int


def coverage(store: Store, fingerprint: str) -> dict[str, Coverage | str]:
    """Return how much of each collection a space has, name -> coverage, or what is wrong with the collection."""
    found: dict[str, Coverage | str] = {}
    with opened(store, fingerprint) as space:
        for name in store.collections():
            try:
                keys = store.collection(name).keys
            except DataError as error:
                found[name] = str(error)
            else:
                found[name] = Coverage(len(keys), int(space.contains(keys).sum()))
    return found
