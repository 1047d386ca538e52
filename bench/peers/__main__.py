"""Shuffled batches of documents as they are delivered: actcache beside what else one would use.

    python -m bench.peers                                    # all that is below, in 20 minutes
    python -m bench.peers --shape short --batch 1,8,32,256,1024 --layout padded --mode warm

Contestants deliver the same documents (short: 8-48 tokens x 384 float16, paper: 60-512 x 768) in shuffled batches of
the same size, as one torch tensor (``padded`` or ``packed``) and the documents' lengths; a consumer takes them and does
nothing. Each is used as its documentation shows for shuffled reading, in several settings and with 0 and 2 worker
processes; the best of all peers' settings is what actcache is held against. actcache verifies checksums and delivers
token ids too, which no peer does. ``reference: native gather, no checks`` is no loader but what the machine can do: see
``bench.peers.native``. A turn is one whole epoch; contestants take turns, and ratios are of one round
(``actcache.admin.benchmark.rounds``).

There are heats: each way of each peer has one turn (warm: after one that does not count), and those that take more than
twice as long as the second best peer's go no further; they stand in the table with that one turn. The rounds of the
others are as many as ``--rounds``, or what the time left of ``--minutes`` allows, and the title says how many.

Opening is not timed. Warm: everything in the page cache and workers kept from epoch to epoch. Cold: the files of all
contestants are dropped from the page cache, and each turn opens everything anew in a process of its own; that workers
have to start is part of a peer's time, and that its thread has to start is part of actcache's.

Peers are optional: ``bench/peers.txt`` says what to install. One that is missing, or fails, is named with the reason.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import itertools
import logging
import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.caches import evict_surely, refuse_mappings
from actcache.admin.benchmark.corpus import SHAPES, Documents
from actcache.admin.benchmark.rounds import Spread, fastest
from bench.peers.contestant import Contestant, content, load, prepare, timed
from bench.peers.loading import Loader, Wanted
from bench.report import Cell, Report

PEERS = {
    "torch DataLoader": "files",
    "lmdb": "lmdb_values",
    "datasets": "arrow",
    "mosaicml-streaming": "mds",
    "litdata": "lit",
}
REFERENCE = "reference: native gather, no checks"
MIB = {"short": 128, "paper": 384}  # of rows, which take some 25 and 14 batches of
BATCHES = {"short": 256, "paper": 64}  # documents
_SLOW = 2.0  # times the second best peer's seconds: who takes longer in the heats goes no further
_TOLERATED = 0.001  # share of the pages that may have stayed in memory before a cold turn
_SHARES = {"cold": 3, "warm": 1}  # of the time: a cold turn has a process to start
_FEWEST = 5  # rounds, whatever the time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short,paper", help="short (8-48 tokens x 384), paper (60-512 x 768)")
    parser.add_argument("--backends", default="hdf5,zarr,lmdb", help="of actcache")
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--workers", default="0,2", help="worker processes of the peers")
    parser.add_argument("--mode", default="warm,cold", help="warm, cold")
    parser.add_argument("--layout", default="padded,packed", help="padded, packed; cold is measured in the first")
    parser.add_argument("--batch", help="documents of a batch, as 1,8,32 (256 short ones, 64 of the paper's)")
    parser.add_argument("--mib", type=float, help="size of the corpus (128 of short documents, 384 of the paper's)")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--minutes", type=float, default=20, help="for everything")
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", module="torch|streaming|litdata|datasets")
    logging.getLogger("litdata").setLevel(logging.ERROR)
    report = Report()
    shapes, modes, layouts = (given.split(",") for given in (options.shape, options.mode, options.layout))
    sizes = {shape: [int(size) for size in (options.batch or str(BATCHES[shape])).split(",")] for shape in shapes}
    # Cold first: what this process had open warm stays mapped by some library, and could not be dropped. In one layout
    # alone: a disk knows of none.
    kinds = [(mode, layout) for mode in sorted(modes) for layout in (layouts if mode == "warm" else layouts[:1])]
    count = sum(len(of_shape) for of_shape in sizes.values())
    clock = Clock(60 * options.minutes, count * sum(_SHARES[mode] for mode, _ in kinds))
    summary: list[list[Cell]] = []
    backends = options.backends.split(",")
    for shape in shapes:
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            documents = Documents(SHAPES[shape], int((options.mib or MIB[shape]) * 2**20))
            compared = Compared(documents, folder, report)
            for backend in backends:
                compared.add(_ours(backend), "ours", backend, [0])
            compared.add(REFERENCE, "native", "native", [0])
            for name in options.peers.split(","):
                compared.add(name, PEERS[name], PEERS[name], [int(count) for count in options.workers.split(",")])
            compared.prepare()
            for (mode, layout), size in itertools.product(kinds, sizes[shape]):
                wanted = Wanted(size, SHAPES[shape].hidden, layout == "padded", persistent=True)
                row = compared.compare(mode, wanted, options.rounds, clock)
                summary.append([f"{shape}, {mode}, {layout}, batches of {size}", *row(backends)])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    columns = ("times as fast as the best peer", "the best peer", *backends, "native")
    report.table("summary: medians, and the intervals of 95 %", columns, summary)
    report.say(f"{clock.spent / 60:.1f} minutes")
    report.save(options.json)


def _ours(backend: str) -> str:
    return f"actcache {backend}"


class Clock:
    """Deals the time out to the comparisons that are still to come, ``shares`` of them in all."""

    def __init__(self, seconds: float, shares: int) -> None:
        self._start = time.perf_counter()
        self._seconds, self._left = seconds, shares

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._start

    def deal(self, shares: int) -> float:
        """Return the time (of ``time.perf_counter``) at which a comparison of so many shares should have ended."""
        seconds = (self._seconds - self.spent) * shares / self._left
        self._left -= shares
        return time.perf_counter() + seconds


@dataclass(frozen=True)
class Heat:
    """One turn: its seconds, and what it took with all around it."""

    seconds: float
    wall: float


class Compared:
    """The contestants over some documents, which each keeps in its own form."""

    def __init__(self, documents: Documents, folder: Path, report: Report) -> None:
        self._documents, self._folder, self._report = documents, folder, report
        self._written: list[tuple[str, str, Path, list[int]]] = []
        self._sum = int(documents.rows.view(np.uint16).sum(dtype=np.uint64))

    def add(self, name: str, module: str, folder: str, workers: list[int]) -> None:
        """Have a peer write the documents."""
        try:
            peer = load(module)
        except Exception as error:  # a package that is there can still fail to load
            self._report.say(f"absent: {name} ({type(error).__name__}: {error}); bench/peers.txt says what to install")
            return
        where = self._folder / folder
        try:
            peer.write(self._documents, where)
        except Exception:
            self._report.say(f"absent: {name} could not write: {traceback.format_exc(limit=3)}")
            return
        versions = (f"{package} {importlib.metadata.version(package)}" for package in peer.PACKAGES)
        self._report.say(f"{name}: {', '.join(versions)}")
        self._written.append((name, module, where, workers))

    def prepare(self) -> None:
        """Have the processes of cold turns start with everything imported, and all pages on the medium."""
        os.sync()
        prepare(module for _, module, _, _ in self._written)

    def compare(self, mode: str, wanted: Wanted, most: int, clock: Clock) -> Callable[[list[str]], list[Cell]]:
        """Print a table; return what makes a row of some backends for the summary: the best peer, and ratios to it."""
        end = clock.deal(_SHARES[mode])
        contestants = list(self._contestants(wanted))
        before: Callable[[], object] = gc.collect
        if mode == "cold":
            refuse_mappings([self._folder])
            before = partial(evict_surely, self._folder, _TOLERATED)
        opened: dict[str, Loader] = {}
        turns: dict[str, Callable[[int], float]] = {}
        heats: dict[str, Heat] = {}
        try:
            for contestant in contestants:
                turn = self._turn(mode, contestant, wanted, opened)
                if turn is not None and (heat := self._heat(contestant, turn, before)) is not None:
                    turns[contestant.name], heats[contestant.name] = turn, heat
            by_name = {contestant.name: contestant for contestant in contestants}
            finalists = self._finalists(mode, wanted, by_name, heats, opened)
            for name in opened.keys() - finalists.keys():
                opened.pop(name).close()
            each_round = sum(heats[name].wall for name in finalists)
            fits = int((end - time.perf_counter()) / each_round) - 1  # the one that warms up
            count = max(_FEWEST, min(most, fits))
            seconds = rounds.take_turns({name: turns[name] for name in finalists}, count, before=before)
        finally:
            for loader in opened.values():
                loader.close()
        peers = [name for name in finalists if by_name[name].peer]
        best = fastest(peers, seconds) if peers else None
        self._table(mode, wanted, seconds, {n: h for n, h in heats.items() if n not in seconds}, best, count)

        def row(backends: list[str]) -> list[Cell]:
            names = [*map(_ours, backends), REFERENCE]
            return [best, *(Spread.of(seconds[best] / seconds[n]) if best and n in seconds else None for n in names)]

        return row

    def _contestants(self, wanted: Wanted) -> list[Contestant]:
        found, count = [], len(self._documents.lengths)
        for name, module, where, workers in self._written:
            for number in workers:
                for way in load(module).ways(where, count, wanted, number):
                    title = name if module in ("ours", "native") else f"{name}: {way}, {number} workers"
                    found.append(Contestant(title, module, where, way, count, number))
        return found

    def _turn(
        self, mode: str, contestant: Contestant, wanted: Wanted, opened: dict[str, Loader]
    ) -> Callable[[int], float] | None:
        """Return what takes a turn; cold ones run in processes of their own: only their end is sure to unmap all that a
        library has mapped."""
        if mode == "cold":
            return partial(contestant.anew, wanted)
        try:
            loader = opened[contestant.name] = contestant.open(wanted)
            timed(loader, 0)
        except Exception:
            self._refuse(contestant, traceback.format_exc(limit=3))
            return None
        return partial(timed, loader)

    def _heat(self, contestant: Contestant, turn: Callable[[int], float], before: Callable[[], object]) -> Heat | None:
        start = time.perf_counter()
        before()
        try:
            seconds = turn(1)
        except Exception as error:
            self._refuse(contestant, str(error))
            return None
        return Heat(seconds, time.perf_counter() - start)

    def _finalists(
        self,
        mode: str,
        wanted: Wanted,
        contestants: dict[str, Contestant],
        heats: dict[str, Heat],
        opened: dict[str, Loader],
    ) -> dict[str, Contestant]:
        """Return who takes part in the rounds: the fast peers and all that are no peers, if what they deliver is right.

        Takes out of ``heats`` those that deliver something else.
        """
        right: dict[str, Contestant] = {}
        fastest_peers: list[float] = []
        for name in sorted(heats, key=lambda name: heats[name].seconds):
            contestant = contestants[name]
            # Held against the second: the first one's only turn may have been luck, as where the host had a cold file.
            if contestant.peer and len(fastest_peers) > 1 and heats[name].seconds > _SLOW * fastest_peers[1]:
                continue
            tokens, total = content(opened[name]) if mode == "warm" else contestant.content_anew(wanted)
            if tokens != int(self._documents.lengths.sum()) or total != self._sum:
                self._refuse(contestant, f"it delivers other documents than were stored ({tokens} tokens)")
                del heats[name]
                continue
            right[name] = contestant
            if contestant.peer:
                fastest_peers.append(heats[name].seconds)
        return right

    def _refuse(self, contestant: Contestant, why: str) -> None:
        if not contestant.peer:
            raise RuntimeError(f"{contestant.name}: {why}")
        self._report.say(f"absent: {contestant.name}: {why}")

    def _table(
        self,
        mode: str,
        wanted: Wanted,
        seconds: dict[str, np.ndarray],
        slow: dict[str, Heat],
        best: str | None,
        count: int,
    ) -> None:
        rows: list[list[Cell]] = []
        nbytes, documents = self._documents.nbytes, len(self._documents.lengths)
        for name, spent in sorted(seconds.items(), key=lambda item: float(np.median(item[1]))):
            ratio = None if best is None else Spread.of(seconds[best] / spent)
            rows.append([name, Spread.of(nbytes / spent / 1e9), Spread.of(documents / spent / 1e3), ratio])
        for name, heat in sorted(slow.items(), key=lambda item: item[1].seconds):
            rows.append([f"{name} (1 turn)", nbytes / heat.seconds / 1e9, documents / heat.seconds / 1e3, None])
        layout = "padded" if wanted.padded else "packed"
        title = (
            f"{self._documents.shape.name}, {mode}, {layout}: {documents} documents, {nbytes / 2**20:.0f} MiB, "
            f"batches of {wanted.batch}, {count} rounds; the best peer: {best}"
        )
        self._report.table(title, ("", "GB/s", "thousand documents/s", "x the best peer"), rows)


if __name__ == "__main__":
    main()
