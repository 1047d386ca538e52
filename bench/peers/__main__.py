"""Shuffled batches of short documents as they are delivered: actcache beside what else one would use.

    python -m bench.peers --mode warm,cold                     # documents of 8-48 tokens x 384 float16

Contestants deliver the same documents in shuffled batches of the same size, as one torch tensor of float16 (packed; or
``--layout padded``) and the documents' lengths; a consumer takes them and does nothing. Each is used as its
documentation shows for shuffled reading, in several settings and with 0 and 2 worker processes; the best of all peers'
settings is what actcache is held against. actcache verifies checksums and delivers token ids too, which no peer does. A
turn is one whole epoch; contestants take turns, and ratios are of one round (``actcache.admin.benchmark.rounds``).

Opening is not timed. Warm: everything in the page cache and workers kept from epoch to epoch. Cold: the
page cache is dropped, and each turn opens everything anew in a process of its own; that workers have to start is part
of a peer's time, and that its thread has to start is part of actcache's.

Peers are optional: ``bench/peers.txt`` says what to install. One that is missing, or fails, is named with the reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import logging
import os
import shutil
import tempfile
import traceback
import warnings
from functools import partial
from pathlib import Path

import numpy as np

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents
from actcache.admin.benchmark.rounds import Spread, fastest
from bench.caches import drop_caches
from bench.peers.contestant import Contestant, load, prepare, timed
from bench.peers.loading import Wanted
from bench.report import Cell, Report

PEERS = {
    "torch DataLoader": "files",
    "lmdb": "lmdb_values",
    "datasets": "arrow",
    "mosaicml-streaming": "mds",
    "litdata": "lit",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short", help="short (8-48 tokens x 384), paper (60-512 x 768)")
    parser.add_argument("--backends", default="hdf5,zarr,lmdb", help="of actcache")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--workers", default="0,2", help="worker processes of the peers")
    parser.add_argument("--mode", default="warm", help="warm, cold (as root the whole page cache is dropped)")
    parser.add_argument("--layout", default="packed", choices=("packed", "padded"))
    parser.add_argument("--batch", type=int, help="documents of a batch (the shape's: 1024 short ones)")
    parser.add_argument("--mib", type=float, default=256, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="torch|streaming|litdata|datasets")
    logging.getLogger("litdata").setLevel(logging.ERROR)
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        shape = SHAPES[options.shape]
        documents = Documents(shape, int(options.mib * 2**20))
        wanted = Wanted(options.batch or shape.batch, shape.hidden, options.layout == "padded", persistent=True)
        compared = Compared(documents, folder, report)
        for backend in options.backends.split(","):
            compared.add(f"actcache {backend}", "ours", backend, wanted, [0])
        for name in options.peers.split(","):
            workers = [int(count) for count in options.workers.split(",")]
            compared.add(name, PEERS[name], PEERS[name], wanted, workers)
        for mode in options.mode.split(","):
            {"warm": compared.warm, "cold": compared.cold}[mode](wanted, options.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report.save(options.json)


class Compared:
    """The contestants over some documents, which each keeps in its own form."""

    def __init__(self, documents: Documents, folder: Path, report: Report) -> None:
        self._documents, self._folder, self._report = documents, folder, report
        self._contestants: list[Contestant] = []
        self._sum = int(documents.rows.view(np.uint16).sum(dtype=np.uint64))

    def add(self, name: str, module: str, folder: str, wanted: Wanted, workers: list[int]) -> None:
        """Have a peer write the documents, and take in each of its ways that delivers what was stored."""
        try:
            peer = load(module)
        except Exception as error:  # a package that is there can still fail to load
            self._report.say(f"absent: {name} ({type(error).__name__}: {error}); bench/peers.txt says what to install")
            return
        where, count = self._folder / folder, len(self._documents.lengths)
        try:
            peer.write(self._documents, where)
        except Exception:
            self._report.say(f"absent: {name} could not write: {traceback.format_exc(limit=3)}")
            return
        versions = (f"{package} {importlib.metadata.version(package)}" for package in peer.PACKAGES)
        self._report.say(f"{name}: {', '.join(versions)}")
        for number in workers:
            for way in peer.ways(where, count, wanted, number):
                title = name if module == "ours" else f"{name}: {way}, {number} workers"
                self._try(Contestant(title, module, where, way, count, number), wanted)

    def _try(self, contestant: Contestant, wanted: Wanted) -> None:
        try:
            tokens, total = contestant.content(wanted)
        except Exception:
            if contestant.ours:
                raise
            self._report.say(f"absent: {contestant.name}: {traceback.format_exc(limit=3)}")
            return
        if tokens != int(self._documents.lengths.sum()) or total != self._sum:
            self._report.say(f"absent: {contestant.name} delivers other documents than were stored ({tokens} tokens)")
            return
        self._contestants.append(contestant)

    def warm(self, wanted: Wanted, count: int) -> None:
        loaders = {contestant.name: contestant.open(wanted) for contestant in self._contestants}
        turns = {name: partial(timed, loader) for name, loader in loaders.items()}
        seconds = rounds.take_turns(turns, count, before=gc.collect)
        for loader in loaders.values():
            loader.close()
        self._table("warm", wanted, seconds)

    def cold(self, wanted: Wanted, count: int) -> None:
        """Take turns in processes of their own: only their end is sure to unmap all that a library has mapped."""
        prepare(self._contestants)
        turns = {}
        for contestant in self._contestants:
            try:
                contestant.anew(wanted, 0)
            except Exception as error:
                self._report.say(f"absent, cold: {error}")
            else:
                turns[contestant.name] = partial(contestant.anew, wanted)
        self._table("cold", wanted, rounds.take_turns(turns, count, before=partial(drop_caches, self._folder)))

    def _table(self, mode: str, wanted: Wanted, seconds: dict[str, np.ndarray]) -> None:
        peers = [
            contestant.name for contestant in self._contestants if not contestant.ours and contestant.name in seconds
        ]
        best = fastest(peers, seconds) if peers else None
        rows: list[list[Cell]] = []
        for name, spent in sorted(seconds.items(), key=lambda item: float(np.median(item[1]))):
            ratio = None if best is None else Spread.of(seconds[best] / spent)
            thousands = len(self._documents.lengths) / spent / 1e3
            rows.append([name, Spread.of(self._documents.nbytes / spent / 1e9), Spread.of(thousands), ratio])
        shape = self._documents.shape
        layout = "padded" if wanted.padded else "packed"
        title = (
            f"{shape.name}, {mode}, {layout}: {len(self._documents.lengths)} documents, "
            f"{self._documents.nbytes / 2**20:.0f} MiB, batches of {wanted.batch}; the best peer: {best}"
        )
        self._report.table(title, ("", "GB/s", "thousand documents/s", "x the best peer"), rows)


if __name__ == "__main__":
    main()
