"""The segments of a space: what is served from each, how old it is, whose file it is, and whether it can be read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.inspection import chosen, opened
from actcache.admin.report.sample import SAMPLE, Sample, read_sample
from actcache.admin.report.statistics import Lengths
from actcache.backend import StoredFile
from actcache.errors import DataError, UsageError
from actcache.format.recipe import Recipe
from actcache.store.footprint import segments_in
from actcache.store.space import Space
from actcache.store.store import Store

_NAMED = 5  # of several segments that a prefix fits


@dataclass(frozen=True)
class SegmentReport:
    """One segment, or the folder in which an engine keeps a space."""

    name: str  # of its file or folder
    entries: int  # that are served from it
    tokens: int  # of those
    nbytes: int | None  # of its files; None where they are not there (any more)
    age: float | None  # seconds since it was written
    owner: str | None  # whose file it is, where the place knows
    damaged: str | None  # what is wrong with it

    @property
    def state(self) -> str:
        """``served``, ``damaged``, or ``unused``: replaced by a compaction, overwritten, or deleted."""
        return "damaged" if self.damaged is not None else "served" if self.entries else "unused"

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {**vars(self), "state": self.state}


@dataclass(frozen=True)
class SegmentDetail:
    """One segment in full. Its writer is its file's owner and whoever is named by the space's provenance: segments
    record none of their own."""

    recipe: Recipe
    report: SegmentReport
    lengths: Lengths
    sample: Sample

    @property
    def intact(self) -> bool:
        """Whether it can be read, and nothing that was read of it is corrupt."""
        return self.report.damaged is None and not self.sample.corrupt

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "space": self.recipe.fingerprint,
            "provenance": self.recipe.to_json()["provenance"],
            "segment": self.report.to_json(),
            "lengths": self.lengths.to_json(),
            "sample": self.sample.to_json(),
            "intact": self.intact,
        }


def segments_of(
    space: Space, files: dict[str, StoredFile], damaged: dict[str, str], keys: NDArray[np.uint8]
) -> list[SegmentReport]:
    """Describe the segments of a space, in the order of their names.

    Args:
        files: the listing of its store.
        damaged: segments that cannot be read, name -> what is wrong.
        keys: of all its entries, ``[n, 32]``.
    """
    names, which = space.whereabouts(keys)
    there = which >= 0
    entries = np.bincount(which[there], minlength=len(names)).tolist()
    tokens = np.bincount(which[there], space.lengths(keys)[there], minlength=len(names)).tolist()
    served = {name: (count, int(length)) for name, count, length in zip(names, entries, tokens, strict=True) if count}
    listed = segments_in(files, space.recipe.fingerprint)
    by_stem = {stem_of(name): name for name in listed}
    reports = []
    for stem in sorted(by_stem.keys() | served.keys() | damaged.keys()):
        name = by_stem.get(stem, stem)
        file = listed.get(name)
        age = None if file is None or file.age == math.inf else file.age
        nbytes, owner = (None, None) if file is None else (file.nbytes, file.owner)
        reports.append(SegmentReport(name, *served.get(stem, (0, 0)), nbytes, age, owner, damaged.get(stem)))
    return reports


def stem_of(name: str) -> str:
    """Return the name of a segment from its file's."""
    return name.partition(".")[0]


def segment_detail(
    store: Store,
    prefix: str,
    spaces: Sequence[str] = (),
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> SegmentDetail:
    """Look at one segment.

    Args:
        prefix: how its name begins; a full name wins over longer ones.
        spaces: prefixes of the fingerprints of spaces, where segments of several have that name.
        sample: entries of it that are read, drawn at random by ``seed``; None for all.
        progress: told its name, and entries.

    Raises:
        UsageError: no segment is named so, or several are.
        DataError: its space cannot be read.
    """
    files = store.driver.listing()
    fingerprints = chosen(store, spaces)
    fitting = []
    for fingerprint in fingerprints:
        names = [name for name in segments_in(files, fingerprint) if prefix and name.startswith(prefix)]
        exact = [name for name in names if prefix in (name, stem_of(name))]
        fitting += [(fingerprint, name) for name in exact or names]
    if len(fitting) != 1:
        if fitting:
            what = ", ".join(f"{name} of space {fingerprint}" for fingerprint, name in fitting[:_NAMED])
            raise UsageError(f"{len(fitting)} segments begin with {prefix}: {what}; say more of it, or give --space")
        raise UsageError(f"no segment of {store.url} begins with {prefix!r}; cachectl ls --tree lists them")
    fingerprint, name = fitting[0]
    with opened(store, fingerprint) as space:
        damaged = damaged_segments(space, thorough=sample is None)
        keys = space.key_array()
        reports = {report.name: report for report in segments_of(space, files, damaged, keys)}
        if name not in reports:  # compacted and removed meanwhile
            raise DataError(f"{name} of space {fingerprint} is gone; run it again")
        names, which = space.whereabouts(keys)
        keys = keys[np.isin(which, [i for i, known in enumerate(names) if known == stem_of(name)])]
        told = None if progress is None else lambda done, total: progress(name, done, total)
        read = read_sample(space, keys, sample, seed=seed, progress=told)
        return SegmentDetail(space.recipe, reports[name], Lengths.of(space.lengths(keys)), read)


def damaged_segments(space: Space, *, thorough: bool) -> dict[str, str]:
    """Return which segments are damaged, name -> what is wrong.

    Args:
        thorough: whether to look at each of them anew, trusting no index. lmdb's whole file is walked for that.
    """
    return space.verify(sample=0).damaged if thorough else space.damaged()
