"""Which spaces stay: pinning, and pruning, which is planned first and done then."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import Progress, open_space, select_spaces
from actcache.backend import StoredFile
from actcache.errors import DataError, ModelError, UsageError
from actcache.format.keys import Keys, Windows, key_array, key_list
from actcache.format.recipe import Recipe
from actcache.store.document_entries import stored_windows
from actcache.store.footprint import age_of_last_write, footprint_of
from actcache.store.last_use import HOUR
from actcache.store.last_use import NAME as USED
from actcache.store.store import SWEEP_SECONDS, Store

_PIN = "pinned.json"

PINNED = "pinned"  # why a space stays that somebody has pinned
IDLE_SECONDS = 600.0  # a space that was written to so many seconds ago may have a writer at work


@dataclass(frozen=True)
class SpaceState:
    """What decides whether a space may go. Ages are seconds, by the clock of the place."""

    fingerprint: str
    recipe: Recipe | None  # None where it cannot be read
    nbytes: int  # on the medium
    made: float
    written: float
    used: float  # since it was last read or written through a store that was opened for writing
    pinned: bool


def space_states(store: Store) -> list[SpaceState]:
    """Return the state of every space, in the order of their fingerprints; of unreadable ones, too."""
    files = store.driver.listing()
    return [_state_of(store, fingerprint, files) for fingerprint in store.fingerprints()]


def _state_of(store: Store, fingerprint: str, files: dict[str, StoredFile]) -> SpaceState:
    folder = f"spaces/{fingerprint}"
    recipe = None
    with suppress(DataError):
        recipe = store.recipe(fingerprint)
    last = age_of_last_write(files, fingerprint)
    ages = [file.age for name, file in files.items() if name.startswith(f"{folder}/") and file.age != math.inf]
    age = last if last is not None else max(ages, default=0.0)
    made, used = files.get(f"{folder}/recipe.json"), files.get(f"{folder}/{USED}")
    return SpaceState(
        fingerprint,
        recipe,
        footprint_of(files).of_space(fingerprint),
        max(ages, default=0.0) if made is None else made.age,
        age,
        age if used is None else min(age, used.age),
        is_pinned(files, fingerprint),
    )


def is_pinned(files: Container[str], fingerprint: str) -> bool:
    """Return whether somebody has protected a space, by the files of its store."""
    return f"spaces/{fingerprint}/{_PIN}" in files


def pin(store: Store, prefixes: Sequence[str]) -> list[str]:
    """Protect spaces from every pruning; return their fingerprints."""
    found = select_spaces(store, prefixes)
    note = json.dumps({"pinned": round(time.time())}).encode() + b"\n"
    for fingerprint in found:
        store.driver.write_blob(f"spaces/{fingerprint}/{_PIN}", note, replace=False)
    return found


def unpin(store: Store, prefixes: Sequence[str]) -> list[str]:
    """Take that protection away; return the fingerprints of the spaces."""
    found = select_spaces(store, prefixes)
    for fingerprint in found:
        store.driver.delete_blob(f"spaces/{fingerprint}/{_PIN}")
    return found


def why_protected(state: SpaceState, idle: float) -> str | None:
    """Return why a space must stay, None where it may go."""
    if state.pinned:
        return PINNED
    if state.written < idle:
        return f"written to {state.written:.0f} s ago: somebody may be at work"
    if idle and state.used < idle + HOUR:  # uses are noted once an hour
        return f"used {state.used / 60:.0f} min ago: somebody may be reading it"
    return None


@dataclass(frozen=True)
class Removal:
    """A space that goes, or some of its entries."""

    fingerprint: str
    nbytes: int  # about what is given back
    why: str
    keys: NDArray[np.uint8] | None = None  # [n, 32]; None: the whole space


@dataclass(frozen=True)
class PruningPlan:
    """What a pruning will do."""

    removals: list[Removal]
    kept: dict[str, str]  # fingerprint -> why, of what was chosen and stays
    temporary: int  # bytes that killed writers left behind
    nbytes: int  # of the whole store, as it is
    max_bytes: int | None = None
    idle: float = IDLE_SECONDS
    left_behind: float = SWEEP_SECONDS  # seconds after which what a killed writer left goes
    unfitting: dict[str, list[str]] = field(default_factory=dict)  # what no space fits: field -> the values there are

    @property
    def freed(self) -> int:
        """About the bytes that are given back."""
        return self.temporary + sum(removal.nbytes for removal in self.removals)


def plan_pruning(
    store: Store,
    *,
    prefixes: Sequence[str] = (),
    where: Mapping[str, str] | None = None,
    older_than: float | None = None,
    unused_for: float | None = None,
    max_bytes: int | None = None,
    keep_only: Keys | None = None,
    stride: int | None = None,
    passages: Callable[[Recipe], Keys] | None = None,
    idle: float = IDLE_SECONDS,
    left_behind: float = SWEEP_SECONDS,
) -> PruningPlan:
    """Say what a pruning would remove; changes nothing.

    The first four choose spaces: those that fit all of them. Of these, all go; or, with ``max_bytes``, only so many as
    the budget demands, those first whose last use is longest ago; or, with ``keep_only``, only entries of theirs. With
    nothing chosen and neither of the two, only what killed writers left behind goes.

    Args:
        where: fields of a recipe, of its identity or provenance (``model``, ``layer``, ``dtype``,
            ``config.hidden_act``, ...), as texts. ``dtype`` is what rows are stored as, lineage included (``float32 via
            float16``), and ``via`` is empty where there is none.
        older_than, unused_for: seconds since the space was made, and last used.
        max_bytes: what the whole store may take on its medium.
        keep_only: keys of documents; entries of others go.
        stride: of the windows by which documents were cut, in spaces that have windows; None leaves such spaces alone.
        passages: returns the keys of the documents' passages, in spaces that have passages (``ModelError`` where it
            cannot tell them); None where ``keep_only`` are these already, as those of a collection are.
        idle: a space that was written to fewer seconds ago, or read an hour and so many ago, is left alone; with 0
            none is.
        left_behind: seconds after which a temporary file or an unfinished upload is a killed writer's. Less than a live
            one takes for a segment endangers its work.

    Raises:
        UsageError: no recipe has a field, or ``max_bytes`` and ``keep_only`` are both given.
    """
    if max_bytes is not None and keep_only is not None:
        raise UsageError("a budget and a corpus at once: prune by one after the other")
    wanted = None if keep_only is None else key_array(keep_only)
    files = store.driver.listing()
    found = footprint_of(files)
    conditions = (older_than, unused_for, max_bytes, keep_only)
    where = where or {}
    named = _named(store, prefixes, where)
    fields = [(state, _fields(state.recipe)) for state in named]
    fitting = [state for state, known in fields if all(known.get(name) == value for name, value in where.items())]
    unfitting = {} if fitting else _unfitting(named, where)
    candidates = [
        state
        for state in fitting
        if (older_than is None or state.made >= older_than) and (unused_for is None or state.used >= unused_for)
    ]
    if not prefixes and not where and all(condition is None for condition in conditions):
        candidates = []
    temporary = sum(f.nbytes for n, f in files.items() if n.startswith("tmp/") and f.age >= left_behind)
    removals: list[Removal] = []
    kept: dict[str, str] = {}
    excess = None if max_bytes is None else found.total - temporary - max_bytes
    for state in sorted(candidates, key=lambda state: -state.used) if max_bytes is not None else candidates:
        if excess is not None and excess <= 0:
            break
        reason = why_protected(state, idle)
        if reason is None and wanted is not None:
            removal, reason = _removal_of_others(store, state, wanted, stride, passages)
        else:
            alone = max_bytes is not None and state.nbytes > max_bytes
            budget = f"least recently used{'; it alone takes more than the budget' if alone else ''}"
            removal = Removal(state.fingerprint, state.nbytes, "chosen" if max_bytes is None else budget)
        if reason is not None:
            kept[state.fingerprint] = reason
        elif removal is not None:
            removals.append(removal)
            excess = None if excess is None else excess - removal.nbytes
    return PruningPlan(removals, kept, temporary, found.total, max_bytes, idle, left_behind, unfitting)


def _named(store: Store, prefixes: Sequence[str], where: Mapping[str, str]) -> list[SpaceState]:
    """Return the spaces with a prefix; refuse fields that no recipe of the store has."""
    everything, names = space_states(store), set(select_spaces(store, prefixes))
    fields = {field for state in everything for field in _fields(state.recipe)}
    for name in where:
        if name not in fields:
            there = ", ".join(sorted(fields)) or "none"
            raise UsageError(f"no recipe of {store.url} has a field {name!r}; there are {there}")
    return [state for state in everything if state.fingerprint in names]


def _unfitting(spaces: list[SpaceState], where: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the values that there are of fields which no space fits; of all fields where each is fitted by some."""
    fields = [_fields(state.recipe) for state in spaces]
    values = {name: sorted({known[name] for known in fields if name in known}) for name in where}
    return {name: there for name, there in values.items() if where[name] not in there} or values


def _fields(recipe: Recipe | None) -> dict[str, str]:
    """Return the fields of a recipe as texts."""
    if recipe is None:
        return {}
    identity: dict[str, Any] = recipe.identity()
    config = {f"config.{name}": value for name, value in identity.pop("config").items()}
    identity |= {"dtype": recipe.stored_as, "via": ", ".join(recipe.via), "model": recipe.model}
    return {name: str(value) for name, value in {**recipe.provenance, **config, **identity}.items()}


def _removal_of_others(
    store: Store,
    state: SpaceState,
    documents: NDArray[np.uint8],
    stride: int | None,
    passages: Callable[[Recipe], Keys] | None,
) -> tuple[Removal | None, str | None]:
    """Return the removal of what belongs to no document of a corpus; or why the space is left alone; or neither."""
    try:
        with open_space(store, state.fingerprint) as space:
            recipe = space.recipe
            if recipe.too_long == "windows":
                if stride is None or recipe.max_length is None:
                    return None, "holds windows of documents: say by which stride they were cut"
                windows = stored_windows(space, key_list(documents), Windows(recipe.max_length, stride))
                documents = key_array([window.key for window in windows])
            if recipe.too_long == "passages" and passages is not None:
                documents = key_array(passages(recipe))
            keys = space.key_array()
            others = keys[~_among(keys, documents)]
            if len(others) == len(keys) and len(keys):
                return None, "none of the corpus is in it: prune it by name if it is to go"
            if not len(others):
                return None, None
            share = int(space.lengths(others).sum()) / max(1, space.usage().tokens)
    except (DataError, ModelError) as error:
        return None, str(error)
    return Removal(state.fingerprint, int(share * state.nbytes), "not in the corpus", others), None


def _among(keys: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which keys are among others, ``[n]``."""
    plain = np.dtype((np.void, keys.shape[1]))
    one, other = (np.ascontiguousarray(some).view(plain).ravel() for some in (keys, others))
    found: NDArray[np.bool_] = np.isin(one, other)
    return found


@dataclass(frozen=True)
class Pruning:
    """What a pruning did."""

    spaces: list[str]  # that are gone
    entries: dict[str, int]  # deleted, by fingerprint
    swept: int  # files that killed writers had left
    nbytes: int  # of the whole store now
    skipped: dict[str, str] = field(default_factory=dict)  # fingerprint -> what has changed since it was planned


def prune(store: Store, plan: PruningPlan, *, progress: Progress | None = None) -> Pruning:
    """Do what was planned; what is pinned or written to by now is left alone. Safe to interrupt and to plan anew.

    Entries are deleted at once; their bytes are given back by compaction, of which replaced segments stay for readers
    until their grace period is over.
    """
    swept = store.sweep(plan.left_behind)
    spaces: list[str] = []
    entries: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for number, removal in enumerate(plan.removals):
        name = removal.fingerprint
        reason = why_protected(_state_of(store, name, store.driver.listing()), plan.idle)
        if reason is not None:
            skipped[name] = reason
        elif removal.keys is None:
            if store.delete_space(name):
                spaces.append(name)
        else:
            with open_space(store, name) as space:
                entries[name] = space.delete(removal.keys)
                space.compact()
        if progress is not None:
            progress("prune", number + 1, len(plan.removals))
    return Pruning(spaces, entries, swept, footprint_of(store.driver.listing()).total, skipped)
