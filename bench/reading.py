"""Batches as a reader delivers them, beside what the machine itself can do with the same rows.

    python -m bench.reading --shape paper,short --backends hdf5,zarr,lmdb --mode warm,cold
    python -m bench.reading --threads 1,2,4,8,16        # with so many threads, the limit's and the package's

The consumer takes the batches of ``space.reader(keys, shuffle=True, layout=...)`` and does nothing with them;
checksums are on, token ids come along. A turn is one epoch over the same keys, a random part of the corpus, and in each
round the epoch is another. It is timed from ``iter(reader)`` to its end, so that the start of the thread and the first
read, which nothing hides, are part of it. Opening the space and making the reader are not, and stand in a column of
their own.

The limit of a warm read brings the same documents, batch by batch in the same order, into a reused buffer of the same
layout: the fastest of the raw ways of ``actcache.admin.benchmark.limits`` by the median, a compiled gather on a thread
a core among them, plus the fastest xxh3 pass over the documents' bytes.
The raw ways meet in heats, and the two fastest of each kind in the rounds with the package: all of them read one file,
which a score of turns a round would keep warmer in the processor's caches than any store's. They have one buffer, while
a reader needs several, for its consumer still looks at one while it fills the next; ``--ring`` gives them as many as
you like (the reader has ``depth + 4``). A hash pass of its own is not the least that hashing
can cost: who hashes rows while they are in the processor's cache can be faster than this limit. The limit of a cold
read is direct reads of the same extents, 8 to 32 at a time, which hash nothing and put nothing in order. Beside them
stand the same reads by way of the page cache, which a store takes where that can hold it: the next epoch is warm then.

Warm means in the page cache and mapped. Cold means that the page cache was dropped and everything opened anew. Buffers
were used before in both.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.caches import refuse_mappings
from actcache.admin.benchmark.corpus import SHAPES, Documents, StoredCorpus
from actcache.admin.benchmark.limits import FlatFile
from actcache.admin.benchmark.rounds import Spread, fastest
from actcache.io import loops
from actcache.io.workers import available_cpus
from actcache.reader.order import Order
from actcache.reader.reader import Reader
from bench.caches import drop_caches
from bench.metered import epoch_seconds
from bench.report import Cell, Report
from bench.threads import counts_of, sharing

SEED = 3
_HEATS = 3  # rounds in which the raw ways show which of them are the fastest
_FINALISTS = 2  # of each kind
COLUMNS = ("", "GB/s", "of the limit", "without hashing", "opened in, ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--backends", default="hdf5,zarr,lmdb", help="hdf5, zarr, lmdb, safetensors")
    parser.add_argument("--mode", default="warm,cold", help="warm, cold (as root the whole page cache is dropped)")
    parser.add_argument("--layouts", default="packed,padded")
    parser.add_argument("--depth", type=int, default=2, help="batches that the reader reads ahead")
    parser.add_argument("--threads", help="that share a batch, as 1,2,4; those that there are processors for")
    parser.add_argument("--ring", type=int, default=1, help="buffers that the limit of a warm read takes turns with")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--turn-mib", type=float, default=768, help="of rows that are read in a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = Report()
    counts, too_many = counts_of(options.threads)
    if too_many:
        report.say(f"left out: {too_many} threads, for this machine has {available_cpus()} processors")
    for shape in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            urls = {name: f"{name}:{folder / name}" for name in options.backends.split(",")}
            corpus = StoredCorpus(
                Documents(SHAPES[shape], int(options.gib * 2**30)), urls, {}, flat=folder / "rows.bin"
            )
            for threads in counts:
                with sharing(threads):
                    for mode in options.mode.split(","):
                        {"warm": warm, "cold": cold}[mode](Turns(corpus, folder, options), report)
        finally:
            shutil.rmtree(folder)
    report.save(options.json)


class Turns:
    """The epochs that all contestants read.

    Attributes:
        flat: the raw ways to read.
        contestants: name -> what takes the turn of a round; filled by those who compare.
    """

    def __init__(self, corpus: StoredCorpus, folder: Path, options: argparse.Namespace) -> None:
        self.corpus, self.folder, self.options = corpus, folder, options
        outs = [corpus.buffer() for _ in range(options.ring)]
        threads = loops.THREADS if options.threads else available_cpus()
        self.flat = FlatFile(folder / "rows.bin", corpus.lengths, corpus.shape.hidden, outs, threads)
        count = int(options.turn_mib * 2**20 / (corpus.lengths.mean() * corpus.shape.row_bytes))
        count = min(max(count, corpus.shape.batch), len(corpus.lengths))
        self._sample = np.random.default_rng(5).choice(len(corpus.lengths), count, replace=False)
        self.layouts: list[str] = options.layouts.split(",")
        self.opening: dict[str, list[float]] = {}
        self.contestants: dict[str, Callable[[int], float]] = {}
        self.payload = int(corpus.lengths[self._sample].sum()) * corpus.shape.row_bytes

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Return the documents of each batch of an epoch, by their positions in the corpus."""
        plan = Order(self.corpus.shape.batch, shuffle=True, seed=SEED).of_epoch(
            self.corpus.lengths[self._sample], epoch
        )
        return [self._sample[part] for part in np.split(plan.sequence, plan.cuts[1:-1])]

    def reader(self, space: actcache.Space, layout: str) -> Reader:
        keys, depth = self.corpus.keys[self._sample], self.options.depth
        return space.reader(
            keys, batch_size=self.corpus.shape.batch, shuffle=True, seed=SEED, layout=layout, depth=depth
        )

    def raw(self, read: Callable[[np.ndarray], object], *, whole: bool = False) -> Callable[[int], float]:
        """Return a contestant that reads batch by batch, or a whole epoch in one go."""

        def turn(epoch: int) -> float:
            batches = [np.concatenate(self.batches(epoch))] if whole else self.batches(epoch)
            start = time.perf_counter()
            for which in batches:
                read(which)
            return time.perf_counter() - start

        return turn

    def check(self, reader: Reader, epoch: int) -> None:
        """Make sure that a reader delivers what the raw ways read."""
        reader.set_epoch(epoch)
        for batch, which in zip(reader, self.batches(epoch), strict=True):
            if not np.array_equal(self._sample[batch.documents], which):
                raise RuntimeError("the reader and the raw ways do not read the same documents")
            first = self.flat.document(int(which[0]))
            delivered = batch.activations.reshape(-1, first.shape[1])[: len(first)]
            if not np.array_equal(delivered, first):
                raise RuntimeError("the reader delivers other rows than were stored")

    def check_raw(self, ways: dict[str, Callable[[np.ndarray], None]], *, padded: bool) -> None:
        """Make sure that the raw ways bring what the reader delivers."""
        which = self.batches(0)[0]
        documents = [self.flat.document(position) for position in which.tolist()]
        width = max(len(rows) for rows in documents)
        if padded:
            documents = [np.pad(rows, ((0, width - len(rows)), (0, 0))) for rows in documents]
        wanted = np.concatenate(documents)
        for name, read in ways.items():
            self.flat.smear()
            read(which)
            if not np.array_equal(self.flat.filled[: len(wanted)], wanted):
                raise RuntimeError(f"{name} does not bring the rows of the batch")

    def ratios(self, seconds: dict[str, np.ndarray], name: str, *limits: np.ndarray) -> list[Cell]:
        """Return a row: throughput, and how near it is to each limit."""
        mine = seconds[name]
        cells: list[Cell] = [name, Spread.of(self.payload / mine / 1e9)]
        cells += [Spread.of(limit / mine) for limit in limits] + [None] * (2 - len(limits))
        opened = self.opening.get(name)
        return [*cells, float(np.median(opened)) * 1e3 if opened else None]

    def title(self, mode: str) -> str:
        shape = self.corpus.shape
        return (
            f"{shape.name}, {mode}: epochs of {len(self._sample)} documents in batches of {shape.batch}, "
            f"{self.payload / 2**20:.0f} MiB of {self.corpus.nbytes / 2**20:.0f}"
            + (f", threads: {loops.THREADS}" if self.options.threads else "")
        )


def warm(turns: Turns, report: Report) -> None:
    contestants, flat = turns.contestants, turns.flat
    ways = {layout: flat.warm(padded=layout == "padded") for layout in turns.layouts}
    for layout, raw in ways.items():
        turns.check_raw(raw, padded=layout == "padded")
        for name, read in raw.items():
            contestants[f"{name}, {layout}"] = turns.raw(read)
    contestants.update({name: turns.raw(read) for name, read in flat.digests().items()})
    spaces = {name: turns.corpus.open(name) for name in turns.corpus.urls}
    for name, space in spaces.items():
        for layout in turns.layouts:
            reader = turns.reader(space, layout)
            turns.check(reader, 0)  # touches every page through the space's mapping, too
            contestants[f"{name} {layout}"] = lambda epoch, reader=reader: epoch_seconds(reader, epoch)
    turns.raw(flat.warm()["memcpy x1"])(0)
    raws = [[f"{name}, {layout}" for name in raw] for layout, raw in ways.items()]
    heats, finalists = {}, [f"{name} {layout}" for name in spaces for layout in turns.layouts]
    for group in [*raws, list(flat.digests())]:
        heats |= rounds.take_turns({name: contestants[name] for name in group}, _HEATS)
        finalists += sorted(group, key=lambda name: float(np.median(heats[name])))[:_FINALISTS]
    seconds = heats | rounds.take_turns({name: contestants[name] for name in finalists}, turns.options.rounds)
    digest = fastest((name for name in finalists if name in flat.digests()), seconds)
    rows = [turns.ratios(seconds, name) for name in heats]
    for layout, group in zip(ways, raws, strict=True):
        best = fastest((name for name in group if name in finalists), seconds)
        whole = f"the limit: {best} + {digest}"
        rows.append(turns.ratios({whole: seconds[best] + seconds[digest]}, whole))
        for name in spaces:
            limits = seconds[best] + seconds[digest], seconds[best]
            rows.append(turns.ratios(seconds, f"{name} {layout}", *limits))
    report.table(turns.title("warm"), COLUMNS, rows)
    for space in spaces.values():
        space.close()
    flat.close()


def cold(turns: Turns, report: Report) -> None:
    contestants, flat = turns.contestants, turns.flat
    raw = flat.cold()
    for name, read in {**raw, **flat.by_page_cache()}.items():
        contestants[name] = turns.raw(read, whole=True)
    ours = [(name, layout) for name in turns.corpus.urls for layout in turns.layouts]
    for name, layout in ours:
        contestants[f"{name} {layout}"] = _cold_turn(turns, name, layout)

    def before() -> None:
        refuse_mappings([turns.folder / name for name in turns.corpus.urls])
        drop_caches(turns.folder)

    seconds = rounds.take_turns(contestants, turns.options.rounds, before=before)
    best = fastest(raw, seconds)
    rows = [turns.ratios(seconds, name) for name in raw]
    rows += [turns.ratios(seconds, name, seconds[best]) for name in flat.by_page_cache()]
    rows.append(turns.ratios({f"the limit: {best}": seconds[best]}, f"the limit: {best}"))
    rows += [turns.ratios(seconds, f"{name} {layout}", seconds[best]) for name, layout in ours]
    report.table(turns.title("cold"), COLUMNS, rows)
    flat.close()


def _cold_turn(turns: Turns, name: str, layout: str) -> Callable[[int], float]:
    opened = turns.opening.setdefault(f"{name} {layout}", [])
    kept: dict[str, Any] = {}

    def turn(epoch: int) -> float:
        start = time.perf_counter()
        with turns.corpus.open(name) as space:
            reader = turns.reader(space, layout)
            opened.append(time.perf_counter() - start)
            # Buffers that were used before, as the limit's were: those of the turn before.
            reader._delivery = kept.get("delivery")
            try:
                return epoch_seconds(reader, epoch)
            finally:
                kept["delivery"] = reader._delivery

    return turn


if __name__ == "__main__":
    main()
