"""Token rows, mixed across documents, beside the document reader of the same space.

    python -m bench.rows --shape paper,short --backends hdf5,zarr,lmdb
    python -m bench.rows --mode cold         # as root the whole page cache is dropped before each turn

An epoch of ``space.rows`` against an epoch of ``space.reader(shuffle=True, layout="packed")``, both with checksums, in
turns: GB/s of activations, and the ratio of two turns of one round. Beside it, how many documents a batch mixes with
such a buffer, as the reader says and as was counted. The target is a ratio of 0.8.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from actcache.admin.benchmark.corpus import Documents, Shape, StoredCorpus
from actcache.admin.benchmark.rounds import Spread, take_turns
from actcache.store.space import Space
from bench import each_store
from bench.caches import drop_caches
from bench.report import Cell, Report

TARGET = 0.8


def main() -> None:
    parser = each_store.arguments(__doc__)
    parser.add_argument("--mode", default="warm", choices=("warm", "cold"))
    parser.add_argument("--buffers", default="64MiB,256MiB", help="bytes of rows that are mixed at once")
    parser.add_argument("--batch", type=int, default=4096, help="rows of a batch")
    each_store.run(parser.parse_args(), compare)


def compare(shape: Shape, backend: str, folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Print what rows give of one shape in one backend."""
    documents = Documents(shape, int(options.gib * 2**30))
    corpus = StoredCorpus(documents, {backend: f"{backend}:{folder / 'store'}"}, {})
    buffers = options.buffers.split(",")
    with corpus.open(backend) as space:
        reader = space.reader(corpus.keys, batch_size=shape.batch, shuffle=True, layout="packed")
        readers = {buffer: space.rows(corpus.keys, batch_size=options.batch, buffer=buffer) for buffer in buffers}
        contestants = {"documents": partial(_epoch, reader)}
        contestants |= {buffer: partial(_epoch, rows) for buffer, rows in readers.items()}
        before = partial(drop_caches, folder) if options.mode == "cold" else lambda: None
        seconds = take_turns(contestants, options.rounds, before)
        speed = Spread.of((corpus.nbytes / seconds["documents"] / 1e9).tolist())
        lines: list[list[Cell]] = [["the document reader", speed, None, None, None]]
        for buffer, rows in readers.items():
            gb = Spread.of((corpus.nbytes / seconds[buffer] / 1e9).tolist())
            ratio = Spread.of((seconds["documents"] / seconds[buffer]).tolist())
            said, counted = f"{rows.documents_mixed:,.0f}", f"{_counted(space, corpus, buffer, options.batch):,.0f}"
            lines.append([f"rows, buffer {buffer}", gb, ratio, said, counted])
    sizes = f"{shape.shortest}-{shape.longest} tokens x {shape.hidden}"
    title = f"{backend}, {sizes}, {options.mode}, batches of {options.batch}"
    columns = ("an epoch of", "GB/s", "of the document reader", "documents a batch, as said", "as counted")
    report.table(title, columns, lines)


def _epoch(reader: Iterable[object], turn: int) -> float:
    for _ in reader:
        pass
    return 0.0  # the whole turn counts


def _counted(space: Space, corpus: StoredCorpus, buffer: str, batch: int) -> float:
    found = [
        len(np.unique(one.documents))
        for one in space.rows(corpus.keys, batch_size=batch, buffer=buffer, beside="documents")
        if len(one) == batch
    ]
    return float(np.mean(found))


if __name__ == "__main__":
    main()
