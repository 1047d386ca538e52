"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

    python -m bench.storage --shape paper,short --mode warm,cold

Contestants read the same random batches, turn by turn. ``ratio`` is the time of the limit over the time of the backend
in
the same round: the median, and its 95 % interval. The limit of a warm read is the fastest raw way to get the rows into
the buffer plus the fastest xxh3 pass over them; of a cold read, direct reads of the same extents.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import actcache
from actcache.storage.workers import available_cpus
from bench import rounds
from bench.limits import FlatFile
from bench.shapes import SHAPES, Shape

console = Console(width=120)


class Corpus:
    """The same documents as a store of every backend and as one flat file."""

    def __init__(self, folder: Path, shape: Shape, nbytes: int, backends: list[str]) -> None:
        self.shape = shape
        self.lengths = shape.lengths(nbytes)
        self.flat = folder / "rows.bin"
        self.keys = np.stack(
            [np.frombuffer(actcache.document_key(f"document {i}"), np.uint8) for i in range(len(self.lengths))]
        )
        self._recipe = actcache.Recipe(model=f"bench-{shape.name}", layer=1, hidden_size=shape.hidden)
        rows = shape.rows(self.lengths)
        rows.tofile(self.flat)
        documents = np.split(rows, np.cumsum(self.lengths)[:-1])
        ids = [np.arange(len(document)) for document in documents]
        self.urls = {name: f"{name}:{folder / name}" for name in backends}
        for url in self.urls.values():
            with actcache.open(url) as store, store.space(self._recipe) as space:
                for start in range(0, len(documents), 1024):
                    part = slice(start, start + 1024)
                    space.put([key.tobytes() for key in self.keys[part]], documents[part], ids[part])
        self.nbytes = rows.nbytes

    def open(self, backend: str) -> actcache.Space:
        return actcache.open(self.urls[backend], mode="r").space(self._recipe)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--mode", default="warm", help="warm, cold")
    parser.add_argument("--backends", default="hdf5")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches of a turn")
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    options = parser.parse_args()
    for name in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            corpus = Corpus(folder, SHAPES[name], int(options.gib * 2**30), options.backends.split(","))
            for mode in options.mode.split(","):
                {"warm": warm, "cold": cold}[mode](corpus, options.rounds, options.batches)
        finally:
            shutil.rmtree(folder)


def plan(corpus: Corpus, count: int, batches: int) -> list[list[np.ndarray]]:
    """Return the documents of each round's batches, by position."""
    rng = np.random.default_rng(7)
    size = corpus.shape.batch
    return [
        list(rng.choice(len(corpus.lengths), (batches, size), replace=batches * size > len(corpus.lengths)))
        for _ in range(count)
    ]


def warm(corpus: Corpus, count: int, batches: int) -> None:
    out = np.empty((corpus.shape.batch * corpus.shape.longest, corpus.shape.hidden), np.float16)
    out[:] = 0
    flat = FlatFile(corpus.flat, corpus.lengths, corpus.shape.hidden, out, available_cpus())
    turns = plan(corpus, count, batches)
    contestants: dict[str, Callable[[int], float]] = {}
    for name, read in flat.warm().items():
        contestants[name] = lambda turn, read=read: _each(turns[turn], read)
    for name in ("one", "shared"):
        contestants[f"xxh3 {name}"] = lambda turn, name=name: _each(turns[turn], lambda w: flat.hash_passes(w)[name]())
    spaces = {name: corpus.open(name) for name in corpus.urls}
    for name, space in spaces.items():
        for verify in (True, False):
            label = name if verify else f"{name}, no checksums"
            contestants[label] = lambda turn, space=space, verify=verify: _each(
                turns[turn], lambda which: space.read_into(corpus.keys[which], out, verify=verify)
            )
    # Warm means mapped as well: a page's first touch through a mapping is a fault, for the limit as for a backend.
    for which in np.array_split(np.arange(len(corpus.lengths)), 1 + len(corpus.lengths) // corpus.shape.batch):
        for read in (
            flat.warm()["index_select"],
            *(lambda w, s=s: s.read_into(corpus.keys[w], out) for s in spaces.values()),
        ):
            read(which)
    seconds = rounds.run(contestants, count)
    raw = min(flat.warm(), key=lambda name: float(np.median(seconds[name])))
    digest = min(("xxh3 one", "xxh3 shared"), key=lambda name: float(np.median(seconds[name])))
    limits = {True: seconds[raw] + seconds[digest], False: seconds[raw]}
    rows = [(name, seconds[name], None) for name in (*flat.warm(), "xxh3 one", "xxh3 shared")]
    rows += [(f"the limit: {raw}", limits[False], None), (f"the limit: {raw} + {digest}", limits[True], None)]
    for name in spaces:
        rows += [(name, seconds[name], limits[True])]
        rows += [(f"{name}, no checksums", seconds[f"{name}, no checksums"], limits[False])]
    _print("warm", corpus, rows, turns)
    for space in spaces.values():
        space.close()
    flat.close()


def cold(corpus: Corpus, count: int, batches: int) -> None:
    out = np.empty((corpus.shape.batch * corpus.shape.longest, corpus.shape.hidden), np.float16)
    out[:] = 0
    turns = plan(corpus, count, batches)
    flat = FlatFile(corpus.flat, corpus.lengths, corpus.shape.hidden, out, available_cpus())
    contestants: dict[str, Callable[[int], float]] = {}
    for name, read in flat.cold().items():
        contestants[name] = lambda turn, read=read: _each(turns[turn], read)
    for name in corpus.urls:
        contestants[name] = lambda turn, name=name: _cold_turn(corpus, name, turns[turn], out)
    seconds = rounds.run(contestants, count, before=drop_caches)
    raw = min(flat.cold(), key=lambda name: float(np.median(seconds[name])))
    rows = [(name, seconds[name], None) for name in flat.cold()] + [(f"the limit: {raw}", seconds[raw], None)]
    _print("cold", corpus, rows + [(name, seconds[name], seconds[raw]) for name in corpus.urls], turns)
    flat.close()


def _cold_turn(corpus: Corpus, backend: str, turn: list[np.ndarray], out: np.ndarray) -> float:
    """Read a turn's batches, hinting one batch ahead as the reader does; the opening is part of the time."""
    space = corpus.open(backend)
    space.read_ahead(corpus.keys[turn[0]])
    for number, which in enumerate(turn):
        if number + 1 < len(turn):
            space.read_ahead(corpus.keys[turn[number + 1]])
        space.read_into(corpus.keys[which], out)
    space.close()
    return 0.0


def _each(turn: list[np.ndarray], read: Callable[[np.ndarray], object]) -> float:
    for which in turn:
        read(which)
    return 0.0


def drop_caches() -> None:
    """Empty the page cache. Needs root; pages that a process maps stay, so spaces are opened anew in every turn."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _print(
    mode: str, corpus: Corpus, rows: list[tuple[str, np.ndarray, np.ndarray | None]], turns: list[list[np.ndarray]]
) -> None:
    payload = np.array([sum(int(corpus.lengths[which].sum()) for which in turn) for turn in turns])
    payload = payload * corpus.shape.row_bytes
    title = f"{corpus.shape.name}, {mode}: {len(corpus.lengths)} documents, {corpus.nbytes / 2**30:.1f} GiB"
    table = Table(title=title)
    for column in ("", "GB/s", "ratio to the limit"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds, limit in rows:
        ratio = "" if limit is None else str(rounds.Spread.of(limit / seconds))
        table.add_row(name, str(rounds.Spread.of(payload / seconds / 1e9)), ratio)
    console.print(table)


if __name__ == "__main__":
    main()
