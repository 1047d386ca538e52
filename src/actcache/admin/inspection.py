"""What a store holds, as plain data: the library side of ``cachectl inspect``, ``ls``, ``du`` and ``verify``.

One damaged space never hides the others: it is named with what is wrong, and the rest is told. Here and in the modules
that use this one, ``prefixes`` are of the fingerprints of spaces, all where there are none; one that fits no space, or
several, is a ``UsageError``. ``progress`` is told the fingerprint, and entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from actcache.admin.display import as_json, fields_as_json
from actcache.backend import Usage
from actcache.errors import DataError, UsageError
from actcache.format.recipe import Recipe
from actcache.store.collection import Collection
from actcache.store.space import IntegrityReport, Repair, Space
from actcache.store.store import Store

T = TypeVar("T")
R = TypeVar("R", bound=Repair)

#: Called with how much of a step is done, and how much there is.
StepProgress = Callable[[int, int], None]
#: Called with what is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SpaceReport:
    """One space: its recipe, what it holds, and which of its segments could not be read (name -> what is wrong)."""

    recipe: Recipe
    usage: Usage
    damaged: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        recipe = self.recipe
        return {"space": recipe.fingerprint, **recipe.to_json(), **as_json(self.usage), "damaged": self.damaged}


@dataclass(frozen=True)
class StoreReport:
    """A store: its spaces by fingerprint, those that cannot be read (fingerprint -> what is wrong), its collections."""

    spaces: list[SpaceReport]
    unreadable: dict[str, str]
    collections: list[str]


def select_spaces(store: Store, prefixes: Sequence[str] = ()) -> list[str]:
    """Return the fingerprints that begin with one of some prefixes, in their order."""
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
def open_space(store: Store, fingerprint: str) -> Iterator[Space]:
    """Open a space by its fingerprint, to look after it: it does not count as used.

    Raises:
        DataError: its recipe is damaged, missing, or of a newer release; or nothing of it can be read safely.
    """
    recipe = store.recipe(fingerprint)
    if recipe is None:
        raise DataError(
            f"space {fingerprint} has no recipe.json: a deletion was cut short, or the file was lost; opening the "
            "space with its recipe writes it again, deleting the space removes the rest"
        )
    with store.space(recipe) as space:
        space.leave_no_trace()
        yield space


def each_space(
    store: Store,
    prefixes: Sequence[str],
    work: Callable[[Space], T],
    failures: type[Exception] | tuple[type[Exception], ...] = DataError,
) -> tuple[dict[str, T], dict[str, str]]:
    """Open spaces one after another; one that fails, by one of ``failures``, keeps no other from its turn.

    Returns:
        What ``work`` returned, and what was wrong with the others, both by fingerprint.
    """
    done, failed = {}, {}
    for fingerprint in select_spaces(store, prefixes):
        try:
            with open_space(store, fingerprint) as space:
                done[fingerprint] = work(space)
        except failures as error:
            failed[fingerprint] = str(error)
    return done, failed


def step_of(progress: Progress | None, step: str) -> StepProgress | None:
    """Return what tells of one step of some work; None where nobody listens."""
    return None if progress is None else partial(progress, step)


def inspect(store: Store, prefixes: Sequence[str] = ()) -> StoreReport:
    """Describe the spaces of a store. Reads keys, no activations."""
    spaces, unreadable = each_space(store, prefixes, report_on)
    return StoreReport(list(spaces.values()), unreadable, store.collections())


def report_on(space: Space) -> SpaceReport:
    """Describe a space. Reads keys, no activations."""
    return SpaceReport(space.recipe, space.usage(), space.damaged())


# --- verifying and repairing ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreIntegrityReport:
    """What ``verify`` found, by fingerprint."""

    spaces: dict[str, IntegrityReport]
    unreadable: dict[str, str]

    @property
    def intact(self) -> bool:
        return not self.unreadable and all(found.intact for found in self.spaces.values())


def verify(
    store: Store, prefixes: Sequence[str] = (), *, sample: int | None = None, progress: Progress | None = None
) -> StoreIntegrityReport:
    """Read the entries of a store and compare them with their checksums, on all processors; changes nothing.

    Args:
        sample: entries of each space that are read, drawn at random; None for all.
    """

    def verify_space(space: Space) -> IntegrityReport:
        return space.verify(step_of(progress, space.recipe.fingerprint), sample=sample)

    return StoreIntegrityReport(*each_space(store, prefixes, verify_space))


@dataclass(frozen=True)
class StoreRepair(Generic[R]):
    """What a repair did, by fingerprint; what is unreadable was left alone."""

    spaces: dict[str, R]
    unreadable: dict[str, str]


def repair(store: Store, prefixes: Sequence[str] = (), *, progress: Progress | None = None) -> StoreRepair[Repair]:
    """Verify the spaces of a store and quarantine what is corrupt: it becomes a miss, its bytes are kept aside."""

    def repair_space(space: Space) -> Repair:
        found = space.verify(step_of(progress, space.recipe.fingerprint))
        return Repair([], []) if found.intact else space.repair(found)

    return StoreRepair(*each_space(store, prefixes, repair_space))


@dataclass(frozen=True)
class Coverage:
    """How much of a collection a space has. Of one whose documents are lists of passages, these are counted."""

    documents: int
    present: int
    passages: Repetition | None = None


@dataclass(frozen=True)
class Repetition:
    """How often the passages of a collection stand there, and what that spares: of the tokens that a space has."""

    documents: int
    passages: int
    distinct: int
    tokens: int  # of the passages wherever they stand, special tokens and context included
    distinct_tokens: int

    def to_json(self) -> dict[str, Any]:
        return fields_as_json(self, "share")

    @property
    def share(self) -> float:
        """The share of the tokens that are not stored, for their passage is stored already."""
        return 1 - self.distinct_tokens / self.tokens if self.tokens else 0.0

    def told(self) -> str:
        """Return it for people."""
        return (
            f"{self.documents:,} documents of {self.passages:,} passages, {self.distinct:,} of them different; "
            f"{self.share:.1%} of the tokens are repeated"
        )


def repetition(space: Space, collection: Collection) -> Repetition | None:
    """Return how often passages of a collection stand there; None where its documents are whole."""
    if collection.documents is None:
        return None
    lengths = space.lengths(collection.keys)
    first = collection.first
    sizes = int(lengths.sum()), int(lengths[first].sum())
    return Repetition(collection.document_count, len(lengths), len(first), *sizes)


def repetitions(store: Store, space: Space) -> dict[str, Repetition]:
    """Return how often passages of this space stand in the store's collections, by name; damaged ones are left out."""
    found = {}
    for name in store.collections() if space.recipe.too_long == "passages" else ():
        with suppress(DataError):
            collection = store.collection(name)
            held = repetition(space, collection)
            if held is not None and space.contains(collection.keys).any():
                found[name] = held
    return found


def coverage(store: Store, space: Space) -> dict[str, Coverage | str]:
    """Return how much of each collection a space has, name -> coverage, or what is wrong with the collection."""
    found: dict[str, Coverage | str] = {}
    for name in store.collections():
        try:
            collection = store.collection(name)
        except DataError as error:
            found[name] = str(error)
        else:
            present = int(space.contains(collection.keys).sum())
            found[name] = Coverage(len(collection), present, repetition(space, collection) if present else None)
    return found
