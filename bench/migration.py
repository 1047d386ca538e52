"""Migration between backends, beside what its two sides can do alone on the same disk in the same round.

    python -m bench.migration --backends hdf5,zarr,lmdb --gib 1

The limit is the slower of two: reading all entries of the source in the order in which they lie, verified, into a
reused buffer; and putting and flushing the same entries, from memory, into an empty store of the target's backend. The
target is 0.5: a migration also reads back all that it has written.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents
from actcache.admin.migration import migrate

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--backends", default="hdf5,zarr,lmdb", help="all pairs of these; safetensors, too")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write (removed afterwards)")
    options = parser.parse_args()
    for shape in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            compare(
                Documents(SHAPES[shape], int(options.gib * 2**30)), folder, options.backends.split(","), options.rounds
            )
        finally:
            shutil.rmtree(folder)


def compare(documents: Documents, folder: Path, backends: list[str], count: int) -> None:
    sources = {name: f"{name}:{folder / 'sources' / name}" for name in backends}
    for url in sources.values():
        with actcache.open(url) as store, store.space(documents.recipe) as space:
            documents.put(space)
    target = folder / "target"

    def read(name: str) -> float:
        buffer = np.empty((documents.shape.batch * documents.shape.longest, documents.shape.hidden), np.float16)
        with actcache.open(sources[name], "r") as store, store.space(documents.recipe) as space:
            begin = time.perf_counter()
            keys = space.in_order(documents.keys)
            for start in range(0, len(keys), documents.shape.batch):
                space.read_into(keys[start : start + documents.shape.batch], buffer)
            return time.perf_counter() - begin

    def write(name: str) -> float:
        with actcache.open(f"{name}:{target}") as store, store.space(documents.recipe) as space:
            begin = time.perf_counter()
            documents.put(space)
            space.flush()
            return time.perf_counter() - begin

    def move(source: str, name: str) -> float:
        with actcache.open(sources[source], "r") as old, actcache.open(f"{name}:{target}") as new:
            begin = time.perf_counter()
            done = migrate(old, new)
            seconds = time.perf_counter() - begin
        if not done.equal:
            raise RuntimeError(f"the migration from {source} to {name} is not right")
        return seconds

    def before() -> None:
        shutil.rmtree(target, ignore_errors=True)
        os.sync()

    pairs = list(itertools.product(backends, backends))
    contestants = {
        **{f"read {name}": lambda turn, name=name: read(name) for name in backends},
        **{f"write {name}": lambda turn, name=name: write(name) for name in backends},
        **{f"{one} -> {other}": lambda turn, one=one, other=other: move(one, other) for one, other in pairs},
    }
    seconds = rounds.take_turns(contestants, count, before=before)
    table = Table(title=f"{documents.shape.name}: {documents.nbytes / 2**30:.2f} GiB, warm")
    for name in ("", "GB/s", "of the slower side's limit"):
        table.add_column(name, justify="left" if not name else "right")
    for name, taken in seconds.items():
        ratio = ""
        if "->" in name:
            source, other = name.split(" -> ")
            limit = np.maximum(seconds[f"read {source}"], seconds[f"write {other}"])
            ratio = str(rounds.Spread.of(limit / taken))
        table.add_row(name, str(rounds.Spread.of(documents.nbytes / 1e9 / taken)), ratio)
    console.print(table)


if __name__ == "__main__":
    main()
