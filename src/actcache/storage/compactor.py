"""What a space does with compaction: publish merged segments, remove what they replace, forget settled deletions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from actcache.backend import BytesDone, Compaction
from actcache.errors import DataError, SegmentGoneError
from actcache.storage.compaction import SECONDS, Live, Merger, plan, survey
from actcache.storage.segment import Segment
from actcache.storage.snapshot import SegmentedSnapshot

if TYPE_CHECKING:
    from actcache.storage.space import SegmentedSpace

logger = logging.getLogger(__name__)

_NO_LIMIT, _ANY_WASTE = 1 << 62, 2.0


def compact(
    space: SegmentedSpace,
    *,
    target_bytes: int,
    waste: float,
    grace: float,
    progress: BytesDone = lambda done, total: None,
) -> Compaction:
    """Merge what is small or wasteful, and remove what has long been replaced. See ``SpaceDriver.compact``."""
    with ExitStack() as stack:
        lives = survey(space.snapshot())
        if plan(lives, target_bytes, waste) or not all(live.tokens for live in lives):
            stack.enter_context(space.without_index())
        snapshot = space.snapshot()
        groups = plan(survey(snapshot), target_bytes, waste)
        moved = Moved(2 * sum(live.nbytes for group in groups for live in group), progress)  # written, and read back
        merged = [group for group in groups if merge(space, snapshot, group, moved)]
        removed, freed = remove_replaced(space, grace)
        more, bytes_more = remove_dead(space, grace)
        settle_tombstones(space, grace)
    return Compaction(sum(map(len, merged)), len(merged), removed + more, freed + bytes_more)


class Moved:
    """Counts the bytes of rows that a compaction has written or read back."""

    def __init__(self, total: int, progress: BytesDone = lambda done, total: None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def __call__(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(min(self._done, self._total), self._total)


def merge(
    space: SegmentedSpace,
    snapshot: SegmentedSnapshot,
    group: Sequence[Live],
    moved: Callable[[int], None] = lambda nbytes: None,
) -> str:
    """Publish one segment in the place of some; return its name, an empty one where that could not be done.

    Where another compactor has removed a source, or one is damaged, everything stays as it is.

    Raises:
        StoreError: the disk is full, ...; nothing has changed.
    """
    try:
        merger = Merger(snapshot, group, space.columns, space.listed, moved)

        def verify(segment: Segment) -> None:
            merger.verify(segment)
            # Whoever has deleted a key since a source is gone knew nothing of what it held: an overwritten copy, say.
            if not space.stand([live.segment.name for live in group]):
                raise SegmentGoneError(f"a source of {segment.files.where} is gone")

        return space.publish(merger.block, verify)
    except SegmentGoneError as error:
        logger.info("another process has compacted the same segments: %s", error)
    except (DataError, FileNotFoundError) as error:
        logger.warning("some segments are left as they are; verify says more: %s", error)
    return ""


def merge_some(space: SegmentedSpace, names: Collection[str]) -> dict[str, int]:
    """Merge the segments of these names, those that can be; return the tokens of each new segment."""
    snapshot = space.snapshot()
    covered = space.covered()
    lives = [live for live in survey(snapshot, names) if live.segment.name not in covered or live.is_whole()]
    groups = plan(lives, _NO_LIMIT, _ANY_WASTE)
    merged = {merge(space, snapshot, group): sum(live.tokens for live in group) for group in groups}
    return {name: tokens for name, tokens in merged.items() if name}


def remove_replaced(space: SegmentedSpace, grace: float) -> tuple[int, int]:
    """Remove segments that others have replaced so many seconds ago; return how many, and their bytes."""
    removed = freed = 0
    space.snapshot()
    if not space.replaced:
        return 0, 0
    replacing: dict[str, list[str]] = {}
    for segment in space.described():
        for source in segment.sources:
            replacing.setdefault(source, []).append(segment.name)
    sizes = {segment.name: segment.nbytes for segment in space.described()}
    ages = _Ages(space)
    for name in sorted(space.replaced):
        if any(ages.segment(by) >= grace for by in replacing[name]) and space.place.remove(space.segment_name(name)):
            removed, freed = removed + 1, freed + sizes[name]
    return removed, freed


def remove_dead(space: SegmentedSpace, grace: float) -> tuple[int, int]:
    """Remove segments all of whose entries were deleted or overwritten so many seconds ago."""
    removed = freed = 0
    snapshot = space.snapshot()
    served, ages = snapshot.served(), _Ages(space)
    for live in survey(snapshot):
        if live.tokens:
            continue
        segment = live.segment
        try:
            keys, births = segment.read("keys"), segment.lineage().births
        except (DataError, FileNotFoundError):
            continue
        numbers = snapshot.locate(keys).segment
        newer = {served[n].name for n in np.unique(numbers[numbers >= 0]).tolist()}
        deleters = [file for file, deleted in space.tombstones.items() if not deleted.keys().isdisjoint(births)]
        youngest = min([*map(ages.segment, newer), *map(ages.tombstone, deleters)], default=-1.0)
        if youngest >= grace and space.place.remove(space.segment_name(segment.name)):
            removed, freed = removed + 1, freed + segment.nbytes
    return removed, freed


def settle_tombstones(space: SegmentedSpace, grace: float) -> None:
    """Join the tombstones into one, without entries that no segment has any more."""
    space.snapshot()
    if space.damaged:  # one that comes back from a copy brings its deleted entries with it
        return
    ages = _Ages(space)
    settled = [name for name in space.tombstones if ages.tombstone(name) >= max(grace, 2 * SECONDS)]
    if not settled:
        return
    deleted: dict[str, set[int]] = {}
    for name in settled:
        for segment, entries in space.tombstones[name].items():
            deleted.setdefault(segment, set()).update(entries)
    needed = space.still_there(deleted)
    if len(settled) == 1 and needed == deleted:
        return
    if needed:
        space.tombstones.publish(needed)
    for name in settled:
        space.place.remove(space.tombstones.path(name))


class _Ages:
    """Ages in seconds, each asked for once; what is gone is of no age."""

    def __init__(self, space: SegmentedSpace) -> None:
        self._space = space
        self._known: dict[str, float] = {}

    def segment(self, name: str) -> float:
        return self._age(self._space.segment_name(name))

    def tombstone(self, name: str) -> float:
        return self._age(self._space.tombstones.path(name))

    def _age(self, name: str) -> float:
        if name not in self._known:
            age = self._space.place.age(name)
            self._known[name] = -1.0 if age is None else max(0.0, age)
        return self._known[name]
