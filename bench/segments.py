"""Does the number of segments bring a cost per document back?

    python -m bench.segments --counts 1,100,4000
    python -m bench.segments --profile                    # what a batch spends, as bench.stages does

The same documents lie in stores of so many segments, and the iterated reader (packed, shuffled, checksums on, its
consumer does nothing) takes turns over them, warm. The ratio is to the store with the fewest segments, within a round.
A store of many segments is what many short-lived writers leave: one that stays merges its small segments on the way,
and ``compact`` merges those of others.

``--shape short`` is 8-48 tokens x 384; ``long`` has the paper shape's 60-512 tokens at a quarter of its width, so that
a document for each of 4,000 segments fits into half a gigabyte.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents, Shape
from actcache.admin.benchmark.rounds import Spread
from actcache.io import loops
from actcache.reader.reader import Reader
from bench.metered import epoch_seconds
from bench.report import Cell, Report
from bench.stages import COLUMNS, COUNTS, Spent, Watch

LONG = Shape("long", 60, 512, 192, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short,long")
    parser.add_argument("--counts", default="1,100,4000", help="numbers of segments")
    parser.add_argument("--backend", default="hdf5", help="hdf5, zarr, safetensors")
    parser.add_argument("--mib", type=float, default=512, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="print what a batch spends")
    parser.add_argument("--dir", type=Path, help="where to put the stores (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    counts = sorted(int(count) for count in options.counts.split(","))
    report = Report()
    for name in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            documents = Documents({**SHAPES, "long": LONG}[name], int(options.mib * 2**20))
            compare(documents, folder, options.backend, counts, options, report)
        finally:
            shutil.rmtree(folder)
    report.save(options.json)


def compare(
    documents: Documents, folder: Path, backend: str, counts: list[int], options: argparse.Namespace, report: Report
) -> None:
    if len(documents.lengths) < counts[-1]:
        raise SystemExit(f"{len(documents.lengths)} documents for {counts[-1]} segments: give a larger --mib")
    for count in counts:
        write(documents, f"{backend}:{folder / str(count)}", count)
    shape, keys = documents.shape, documents.keys
    spaces, readers, opened = {}, {}, {}
    for count in counts:
        start = time.perf_counter()
        spaces[count] = actcache.open(f"{backend}:{folder / str(count)}", mode="r").space(documents.recipe)
        readers[count] = spaces[count].reader(keys, batch_size=shape.batch, shuffle=True, layout="packed")
        opened[count] = time.perf_counter() - start
        if (found := spaces[count].usage().segments) != count:
            raise RuntimeError(f"{found} segments were made, not {count}")
    turns: dict[str, Callable[[int], float]] = {str(count): partial(epoch_seconds, readers[count]) for count in counts}
    seconds = rounds.take_turns(turns, options.rounds)
    first = seconds[str(counts[0])]
    rows: list[list[Cell]] = []
    for count in counts:
        spent = seconds[str(count)]
        each = Spread.of(spent / len(keys) * 1e6)
        rows.append(
            [f"{count}", Spread.of(documents.nbytes / spent / 1e9), each, Spread.of(first / spent), opened[count] * 1e3]
        )
    title = f"{shape.name}, {backend}: {len(keys)} documents, {documents.nbytes / 2**20:.0f} MiB, warm"
    columns = ("segments", "GB/s", "us a document", f"of {counts[0]} segment's", "opened in, ms")
    report.table(title, columns, rows)
    if options.profile:
        profile(readers, shape, options.rounds, report)
    for space in spaces.values():
        space.close()


def write(documents: Documents, url: str, segments: int) -> None:
    """Put the documents into so many segments, none of which are merged, without waiting for the disk."""
    parts = np.array_split(np.arange(len(documents.lengths)), segments)
    rows = documents.split()
    with (
        mock.patch("os.fsync"),
        mock.patch("actcache.segments.compaction._AT_ONCE", segments + 1),
        actcache.open(url) as store,
        store.space(documents.recipe, segment_bytes=2 * documents.nbytes) as space,
    ):
        for part in parts:
            ids = [np.arange(length) for length in documents.lengths[part]]
            space.put([key.tobytes() for key in documents.keys[part]], [rows[i] for i in part], ids)
            space.flush()


def profile(readers: dict[int, Reader], shape: Shape, epochs: int, report: Report) -> None:
    """Print what a batch spends, by the number of segments: see ``bench.stages``."""
    if loops.missing:
        report.say(f"no profile: there are no compiled loops to watch: {loops.missing}")
        return
    watch, spent = Watch(), {count: Spent() for count in readers}
    for epoch in range(epochs):
        for count, reader in readers.items():
            with watch.watching(spent[count]):
                epoch_seconds(reader, epoch)
    batches = epochs * len(next(iter(readers.values())))
    rows: list[list[Cell]] = [
        [str(count), *each.times(batches), *each.counts(batches)] for count, each in spent.items()
    ]
    title = f"{shape.name}: what a batch of {shape.batch} documents spends, by number of segments"
    report.table(title, ("segments", *COLUMNS, *COUNTS), rows)


if __name__ == "__main__":
    main()
