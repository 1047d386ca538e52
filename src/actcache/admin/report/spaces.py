"""Stores, spaces and segments in full: what they hold, since when, in which files, and what a sample of them says."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin import inspection
from actcache.admin.display import as_json, attributes_as_json, fields_as_json
from actcache.admin.inspection import Coverage, Progress, Repetition, SpaceReport, StepProgress, each_space, step_of
from actcache.admin.report.statistics import Lengths, Numbers, Statistics
from actcache.backend import VALUES, StoredFile
from actcache.entries.read import read_intact
from actcache.errors import DataError, FormatError, UsageError
from actcache.format import codec
from actcache.format.keys import key_list
from actcache.format.moments import Moments
from actcache.format.ragged import runs
from actcache.format.recipe import Recipe
from actcache.store.footprint import Footprint, age_of_last_write, footprint_of, segments_in
from actcache.store.space import Space
from actcache.store.store import Store
from actcache.store.stored_errors import StoredErrors

#: Entries that are read where nobody says how many.
SAMPLE = 200

_PART_BYTES = 4 << 20  # of rows that are read at once
_OUTLIERS = 6  # that are named
_FEWEST = 20  # entries among which there can be some
_FAR = 3.0  # median distances from the median
_NAMED = 5  # of several segments that a prefix fits
_COMPUTED_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


# --- a sample of entries ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outlier:
    """An entry whose rows are unlike most: the mean of their norms, and how far that is from the entries' median, in
    median distances from it."""

    key: bytes
    tokens: int
    norm: float
    off: float
    token_ids: list[int] | None = None


@dataclass(frozen=True)
class Sample:
    """Entries that were read: how many, of how many, which fail their checksums, and the statistics of the others.

    The outliers are those of which the norms are furthest from the median, the furthest first.
    """

    entries: int
    of: int
    corrupt: list[bytes]
    statistics: Statistics
    outliers: list[Outlier] = field(default_factory=list)


def read_sample(
    space: Space,
    keys: NDArray[np.uint8],
    count: int | None = SAMPLE,
    *,
    seed: int = 0,
    progress: StepProgress | None = None,
) -> Sample:
    """Read at most ``count`` entries, None for all, that are drawn at random, in the order in which they lie.

    Args:
        keys: of those among which is drawn, ``[n, 32]``; all are there.
        seed: the same one draws the same entries of the same keys.

    Raises:
        UsageError: ``count`` or ``seed`` is negative.
    """
    if (count is not None and count < 0) or seed < 0:
        raise UsageError(f"a sample has 0 or more entries and a seed of 0 or more, not {count} and {seed}")
    chosen = keys
    if count is not None and count < len(keys):
        chosen = keys[np.random.default_rng(seed).choice(len(keys), count, replace=False)]
    chosen = space.in_order(chosen)
    stored, numbers, corrupt = codec.get(space.recipe.dtype), Numbers(), list[bytes]()
    means, read, tokens = list[float](), list[bytes](), list[int]()
    for run in runs(space.lengths(chosen) * space.recipe.row_bytes, _PART_BYTES):
        packed, names, bad = read_intact(space.read_packed, chosen[run])
        corrupt += bad
        rows = stored.decode(packed.columns[VALUES])
        numbers.add(rows)
        means += _mean_norms(rows, packed.offsets)
        read += key_list(names)
        tokens += np.diff(packed.offsets).tolist()
        if progress is not None:
            progress(run.stop, len(chosen))
    outliers = _outliers(space, read, tokens, np.array(means))
    return Sample(len(chosen), len(keys), corrupt, numbers.statistics(), outliers)


def _mean_norms(rows: NDArray[Any], offsets: NDArray[np.int64]) -> list[float]:
    """Return the mean norm of each entry's rows; NaN where there are none, or one holds what is no number."""
    with np.errstate(all="ignore"):
        norms = np.linalg.norm(rows.astype(np.float32), axis=1)
        return [
            float(norms[begin:end].mean()) if end > begin else math.nan for begin, end in itertools.pairwise(offsets)
        ]


def _outliers(space: Space, keys: list[bytes], tokens: list[int], norms: NDArray[np.float64]) -> list[Outlier]:
    known = np.isfinite(norms)
    if known.sum() < _FEWEST:
        return []
    middle = float(np.median(norms[known]))
    apart = np.where(known, np.abs(norms - middle), -1.0)
    usual = float(np.median(apart[known]))
    if not usual:
        return []
    furthest = [int(i) for i in np.argsort(-apart, kind="stable")[:_OUTLIERS] if apart[i] > _FAR * usual]
    entries, _, _ = read_intact(space.get, [keys[i] for i in furthest])
    ids = [None if one is None or one.token_ids is None else one.token_ids.tolist() for one in entries]
    if len(ids) != len(furthest):  # one was damaged meanwhile
        return []
    return [
        Outlier(keys[i], tokens[i], float(norms[i]), float(apart[i]) / usual, given)
        for i, given in zip(furthest, ids, strict=True)
    ]


# --- segments ---------------------------------------------------------------------------------------------------------


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
        return fields_as_json(self, "state")


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
        return {
            "space": self.recipe.fingerprint,
            "provenance": self.recipe.to_json()["provenance"],
            "segment": as_json(self.report),
            **attributes_as_json(self, "lengths", "sample", "intact"),
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
    progress: Progress | None = None,
) -> SegmentDetail:
    """Look at one segment.

    Args:
        prefix: how its name begins; a full name wins over longer ones.
        spaces: prefixes of the fingerprints, where segments of several have that name.
        sample: entries of it that are read, drawn at random by ``seed``; None for all.

    Raises:
        UsageError: no segment is named so, or several are.
        DataError: its space cannot be read.
    """
    files = store.driver.listing()
    fitting = []
    for fingerprint in inspection.select_spaces(store, spaces):
        names = [name for name in segments_in(files, fingerprint) if prefix and name.startswith(prefix)]
        exact = [name for name in names if prefix in (name, stem_of(name))]
        fitting += [(fingerprint, name) for name in exact or names]
    if len(fitting) != 1:
        if fitting:
            what = ", ".join(f"{name} of space {fingerprint}" for fingerprint, name in fitting[:_NAMED])
            raise UsageError(f"{len(fitting)} segments begin with {prefix}: {what}; say more of it, or give --space")
        raise UsageError(f"no segment of {store.url} begins with {prefix!r}; cachectl ls --tree lists them")
    fingerprint, name = fitting[0]
    with inspection.open_space(store, fingerprint) as space:
        damaged = damaged_segments(space, thorough=sample is None)
        keys = space.key_array()
        reports = {report.name: report for report in segments_of(space, files, damaged, keys)}
        if name not in reports:  # compacted and removed meanwhile
            raise DataError(f"{name} of space {fingerprint} is gone; run it again")
        names, which = space.whereabouts(keys)
        keys = keys[np.isin(which, [i for i, known in enumerate(names) if known == stem_of(name)])]
        read = read_sample(space, keys, sample, seed=seed, progress=step_of(progress, name))
        return SegmentDetail(space.recipe, reports[name], Lengths.of(space.lengths(keys)), read)


def damaged_segments(space: Space, *, thorough: bool) -> dict[str, str]:
    """Return which segments are damaged, name -> what is wrong.

    A thorough look is at each of them anew, trusting no index; lmdb's whole file is walked for that.
    """
    return space.verify(sample=0).damaged if thorough else space.damaged()


# --- spaces -----------------------------------------------------------------------------------------------------------


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
    errors: StoredErrors | None  # what storing does to the numbers, as it was measured when the space was filled
    errors_damaged: str | None  # what is wrong with the file that says it; the space is whole without it
    rows: Moments  # statistics of the rows whose are kept
    coverage: dict[str, Coverage | str] = field(default_factory=dict)  # of each collection, what it has of it
    passages: dict[str, Repetition] = field(
        default_factory=dict
    )  # by collection of documents that are lists of this space's passages

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
        sizes = ("parts", "computed_bytes", "bytes_per_token", "ratio", "lengths")
        return {
            **self.report.to_json(),
            **attributes_as_json(self, "made", "owner", "written", *sizes),
            "statistics": self.rows.to_json(),
            "passages": as_json(self.passages),
            "segment_list": as_json(self.segments),
            **attributes_as_json(self, "sample", "errors", "errors_damaged", "intact"),
            "coverage": coverage_as_json(self.coverage),
        }


@dataclass(frozen=True)
class StoreDetail:
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
        found = attributes_as_json(self, "store", "time", "spaces", "unreadable", "collections")
        return {**found, "nbytes": self.footprint.total, "intact": self.intact}


def _errors_of(space: Space) -> dict[str, Any]:
    try:
        return {"errors": StoredErrors.read(space), "errors_damaged": None}
    except FormatError as error:
        return {"errors": None, "errors_damaged": str(error)}


def store_detail(
    store: Store,
    prefixes: Sequence[str] = (),
    *,
    sample: int | None = SAMPLE,
    seed: int = 0,
    progress: Progress | None = None,
) -> StoreDetail:
    """Look at spaces in full.

    Args:
        sample: entries of each space that are read, drawn at random by ``seed`` and compared with their checksums; None
            for all of them, and for a look at every segment without the help of an index.
    """
    files = store.driver.listing()
    sizes = footprint_of(files)

    def detail(space: Space) -> SpaceDetail:
        fingerprint = space.recipe.fingerprint
        damaged = damaged_segments(space, thorough=sample is None)
        keys = space.key_array()
        recipe_file = files.get(f"spaces/{fingerprint}/recipe.json")
        return SpaceDetail(
            report=SpaceReport(space.recipe, space.usage(), damaged),
            made=None if recipe_file is None else recipe_file.age,
            owner=None if recipe_file is None else recipe_file.owner,
            written=age_of_last_write(files, fingerprint),
            parts=sizes.spaces.get(fingerprint, {}),
            lengths=Lengths.of(space.lengths(keys)),
            segments=segments_of(space, files, damaged, keys),
            sample=read_sample(space, keys, sample, seed=seed, progress=step_of(progress, fingerprint)),
            **_errors_of(space),
            rows=space.kept_statistics(),
            passages=inspection.repetitions(store, space),
            coverage=inspection.coverage(store, space),
        )

    spaces, unreadable = each_space(store, prefixes, detail)
    return StoreDetail(store.url, time.time(), list(spaces.values()), unreadable, store.collections(), sizes)


# --- the store as a tree ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """One space: its segments, and how much it has of each collection (or what is wrong with that)."""

    report: SpaceReport
    segments: list[SegmentReport]
    collections: dict[str, Coverage | str]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.report.to_json(),
            "segment_list": as_json(self.segments),
            "coverage": coverage_as_json(self.collections),
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
        collections = [
            {"collection": name, **({"error": held} if isinstance(held, str) else {"documents": held})}
            for name, held in self.collections.items()
        ]
        found = attributes_as_json(self, "store", "spaces", "unreadable")
        return {**found, "collections": list(self.collections), "collection_list": collections}


def coverage_as_json(held: Mapping[str, Coverage | str]) -> list[dict[str, Any]]:
    """Return how much a space has of each collection, as JSON values; of a damaged collection what is wrong."""
    listed = []
    for name, one in held.items():
        told: dict[str, Any] = {"error": one} if isinstance(one, str) else as_json(one)
        if told.get("passages") is None:
            told.pop("passages", None)
        listed.append({"collection": name, **told})
    return listed


def overview(store: Store, prefixes: Sequence[str] = ()) -> Overview:
    """Look at a store from above. Reads keys, no activations."""
    files = store.driver.listing()

    def branch(space: Space) -> Branch:
        report = inspection.report_on(space)
        segments = segments_of(space, files, report.damaged, space.key_array())
        return Branch(report, segments, inspection.coverage(store, space))

    spaces, unreadable = each_space(store, prefixes, branch)
    collections = {name: _documents(store, name) for name in store.collections()}
    return Overview(store.url, list(spaces.values()), unreadable, collections)


def _documents(store: Store, name: str) -> int | str:
    try:
        return store.collection(name).document_count
    except DataError as error:
        return str(error)
