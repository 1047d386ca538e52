"""How a space stands: its age, its last use, whether it is pinned; what protects it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from actcache.backend import StoredFile
from actcache.errors import DataError
from actcache.inspection import chosen, footprint, written
from actcache.lastuse import HOUR
from actcache.lastuse import NAME as USED
from actcache.recipe import Recipe
from actcache.store import Store

_PIN = "pinned.json"

#: Why a space stays that somebody has pinned.
PINNED = "pinned"

#: A space that was written to so many seconds ago may have a writer at work.
IDLE_SECONDS = 600.0


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


def states(store: Store) -> list[SpaceState]:
    """Return the state of every space, in the order of their fingerprints; of unreadable ones, too."""
    files = store.driver.listing()
    return [state_of(store, fingerprint, files) for fingerprint in store.fingerprints()]


def state_of(store: Store, fingerprint: str, files: dict[str, StoredFile]) -> SpaceState:
    folder = f"spaces/{fingerprint}"
    try:
        recipe = store.recipe(fingerprint)
    except DataError:
        recipe = None
    last = written(files, fingerprint)
    ages = [file.age for name, file in files.items() if name.startswith(f"{folder}/") and file.age != math.inf]
    age = last if last is not None else max(ages, default=0.0)
    made = files.get(f"{folder}/recipe.json")
    used = files.get(f"{folder}/{USED}")
    return SpaceState(
        fingerprint,
        recipe,
        footprint(files).of_space(fingerprint),
        max(ages, default=0.0) if made is None else made.age,
        age,
        age if used is None else min(age, used.age),
        f"{folder}/{_PIN}" in files,
    )


def pin(store: Store, prefixes: Sequence[str]) -> list[str]:
    """Protect spaces from every pruning; return their fingerprints.

    Raises:
        UsageError: a prefix fits no space, or several.
        ReadOnlyError: the store was opened with ``mode="r"``.
    """
    found = chosen(store, prefixes)
    note = json.dumps({"pinned": round(time.time())}).encode() + b"\n"
    for fingerprint in found:
        store.driver.write_blob(f"spaces/{fingerprint}/{_PIN}", note, replace=False)
    return found


def unpin(store: Store, prefixes: Sequence[str]) -> list[str]:
    """Take that protection away; return the fingerprints of the spaces. Raises as ``pin`` does."""
    found = chosen(store, prefixes)
    for fingerprint in found:
        store.driver.delete_blob(f"spaces/{fingerprint}/{_PIN}")
    return found


def protected(state: SpaceState, idle: float) -> str | None:
    """Return why a space must stay, None where it may go."""
    if state.pinned:
        return PINNED
    if state.written < idle:
        return f"written to {state.written:.0f} s ago: somebody may be at work"
    if idle and state.used < idle + HOUR:  # uses are noted once an hour
        return f"used {state.used / 60:.0f} min ago: somebody may be reading it"
    return None
