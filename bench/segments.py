"""Does the number of segments bring a cost per document back?

    python -m bench.segments --counts 1,100,4000
    python -m bench.segments --profile                    # where the time of a batch goes, stage by stage

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
from actcache.reader.reader import Reader
from bench.metered import epoch_seconds
from bench.report import Cell, Report
from bench.stages import Stages

LONG = Shape("long", 60, 512, 192, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short,long")
    parser.add_argument("--counts", default="1,100,4000", help="numbers of segments")
    parser.add_argument("--backend", default="hdf5", help="hdf5, zarr, safetensors")
    parser.add_argument("--mib", type=float, default=512, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--profile", action="store_true", help="print the stages of a batch")
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
    """Print what each stage of reading takes a batch."""
    stages = {count: Stages() for count in readers}
    walls: dict[int, float] = dict.fromkeys(readers, 0.0)
    for epoch in range(epochs):
        for count, reader in readers.items():
            with stages[count].watching():
                walls[count] += epoch_seconds(reader, epoch)
    batches = epochs * len(next(iter(readers.values())))
    names = sorted({name for each in stages.values() for name in each.seconds})
    names.sort(key=lambda name: -max(each.processor[name] for each in stages.values()))
    for what in ("processor", "seconds"):
        rows: list[list[Cell]] = []
        for name in names:
            calls = float(max(each.calls[name] for each in stages.values()) / batches)
            rows.append([name, calls, *(getattr(each, what)[name] / batches * 1e3 for each in stages.values())])
        sums = [sum(getattr(each, what).values()) for each in stages.values()]
        rows.append(["sum over all threads", None, *(each / batches * 1e3 for each in sums)])
        if what == "seconds":
            rows.append(["wall clock", None, *(wall / batches * 1e3 for wall in walls.values())])
        meant = "of the processor" if what == "processor" else "that passed"
        title = f"{shape.name}: ms {meant} for a batch of {shape.batch} documents, by number of segments"
        report.table(title, ("", "calls a batch", *(str(count) for count in readers)), rows, decimals=3)
    if missing := sorted({name for each in stages.values() for name in each.missing}):
        report.say(f"not found, and so part of others: {', '.join(missing)}")


if __name__ == "__main__":
    main()
