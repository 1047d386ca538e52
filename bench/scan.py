"""Epochs over more than the memory holds, cold: what is read, and what is pushed out of the page cache for it.

    python -m bench.scan --shape short,paper --gib 3 --memory 1

A control group gives the process so much memory (as root, with memory control groups of either version); the corpus is
larger. The consumer takes packed batches of ``space.reader(keys, shuffle=True)``, checksums on, and does nothing with
them. In each round three readers read one epoch, each in its turn, the page cache dropped before:

- as it is: rows go past the page cache where that cannot hold the space;
- by way of the page cache, whatever it can hold;
- past it, whatever it can hold.

The limit is direct reads of the same extents, 8 to 32 at a time (``actcache.admin.benchmark.limits``). Beside the
speed stands what the page cache of the group held at the end of the epoch: what others had there is gone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.caches import refuse_mappings
from actcache.admin.benchmark.corpus import SHAPES, Documents, StoredCorpus
from actcache.admin.benchmark.limits import FlatFile
from actcache.admin.benchmark.rounds import Spread, fastest
from actcache.io import memory
from actcache.io.workers import available_cpus
from bench.caches import drop_caches
from bench.metered import epoch_seconds
from bench.report import Report

_ROOT = Path("/sys/fs/cgroup")
_WAYS = {"as it is": memory.available, "through the page cache": lambda: 1 << 60, "past the page cache": lambda: 0}


class Group:
    """A control group with a limit of memory, which this process goes into and leaves again."""

    def __init__(self, nbytes: int) -> None:
        old = (_ROOT / "memory").is_dir()
        self._parent = _ROOT / "memory" if old else _ROOT
        self._folder = self._parent / f"actcache-bench-{os.getpid()}"
        limit, self._stat = ("memory.limit_in_bytes", "cache") if old else ("memory.max", "file")
        try:
            self._folder.mkdir()
            (self._folder / limit).write_text(str(nbytes), encoding="ascii")
        except OSError as error:
            raise SystemExit(
                f"no control group with a limit of memory can be made ({error}): be root, on Linux"
            ) from None
        self._enter(self._folder)

    def _enter(self, folder: Path) -> None:
        (folder / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    def held(self) -> int:
        """Return the bytes of files that the group has in memory."""
        lines = (self._folder / "memory.stat").read_text(encoding="ascii").splitlines()
        return int(dict(line.split() for line in lines)[self._stat])

    def close(self) -> None:
        self._enter(self._parent)
        self._folder.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="short,paper", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--backends", default="hdf5,zarr", help="hdf5, zarr, safetensors")
    parser.add_argument("--gib", type=float, default=3.0, help="size of the corpus")
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that the process may use, files included")
    parser.add_argument("--turn-gib", type=float, default=1.0, help="of rows that are read in a turn")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = Report()
    for shape in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            urls = {name: f"{name}:{folder / name}" for name in options.backends.split(",")}
            corpus = StoredCorpus(
                Documents(SHAPES[shape], int(options.gib * 2**30)), urls, {}, flat=folder / "rows.bin"
            )
            group = Group(int(options.memory * 2**30))
            try:
                _compare(corpus, folder, group, options, report)
            finally:
                group.close()
        finally:
            shutil.rmtree(folder)
    report.save(options.json)


def _compare(corpus: StoredCorpus, folder: Path, group: Group, options: argparse.Namespace, report: Report) -> None:
    row_bytes = corpus.shape.row_bytes
    count = min(len(corpus.lengths), int(options.turn_gib * 2**30 / (corpus.lengths.mean() * row_bytes)))
    flat = FlatFile(folder / "rows.bin", corpus.lengths, corpus.shape.hidden, [corpus.buffer()], available_cpus())
    held: dict[str, list[int]] = {}

    def sample(turn: int) -> np.ndarray:
        return np.random.default_rng(turn).permutation(len(corpus.lengths))[:count]

    def raw(read: Callable[[np.ndarray], object], turn: int) -> float:
        read(sample(turn))
        return 0.0

    def epoch(backend: str, way: str, turn: int) -> float:
        memory.available = _WAYS[way]  # what the engine asks when it decides
        try:
            with corpus.open(backend) as space:
                keys = corpus.keys[sample(turn)]
                reader = space.reader(keys, batch_size=corpus.shape.batch, layout="packed")
                seconds = epoch_seconds(reader, 0)
                held.setdefault(f"{backend} {way}", []).append(group.held())
                return seconds
        finally:
            memory.available = _WAYS["as it is"]

    contestants: dict[str, Callable[[int], float]] = {name: partial(raw, read) for name, read in flat.cold().items()}
    limits = list(contestants)
    ours = [(backend, way) for backend in corpus.urls for way in _WAYS]
    contestants.update({f"{backend} {way}": partial(epoch, backend, way) for backend, way in ours})

    def before() -> None:
        refuse_mappings([folder / name for name in corpus.urls])
        drop_caches(folder)

    seconds = rounds.take_turns(contestants, options.rounds, before=before)
    flat.close()
    best = fastest(limits, seconds)
    payload = np.array([corpus.lengths[sample(turn)].sum() for turn in range(options.rounds)]) * row_bytes
    rows: list[list[Any]] = [[f"the limit: {best}", Spread.of(payload / seconds[best] / 1e9), None, None]]
    for name in (f"{backend} {way}" for backend, way in ours):
        speed, share = Spread.of(payload / seconds[name] / 1e9), Spread.of(seconds[best] / seconds[name])
        rows.append([name, speed, share, float(np.median(held[name])) / 2**20])
    title = (
        f"{corpus.shape.name}, cold: epochs of {count} documents, {payload[0] / 2**20:.0f} MiB of "
        f"{corpus.nbytes / 2**20:.0f}, with {options.memory * 1024:.0f} MiB of memory"
    )
    report.table(title, ("", "GB/s", "of the limit", "page cache at the end, MiB"), rows)


if __name__ == "__main__":
    main()
