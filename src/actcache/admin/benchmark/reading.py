"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

Contestants read the same random batches, turn by turn. A ratio is the time of the limit over the time of the backend in
the same round: the median, and its 95 % interval.

The limit of a warm read is the fastest raw way to get these documents' rows into the buffer (a compiled gather on a
thread a core among them) plus the fastest xxh3 pass over them; of a cold read, direct reads of the same extents. Beside
it stands the limit of one coalesced read, which no shuffled batch can be: as many bytes that lie side by side, by the
fastest copy (plus the same xxh3 pass), or by direct reads of 1 MiB. Where documents are short that is what their
smallness and their scattering are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.caches import refuse_mappings
from actcache.admin.benchmark.corpus import StoredCorpus
from actcache.admin.benchmark.limits import FlatFile, Positions
from actcache.admin.benchmark.rounds import Seconds, Spread, fastest
from actcache.admin.display import as_json
from actcache.admin.inspection import StepProgress
from actcache.io.workers import available_cpus
from actcache.store.space import Space


@dataclass(frozen=True)
class Contestant:
    """One line of a comparison: a backend, a raw way, or a limit made of raw ways."""

    name: str
    seconds: Seconds
    limits: tuple[Seconds, Seconds] | None = None  # of a backend: the limit, and one coalesced read
    checked: bool = False  # a backend as it is used, with checksums

    @property
    def ratios(self) -> list[Spread]:
        """What share of the limit it reaches, and of one coalesced read; nothing for what is no backend."""
        return [] if self.limits is None else [Spread.of(limit / self.seconds) for limit in self.limits]


@dataclass(frozen=True)
class Comparison:
    """What one mode over one corpus found. ``payload`` holds the bytes of rows that each round's turn read."""

    shape: str
    mode: str
    documents: int
    nbytes: int
    batch: int
    batches: int  # of a turn
    payload: NDArray[np.int64]
    contestants: list[Contestant]
    limit: str  # which raw ways the limit is made of
    coalesced: str

    @property
    def title(self) -> str:
        return f"{self.shape}, {self.mode}: {self.documents} documents, {self.nbytes / 2**30:.1f} GiB"

    def speed(self, contestant: Contestant) -> Spread:
        """In GB/s of rows."""
        return Spread.of(self.payload / contestant.seconds / 1e9)

    def to_json(self) -> dict[str, Any]:
        """GB/s, ratios with their intervals, and the seconds of every round."""

        def row(one: Contestant) -> dict[str, Any]:
            ratios = dict(zip(("of_the_limit", "of_one_coalesced_read"), one.ratios, strict=False))
            return {"name": one.name, "gb_per_s": self.speed(one), **ratios, "seconds": one.seconds}

        found = {**vars(self), "one_coalesced_read": self.coalesced, "bytes_read": self.payload}
        found["contestants"] = [row(one) for one in self.contestants]
        return {name: as_json(value) for name, value in found.items() if name not in ("coalesced", "payload")}


def flat_path(folder: Path) -> Path:
    """Return where the corpus of a folder has its rows in one file."""
    return folder / "rows.bin"


def warm(
    corpus: StoredCorpus,
    folder: Path,
    count: int,
    batches: int,
    progress: StepProgress = lambda done, total: None,
    threads: int | None = None,
) -> Comparison:
    """Compare reads of what is in the page cache and mapped already, ``count`` rounds of so many batches.

    ``threads``: of the raw ways that use more than one; if not given, one a processor.
    """
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    with ExitStack() as stack:
        flat = FlatFile(flat_path(folder), corpus.lengths, corpus.shape.hidden, [out], threads or available_cpus())
        stack.enter_context(closing(flat))
        ways = flat.warm() | flat.coalesced_warm() | flat.digests()
        spaces = {name: stack.enter_context(corpus.open(name)) for name in corpus.urls}
        reads: dict[str, Callable[[Positions], object]] = dict(ways)
        for name, space in spaces.items():
            for label, verify in ((name, True), (_unchecked(name), False)):
                reads[label] = partial(_read_entries, space, corpus, out, verify)
        # Warm means mapped as well: a page's first touch through a mapping is a fault, for the limit as for a backend.
        toucher = next(iter(flat.warm().values()))
        for which in np.array_split(np.arange(len(corpus.lengths)), 1 + len(corpus.lengths) // corpus.shape.batch):
            toucher(which)
            for space in spaces.values():
                space.read_into(corpus.keys[which], out)
        contestants = {name: partial(_read_batches, read, turns) for name, read in reads.items()}
        seconds = rounds.take_turns(contestants, count, progress=progress)
        raw, together, digest = (
            fastest(some, seconds) for some in (flat.warm(), flat.coalesced_warm(), flat.digests())
        )
        plain = seconds[raw], seconds[together]
        checked = seconds[raw] + seconds[digest], seconds[together] + seconds[digest]
        rows = [Contestant(name, seconds[name]) for name in ways]
        rows += [Contestant(f"the limit: {raw}", plain[0]), Contestant(f"the limit: {raw} + {digest}", checked[0])]
        rows += [Contestant(f"one coalesced read: {together} + {digest}", checked[1])]
        for name in spaces:
            rows += [Contestant(name, seconds[name], checked, checked=True)]
            rows += [Contestant(_unchecked(name), seconds[_unchecked(name)], plain)]
        return _comparison("warm", corpus, turns, rows, f"{raw} + {digest}", f"{together} + {digest}")


def cold(
    corpus: StoredCorpus,
    folder: Path,
    count: int,
    batches: int,
    drop: Callable[[], object],
    progress: StepProgress = lambda done, total: None,
) -> Comparison:
    """Compare reads of what is not in the page cache, out of which ``drop`` takes the folder's files before every turn.

    A turn reads each document once, in fewer batches where the corpus has not enough: the second time it would be warm.
    """
    batches = min(batches, len(corpus.lengths) // corpus.shape.batch)
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    with closing(FlatFile(flat_path(folder), corpus.lengths, corpus.shape.hidden, [out], available_cpus())) as flat:
        # All of a turn in one go: batches would have the disk wait in between.
        whole = [[np.concatenate(turn)] for turn in turns]
        contestants = {name: partial(_read_batches, read, whole) for name, read in flat.cold().items()}
        contestants |= {name: partial(_read_batches, read, turns) for name, read in flat.coalesced_cold().items()}
        contestants |= {name: partial(_read_cold, corpus, name, out, turns) for name in corpus.urls}

        def before() -> None:
            refuse_mappings([folder / name for name in corpus.urls])
            drop()

        seconds = rounds.take_turns(contestants, count, before=before, progress=progress)
        raw, together = fastest(flat.cold(), seconds), fastest(flat.coalesced_cold(), seconds)
        limits = seconds[raw], seconds[together]
        rows = [Contestant(name, seconds[name]) for name in (*flat.cold(), *flat.coalesced_cold())]
        rows += [Contestant(f"the limit: {raw}", limits[0]), Contestant(f"one coalesced read: {together}", limits[1])]
        rows += [Contestant(name, seconds[name], limits, checked=True) for name in corpus.urls]
        return _comparison("cold", corpus, turns, rows, raw, together)


def _unchecked(name: str) -> str:
    return f"{name}, no checksums"


def _read_batches(read: Callable[[Positions], object], turns: list[list[Positions]], turn: int) -> float:
    for which in turns[turn]:
        read(which)
    return 0.0


def _read_entries(space: Space, corpus: StoredCorpus, out: NDArray[Any], verify: bool, which: Positions) -> None:
    space.read_into(corpus.keys[which], out, verify=verify)


def _read_cold(corpus: StoredCorpus, backend: str, out: NDArray[Any], turns: list[list[Positions]], turn: int) -> float:
    """Read a turn's batches, hinting one batch ahead as the reader does; the opening is part of the time."""
    batches = [corpus.keys[which] for which in turns[turn]]
    with corpus.open(backend) as space:
        space.read_ahead(batches[0])
        for number, keys in enumerate(batches):
            if number + 1 < len(batches):
                space.read_ahead(batches[number + 1])
            space.read_into(keys, out)
    return 0.0


def _comparison(
    mode: str, corpus: StoredCorpus, turns: list[list[Positions]], rows: list[Contestant], limit: str, coalesced: str
) -> Comparison:
    shape, payload = corpus.shape, corpus.payload(turns)
    size = len(corpus.lengths), corpus.nbytes, shape.batch, len(turns[0])
    return Comparison(shape.name, mode, *size, payload, rows, limit, coalesced)
