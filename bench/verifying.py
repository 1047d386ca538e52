"""Does ``verify`` use all processors?

    python -m bench.verifying --shape paper,short --backends hdf5,lmdb

``space.verify()`` of a warm store by one processor and by all that there are, in turns; beside them one thread that
hashes the same rows in memory and does nothing else (xxh3 of each document). Each turn opens the store anew, so its
time has the opening and the look at the segments in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import xxhash

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents
from actcache.admin.benchmark.rounds import Spread
from actcache.io.workers import available_cpus
from bench.report import Cell, Report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short")
    parser.add_argument("--backends", default="hdf5")
    parser.add_argument("--mib", type=float, default=256, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the stores (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    if available_cpus() < 2:
        raise SystemExit("this process may use one processor, and compares that with several")
    report = Report()
    for name in options.shape.split(","):
        documents = Documents(SHAPES[name], int(options.mib * 2**20))
        for backend in options.backends.split(","):
            folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
            try:
                compare(documents, f"{backend}:{folder / 'store'}", backend, options.rounds, report)
            finally:
                shutil.rmtree(folder)
    report.save(options.json)


def compare(documents: Documents, url: str, backend: str, count: int, report: Report) -> None:
    """Print what one corpus takes in one backend."""
    with actcache.open(url) as store, store.space(documents.recipe) as space:
        documents.put(space)
    everything = os.sched_getaffinity(0)
    one, several = "one processor", f"{len(everything)} processors"
    turns: dict[str, Callable[[int], float]] = {
        "xxh3 alone": lambda _: _hash(documents),
        one: lambda number: _verify(url, documents, {sorted(everything)[number % len(everything)]}),
        several: lambda _: _verify(url, documents, everything),
    }
    seconds = rounds.take_turns(turns, count)
    rows: list[list[Cell]] = [
        [name, Spread.of(documents.nbytes / spent / 1e9), Spread.of(seconds[one] / spent)]
        for name, spent in seconds.items()
    ]
    title = f"verify, {documents.shape.name}, {backend}: {len(documents.keys)} documents, warm"
    report.table(title, ("", "GB/s", "times one processor's speed"), rows)


def _hash(documents: Documents) -> float:
    for rows in documents.split():
        xxhash.xxh3_64_intdigest(rows)
    return 0.0


def _verify(url: str, documents: Documents, processors: set[int]) -> float:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)  # threads that are made from here on have it from this one
    try:
        with actcache.open(url, mode="r") as store, store.space(documents.recipe) as space:
            found = space.verify()
    finally:
        os.sched_setaffinity(0, before)
    if not found.intact or found.entries != len(documents.keys):
        raise RuntimeError(f"the store is damaged, or lacks documents: {found}")
    return 0.0


if __name__ == "__main__":
    main()
