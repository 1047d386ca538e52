"""Spaces in full: what they hold, by which recipe, since when, in which segments, and what a sample of them says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actcache.admin.inspection import Progress, SpaceReport, chosen, opened
from actcache.admin.report.sample import SAMPLE, Sample, read_sample
from actcache.admin.report.segments import SegmentReport, damaged_segments, segments_of
from actcache.admin.report.statistics import Lengths
from actcache.backend import StoredFile
from actcache.errors import DataError
from actcache.format.recipe import Recipe
from actcache.store.footprint import Footprint, footprint, written
from actcache.store.space import Space
from actcache.store.store import Store

_COMPUTED_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class SpaceDetail:
    """One space in full. Ages are seconds, by the clock of the place."""

    report: SpaceReport
    made: float | None  # age of its recipe's file
    owner: str | None  # whose file that is, where the place knows
    written: float | None  # age of the last change to its entries
    parts: dict[str, int]  # bytes on the medium, by part (see ``Footprint``)
    lengths: Lengths
    segments: list[SegmentReport]
    sample: Sample

    @property
    def recipe(self) -> Recipe:
        return self.report.recipe

    @property
    def intact(self) -> bool:
        """Whether every segment can be read, and nothing that was read is corrupt."""
        return not self.report.damaged and not self.sample.corrupt

    @property
    def computed_bytes(self) -> int:
        """The bytes of all entries' rows in the dtype in which they were computed."""
        recipe = self.recipe
        return self.report.usage.tokens * recipe.hidden_size * _COMPUTED_BYTES[recipe.compute_dtype]

    @property
    def bytes_per_token(self) -> float | None:
        """The bytes of the segments, of each token that they serve; None where there is none."""
        usage = self.report.usage
        return usage.nbytes / usage.tokens if usage.tokens else None

    @property
    def ratio(self) -> float | None:
        """The bytes of the segments, of ``computed_bytes``: below 1 where storing made them smaller."""
        return self.report.usage.nbytes / self.computed_bytes if self.computed_bytes else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            **self.report.to_json(),
            "made": self.made,
            "owner": self.owner,
            "written": self.written,
            "parts": self.parts,
            "computed_bytes": self.computed_bytes,
            "bytes_per_token": self.bytes_per_token,
            "ratio": self.ratio,
            "lengths": self.lengths.to_json(),
            "segment_list": [segment.to_json() for segment in self.segments],
            "sample": self.sample.to_json(),
            "intact": self.intact,
        }


@dataclass(frozen=True)
class Survey:
    """Spaces of a store in full, those that cannot be read (fingerprint -> what is wrong), and the rest of it."""

    store: str
    time: float  # when this was made, in seconds since 1970
    spaces: list[SpaceDetail]
    unreadable: dict[str, str]
    collections: list[str]
    footprint: Footprint

    @property
    def intact(self) -> bool:
        return not self.unreadable and all(space.intact for space in self.spaces)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "store": self.store,
            "time": self.time,
            "spaces": [space.to_json() for space in self.spaces],
            "unreadable": self.unreadable,
            "collections": self.collections,
            "bytes": self.footprint.total,
            "intact": self.intact,
        }


def survey(
    store: Store,
    prefixes: Sequence[str] = (),
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Look at spaces in full.

    Args:
        prefixes: of their fingerprints; all spaces where there are none.
        sample: entries of each space that are read, drawn at random by ``seed`` and compared with their checksums; None
            for all of them, and for a look at every segment without the help of an index.
        progress: told the fingerprint, and entries.

    Raises:
        UsageError: a prefix fits no space, or several; ``sample`` or ``seed`` is negative.
    """
    files = store.driver.listing()
    sizes = footprint(files)
    spaces, unreadable = [], {}
    for fingerprint in chosen(store, prefixes):
        try:
            with opened(store, fingerprint) as space:
                spaces.append(_detail(space, files, sizes.spaces.get(fingerprint, {}), sample, seed, progress))
        except DataError as error:
            unreadable[fingerprint] = str(error)
    return Survey(store.url, time.time(), spaces, unreadable, store.collections(), sizes)


def _detail(
    space: Space,
    files: dict[str, StoredFile],
    parts: dict[str, int],
    sample: int | None,
    seed: int,
    progress: Progress | None,
) -> SpaceDetail:
    fingerprint = space.recipe.fingerprint
    damaged = damaged_segments(space, thorough=sample is None)
    keys = space.key_array()
    made = files.get(f"spaces/{fingerprint}/recipe.json")
    told = None if progress is None else lambda done, total: progress(fingerprint, done, total)
    return SpaceDetail(
        SpaceReport(space.recipe, space.usage(), damaged),
        None if made is None else made.age,
        None if made is None else made.owner,
        written(files, fingerprint),
        parts,
        Lengths.of(space.lengths(keys)),
        segments_of(space, files, damaged, keys),
        read_sample(space, keys, sample, seed=seed, progress=told),
    )
