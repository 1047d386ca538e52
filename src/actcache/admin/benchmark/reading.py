"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

Contestants read the same random batches, turn by turn. A ratio is the time of the limit over the time of the backend in
the same round: the median, and its 95 % interval.

The limit of a warm read is the fastest raw way to get these documents' rows into the buffer plus the fastest xxh3 pass
over them; of a cold read, direct reads of the same extents. Beside it stands the limit of one coalesced read, which no
shuffled batch can be: as many bytes that lie side by side, by the fastest copy (plus the same xxh3 pass), or by direct
reads of 1 MiB. Where documents are short that is what their smallness and their scattering are held against.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.caches import refuse_mappings
from actcache.admin.benchmark.corpus import Corpus
from actcache.admin.benchmark.limits import FlatFile, Positions
from actcache.admin.benchmark.rounds import Seconds, Spread, fastest
from actcache.io.workers import available_cpus

_DIGESTS = ("xxh3 one", "xxh3 shared")

Progress = Callable[[int, int], None]


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
        """Return GB/s of rows."""
        return Spread.of(self.payload / contestant.seconds / 1e9)


def flat_path(folder: Path) -> Path:
    """Return where the corpus of a folder has its rows in one file."""
    return folder / "rows.bin"


def warm(
    corpus: Corpus, folder: Path, count: int, batches: int, progress: Progress = lambda done, total: None
) -> Comparison:
    """Compare reads of what is in the page cache and mapped already, ``count`` rounds of so many batches."""
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    with ExitStack() as stack:
        flat = FlatFile(flat_path(folder), corpus.lengths, corpus.shape.hidden, [out], available_cpus())
        stack.enter_context(closing(flat))
        contestants: dict[str, Callable[[int], float]] = {}
        for name, read in (flat.warm() | flat.coalesced_warm()).items():
            contestants[name] = lambda turn, read=read: _each(turns[turn], read)  # type: ignore[misc]
        for name in _DIGESTS:
            threads = name.removeprefix("xxh3 ")
            contestants[name] = lambda turn, threads=threads: _each(  # type: ignore[misc]
                turns[turn], lambda which: flat.hash_passes(which)[threads]()
            )
        spaces = {name: stack.enter_context(corpus.open(name)) for name in corpus.urls}
        for name, space in spaces.items():
            for verify in (True, False):
                label = name if verify else _unchecked(name)
                contestants[label] = lambda turn, space=space, verify=verify: _each(  # type: ignore[misc]
                    turns[turn], lambda which: space.read_into(corpus.keys[which], out, verify=verify)
                )
        # Warm means mapped as well: a page's first touch through a mapping is a fault, for the limit as for a backend.
        toucher = next(iter(flat.warm().values()))
        for which in np.array_split(np.arange(len(corpus.lengths)), 1 + len(corpus.lengths) // corpus.shape.batch):
            toucher(which)
            for space in spaces.values():
                space.read_into(corpus.keys[which], out)
        seconds = rounds.run(contestants, count, progress=progress)
        raw, together = fastest(flat.warm(), seconds), fastest(flat.coalesced_warm(), seconds)
        digest = fastest(_DIGESTS, seconds)
        plain = seconds[raw], seconds[together]
        checked = seconds[raw] + seconds[digest], seconds[together] + seconds[digest]
        rows = [Contestant(n, seconds[n]) for n in (*flat.warm(), *flat.coalesced_warm(), *_DIGESTS)]
        rows += [Contestant(f"the limit: {raw}", plain[0]), Contestant(f"the limit: {raw} + {digest}", checked[0])]
        rows += [Contestant(f"one coalesced read: {together} + {digest}", checked[1])]
        for name in spaces:
            rows += [Contestant(name, seconds[name], checked, checked=True)]
            rows += [Contestant(_unchecked(name), seconds[_unchecked(name)], plain)]
        return _comparison("warm", corpus, turns, rows, f"{raw} + {digest}", f"{together} + {digest}")


def cold(
    corpus: Corpus,
    folder: Path,
    count: int,
    batches: int,
    drop: Callable[[], object],
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare reads of what is not in the page cache.

    A turn reads each document once, in fewer batches where the corpus has not enough: the second time it would be warm.

    Args:
        drop: called before every turn; takes the folder's files out of the page cache.
    """
    batches = min(batches, len(corpus.lengths) // corpus.shape.batch)
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    with closing(FlatFile(flat_path(folder), corpus.lengths, corpus.shape.hidden, [out], available_cpus())) as flat:
        contestants: dict[str, Callable[[int], float]] = {}
        for name, read in flat.cold().items():  # all of a turn in one go: batches would have the disk wait in between
            contestants[name] = lambda turn, read=read: _each([np.concatenate(turns[turn])], read)  # type: ignore[misc]
        for name, read in flat.coalesced_cold().items():
            contestants[name] = lambda turn, read=read: _each(turns[turn], read)  # type: ignore[misc]
        for name in corpus.urls:
            contestants[name] = lambda turn, name=name: _cold_turn(corpus, name, turns[turn], out)  # type: ignore[misc]

        def before() -> None:
            refuse_mappings([folder / name for name in corpus.urls])
            drop()

        seconds = rounds.run(contestants, count, before=before, progress=progress)
        raw, together = fastest(flat.cold(), seconds), fastest(flat.coalesced_cold(), seconds)
        limits = seconds[raw], seconds[together]
        rows = [Contestant(name, seconds[name]) for name in (*flat.cold(), *flat.coalesced_cold())]
        rows += [Contestant(f"the limit: {raw}", limits[0]), Contestant(f"one coalesced read: {together}", limits[1])]
        rows += [Contestant(name, seconds[name], limits, checked=True) for name in corpus.urls]
        return _comparison("cold", corpus, turns, rows, raw, together)


def _unchecked(name: str) -> str:
    return f"{name}, no checksums"


def _cold_turn(corpus: Corpus, backend: str, turn: list[Positions], out: NDArray[Any]) -> float:
    """Read a turn's batches, hinting one batch ahead as the reader does; the opening is part of the time."""
    with corpus.open(backend) as space:
        space.read_ahead(corpus.keys[turn[0]])
        for number, which in enumerate(turn):
            if number + 1 < len(turn):
                space.read_ahead(corpus.keys[turn[number + 1]])
            space.read_into(corpus.keys[which], out)
    return 0.0


def _each(turn: list[Positions], read: Callable[[Positions], object]) -> float:
    for which in turn:
        read(which)
    return 0.0


def _comparison(
    mode: str, corpus: Corpus, turns: list[list[Positions]], rows: list[Contestant], limit: str, coalesced: str
) -> Comparison:
    shape, payload = corpus.shape, corpus.payload(turns)
    size = len(corpus.lengths), corpus.nbytes, shape.batch, len(turns[0])
    return Comparison(shape.name, mode, *size, payload, rows, limit, coalesced)
