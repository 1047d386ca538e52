"""One row a document: ``space.pooled`` of a whole corpus, beside reading the same rows.

    python -m bench.pooled --shape paper,short --backends hdf5,zarr,lmdb

``pooled`` with each way of pooling against the limit: an epoch of ``space.reader(layout="packed")`` in the order in
which documents lie, which brings all rows to the caller, with checksums, and pools nothing. And against what one would
write without it: ``space.get`` in batches of 256, and the mean of each entry. In turns; GB/s of activations read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache.admin.benchmark.corpus import Documents, Shape, StoredCorpus
from actcache.admin.benchmark.rounds import Spread, take_turns
from actcache.reader.pooling import WAYS
from actcache.store.space import Space
from bench import each_store
from bench.report import Cell, Report

_GET = 256  # documents of a ``get``
_LIMIT = "all rows, not pooled (the limit)"


def main() -> None:
    each_store.run(each_store.arguments(__doc__).parse_args(), compare)


def compare(shape: Shape, backend: str, folder: Path, options: argparse.Namespace, report: Report) -> None:
    """Print what pooling takes of one shape in one backend."""
    documents = Documents(shape, int(options.gib * 2**30))
    corpus = StoredCorpus(documents, {backend: f"{backend}:{folder / 'store'}"}, {})
    with corpus.open(backend) as space:
        keys = space.in_order(corpus.keys)
        turns: dict[str, Callable[[int], float]] = {f"pooled, {how}": partial(_pool, space, keys, how) for how in WAYS}
        turns[_LIMIT] = partial(_read, space, keys, shape.batch)
        turns["get, and a mean of each"] = partial(_by_hand, space, keys)
        seconds = take_turns(turns, options.rounds)
    limit = seconds[_LIMIT]
    lines: list[list[Cell]] = []
    for name, took in seconds.items():
        ratio = None if took is limit else Spread.of((limit / took).tolist())
        lines.append([name, Spread.of((corpus.nbytes / took / 1e9).tolist()), ratio])
    title = f"{backend}, {shape.shortest}-{shape.longest} tokens x {shape.hidden}, warm"
    report.table(title, ("", "GB/s", "of the limit"), lines)


def _pool(space: Space, keys: NDArray[np.uint8], how: str, turn: int) -> float:
    space.pooled(keys, how)
    return 0.0  # the whole turn counts


def _read(space: Space, keys: NDArray[np.uint8], batch: int, turn: int) -> float:
    for _ in space.reader(keys, batch_size=batch, layout="packed"):
        pass
    return 0.0


def _by_hand(space: Space, keys: NDArray[np.uint8], turn: int) -> float:
    means = []
    for begin in range(0, len(keys), _GET):
        for entry in space.get(keys[begin : begin + _GET]):
            assert entry is not None
            means.append(entry.activations.mean(axis=0, dtype=np.float32))
    np.stack(means)
    return 0.0


if __name__ == "__main__":
    main()
