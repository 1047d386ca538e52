"""What a batch costs, small or large: microseconds, beside a plain loop over a memory map.

    python -m bench.storage --batch 1,8,32,64,256,1024

Batches are random documents, padded to the shape's longest, warm, checksums on. All contestants take turns in one run;
a turn is many batches of one size, and what counts is its time divided by its batches, so that nothing rare is left
out. A ratio is the memory-map loop's time over a contestant's, in the same round: above 1 is faster than that loop.

- ``memory-map loop``: NumPy alone: for each document a copy out of a ``np.memmap`` and zeros behind it.
- ``native gather + digests``: the compiled loop alone, given where each document lies: copies, pads, and makes a digest
  of each. What nothing that checks can be much faster than.
- ``read_into``: of a space, into the same buffer. ``get``: the same entries one by one, token ids too.
- ``reader``: the iterated reader, token ids too: whole epochs, as fast as a consumer that does nothing can draw. The
  work of its thread is part of it, and so is that the thread has to start, once an epoch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import Documents, Shape, StoredCorpus
from actcache.admin.benchmark.reading import flat_path
from actcache.admin.benchmark.rounds import Spread
from actcache.format.ragged import offsets_of
from actcache.io import loops
from actcache.io.loops import Column, Digests
from actcache.store.space import Space
from bench.metered import epoch_seconds
from bench.report import Cell, Report

LOOP = "memory-map loop"
NATIVE = "native gather + digests"
_EPOCH = 2000  # batches of an epoch of the reader, where there are documents enough
_TURN = 48  # MiB of rows of a turn of the others, at most
_MOST = 400  # batches of such a turn

#: Microseconds a batch in each round, by contestant.
Costs = dict[str, NDArray[np.float64]]


def compare(
    shape: Shape, sizes: list[int], backends: list[str], options: argparse.Namespace, report: Report, note: str = ""
) -> None:
    """Print a table for each size of batch, and one of the medians of all."""
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        urls = {name: f"{name}:{folder / name}" for name in backends}
        corpus = StoredCorpus(Documents(shape, int(options.gib * 2**30)), urls, {}, flat=flat_path(folder))
        what = f"{shape.name}, warm, padded{note}: {len(corpus.lengths)} documents, {corpus.nbytes / 2**30:.1f} GiB"
        medians: dict[str, dict[int, float]] = {}
        with ExitStack() as stack:
            spaces = {name: stack.enter_context(corpus.open(name)) for name in urls}
            drawn = Drawn(corpus, np.memmap(flat_path(folder), np.float16, "c").reshape(-1, shape.hidden))
            drawn.touch(list(spaces.values()))
            for size in sizes:
                costs = measured(drawn, spaces, size, options.rounds)
                rows: list[list[Cell]] = []
                for name, cost in costs.items():
                    speed = Spread.of(drawn.mean_bytes * size / cost / 1e3)
                    rows.append([name, Spread.of(cost), Spread.of(costs[LOOP] / cost), speed])
                    medians.setdefault(name, {})[size] = float(np.median(cost))
                columns = ("", "us a batch", "times as fast as the loop", "GB/s")
                report.table(f"{what}, batches of {size}", columns, rows)
        report.table(
            f"{what}: us a batch, medians, by its documents",
            ("", *map(str, sizes)),
            [[name, *(by_size[size] for size in sizes)] for name, by_size in medians.items()],
            decimals=0,
        )
    finally:
        shutil.rmtree(folder)


class Drawn:
    """Draws batches of a corpus, and reads them in the plain ways.

    Args:
        rows: ``[T, hidden]``, the corpus's rows, mapped.
    """

    def __init__(self, corpus: StoredCorpus, rows: NDArray[np.float16]) -> None:
        self.corpus, self._rows = corpus, rows
        self._starts = offsets_of(corpus.lengths)
        self._row_bytes = corpus.shape.row_bytes
        self.mean_bytes = float(corpus.lengths.mean()) * self._row_bytes

    def buffer(self, size: int) -> NDArray[np.float16]:
        """Return memory for a batch, ``[size, longest, hidden]``, mapped already."""
        return np.full((size, self.corpus.shape.longest, self.corpus.shape.hidden), 0, np.float16)

    def batches(self, size: int, turn: int) -> list[NDArray[np.int64]]:
        """Return the documents of each batch of a turn, by position."""
        count = int(min(_MOST, max(8, _TURN * 2**20 / (self.mean_bytes * size))))
        rng = np.random.default_rng((size, turn))
        return [rng.choice(len(self.corpus.lengths), size, replace=False) for _ in range(count)]

    def sample(self, size: int) -> NDArray[np.int64]:
        """Return the documents of the reader's epochs."""
        count = min(len(self.corpus.lengths), _EPOCH * size)
        return np.random.default_rng(size).choice(len(self.corpus.lengths), count, replace=False)

    def touch(self, spaces: list[Space]) -> None:
        """Have every page mapped already, by the corpus's own file and by the spaces."""
        for which in np.array_split(np.arange(len(self.corpus.lengths)), 1 + len(self.corpus.lengths) // 1000):
            self.loop(out := self.buffer(len(which)), which)
            for space in spaces:
                space.read_into(self.corpus.keys[which], out)

    def loop(self, out: NDArray[np.float16], which: NDArray[np.int64]) -> None:
        starts, rows = self._starts, self._rows
        for place, document in enumerate(which.tolist()):
            begin, end = starts[document], starts[document + 1]
            out[place, : end - begin] = rows[begin:end]
            out[place, end - begin :] = 0

    def native(self, out: NDArray[np.float16], which: NDArray[np.int64]) -> None:
        lengths = self.corpus.lengths[which]
        column = Column(self._row_bytes, out, self._rows, self._starts[which] * self._row_bytes)
        sums = np.empty(len(which), np.uint64)
        digests = Digests(1, keys=self.corpus.keys[which], sums=sums)
        if len(loops.gather([column], lengths, offsets_of(lengths, out.shape[1]), digests)):
            raise RuntimeError("the native gather did not bring all documents")

    def check(self, read: Callable[[NDArray[Any], NDArray[np.int64]], object], size: int, name: str) -> None:
        """Make sure that a way brings the rows of a batch, and zeros behind them."""
        out, wanted, which = self.buffer(size), self.buffer(size), self.batches(size, 0)[0]
        for place, document in enumerate(which.tolist()):
            rows = self._rows[self._starts[document] : self._starts[document + 1]]
            wanted[place, : len(rows)] = rows
        out[:] = np.nan
        read(out, which)
        if not np.array_equal(out, wanted):
            raise RuntimeError(f"{name} does not bring the rows of a batch of {size}")


def measured(drawn: Drawn, spaces: Mapping[str, Space], size: int, count: int) -> Costs:
    """Return what a batch of so many documents costs each contestant."""
    keys, out = drawn.corpus.keys, drawn.buffer(size)
    plain: dict[str, Callable[[NDArray[Any], NDArray[np.int64]], object]] = {LOOP: drawn.loop}
    if not loops.missing:
        plain[NATIVE] = drawn.native
    for name, read in plain.items():
        drawn.check(read, size, name)
    contestants = {name: partial(_turn, drawn, size, partial(read, out)) for name, read in plain.items()}
    for name, space in spaces.items():
        drawn.check(partial(_of_documents, space, keys), size, name)
        contestants[f"{name}: read_into"] = partial(_keyed_turn, drawn, size, partial(_into, space, out))
        reader = space.reader(keys[drawn.sample(size)], batch_size=size, shuffle=True, seed=1, layout="padded")
        contestants[f"{name}: reader"] = partial(_epoch, reader)
        contestants[f"{name}: get"] = partial(_keyed_turn, drawn, size, space.get)
    return {name: seconds * 1e6 for name, seconds in rounds.take_turns(contestants, count).items()}


def _into(space: Space, out: NDArray[Any], keys: NDArray[np.uint8]) -> None:
    space.read_into(keys, out)


def _of_documents(space: Space, keys: NDArray[np.uint8], out: NDArray[Any], which: NDArray[np.int64]) -> None:
    space.read_into(keys[which], out)


def _turn(drawn: Drawn, size: int, read: Callable[[Any], object], turn: int) -> float:
    return _seconds(read, drawn.batches(size, turn))


def _keyed_turn(drawn: Drawn, size: int, read: Callable[[Any], object], turn: int) -> float:
    return _seconds(read, [drawn.corpus.keys[which] for which in drawn.batches(size, turn)])


def _seconds(read: Callable[[Any], object], batches: list[Any]) -> float:
    start = time.perf_counter()
    for batch in batches:
        read(batch)
    return (time.perf_counter() - start) / len(batches)


def _epoch(reader: Any, turn: int) -> float:
    return epoch_seconds(reader, turn) / len(reader)
