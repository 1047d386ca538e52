"""A store as a tree: its spaces, their segments and what they have of each collection, and the collections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from actcache.admin.inspection import Coverage, SpaceReport, chosen, coverage, opened
from actcache.admin.report.segments import SegmentReport, segments_of
from actcache.errors import DataError
from actcache.store.store import Store


@dataclass(frozen=True)
class Branch:
    """One space: its segments, and how much it has of each collection (or what is wrong with that)."""

    report: SpaceReport
    segments: list[SegmentReport]
    collections: dict[str, Coverage | str]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        held = {name: one if isinstance(one, str) else asdict(one) for name, one in self.collections.items()}
        return {
            **self.report.to_json(),
            "segment_list": [segment.to_json() for segment in self.segments],
            "collections": held,
        }


@dataclass(frozen=True)
class Overview:
    """A store: its spaces, those that cannot be read (fingerprint -> what is wrong), and its collections, each with the
    number of its documents, or with what is wrong with it."""

    store: str
    spaces: list[Branch]
    unreadable: dict[str, str]
    collections: dict[str, int | str]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "spaces": [branch.to_json() for branch in self.spaces]}


def overview(store: Store, prefixes: Sequence[str] = ()) -> Overview:
    """Look at a store from above. Reads keys, no activations.

    Raises:
        UsageError: a prefix fits no space, or several.
    """
    files = store.driver.listing()
    spaces, unreadable = [], {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                report = SpaceReport(space.recipe, space.usage(), space.damaged())
                segments = segments_of(space, files, report.damaged, space.key_array())
            spaces.append(Branch(report, segments, coverage(store, fingerprint)))
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return Overview(store.url, spaces, unreadable, {name: _documents(store, name) for name in store.collections()})


def _documents(store: Store, name: str) -> int | str:
    try:
        return len(store.collection(name))
    except DataError as error:
        return str(error)
