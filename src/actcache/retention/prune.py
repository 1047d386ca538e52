"""Doing what was planned."""

from __future__ import annotations

from dataclasses import dataclass, field

from actcache.inspection import Progress, footprint, opened
from actcache.retention.plan import Plan
from actcache.retention.state import protected, state_of
from actcache.store import Store


@dataclass(frozen=True)
class Pruning:
    """What a pruning did."""

    spaces: list[str]  # that are gone
    entries: dict[str, int]  # deleted, by fingerprint
    swept: int  # files that killed writers had left
    nbytes: int  # of the whole store now
    skipped: dict[str, str] = field(default_factory=dict)  # fingerprint -> what has changed since it was planned


def prune(store: Store, planned: Plan, *, progress: Progress | None = None) -> Pruning:
    """Do what was planned; what is pinned or written to by now is left alone. Safe to interrupt and to plan anew.

    Entries are deleted at once; their bytes are given back by compaction, of which replaced segments stay for readers
    until their grace period is over.

    Raises:
        StoreError: read-only, disk, network, ...
    """
    swept = store.sweep()
    spaces: list[str] = []
    entries: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for number, removal in enumerate(planned.removals):
        name = removal.fingerprint
        reason = protected(state_of(store, name, store.driver.listing()), planned.idle)
        if reason is not None:
            skipped[name] = reason
        elif removal.keys is None:
            if store.delete_space(name):
                spaces.append(name)
        else:
            with opened(store, name) as space:
                entries[name] = space.delete(removal.keys)
                space.compact()
        if progress is not None:
            progress("prune", number + 1, len(planned.removals))
    return Pruning(spaces, entries, swept, footprint(store.driver.listing()).total, skipped)
