"""Putting and flushing a corpus, beside a plain buffered write with fsync of the same bytes to the same disk.

    python -m bench.writing --backends hdf5,zarr,lmdb,s3

The limit is a plain write, which makes files of the size of a segment: ``write``, ``fsync``, then ``fsync`` of the
folder; the faster of writing a file at once and by 256 KiB. On an object store it is the bare client's multipart upload
of objects of that size. Contestants take turns, each writes the whole corpus into an empty store; what the one before
has left is removed and synced first, untimed. Where a virtual machine gives that memory back to its host meanwhile,
little else is measured (docs/decisions/0041): the first line says so.

``nothing stored`` is all that happens before a backend sees a block: checking and encoding what was put, copying it
into the block that is being filled, checksums. The backend's own time runs beside it, on the writer's thread: ``in the
backend`` is its share of the whole, and what it has not is either waiting for the first block to fill, or the encoding.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import actcache
from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents
from actcache.backend import Block
from actcache.entries.writer import SEGMENT_BYTES
from bench.bare import Bare, Requests
from bench.caches import memory_that_goes
from bench.metered import Metered
from bench.server import Bucket, bucket

console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--backends", default="hdf5,zarr,lmdb", help="hdf5, zarr, lmdb, safetensors, s3")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the corpus")
    parser.add_argument("--s3-mib", type=float, default=512, help="size of the corpus for s3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to write (removed afterwards)")
    options = parser.parse_args()
    names = options.backends.split(",")
    local = [name for name in names if name != "s3"]
    if local and (why := memory_that_goes()):
        console.print(why)
    for shape in (SHAPES[name] for name in options.shape.split(",")):
        if local:
            folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
            try:
                on_disk(Documents(shape, int(options.gib * 2**30)), folder, local, options.rounds)
            finally:
                shutil.rmtree(folder)
        if "s3" in names:
            with bucket() as made:
                on_objects(Documents(shape, int(options.s3_mib * 2**20)), made, options.rounds)


class Written:
    """A contestant that writes the corpus into an empty store.

    Attributes:
        shares: of the time, spent in the backend, by round.
    """

    def __init__(self, documents: Documents, url: str, options: dict[str, Any], segment_bytes: int) -> None:
        self._documents = documents
        self._url = url
        self._options = options
        self._segment_bytes = segment_bytes
        self.shares: list[float] = []

    def __call__(self, turn: int) -> float:
        store = actcache.open(self._url, **self._options)
        with store, store.space(self._documents.recipe, segment_bytes=self._segment_bytes) as space:
            spent = _timed(space)
            begin = time.perf_counter()
            self._documents.put(space)
            space.flush()
            seconds = time.perf_counter() - begin
        self.shares.append(sum(spent) / seconds)
        return seconds


def _timed(space: actcache.Space, *, store: bool = True) -> list[float]:
    """Note the seconds that each block takes in the backend; or keep the blocks away from it."""
    spent: list[float] = []
    append = space._driver.append

    def timed(block: Block) -> None:
        begin = time.perf_counter()
        if store:
            append(block)
        spent.append(time.perf_counter() - begin)

    space._driver.append = timed  # type: ignore[method-assign]
    return spent


class NothingStored:
    """A contestant that does what is done before a backend sees a block."""

    def __init__(self, documents: Documents, folder: Path, segment_bytes: int) -> None:
        self._documents = documents
        self._url = f"hdf5:{folder}"
        self._segment_bytes = segment_bytes

    def __call__(self, turn: int) -> float:
        with (
            actcache.open(self._url) as store,
            store.space(self._documents.recipe, segment_bytes=self._segment_bytes) as space,
        ):
            _timed(space, store=False)
            begin = time.perf_counter()
            self._documents.put(space)
            space.flush()
            return time.perf_counter() - begin


def on_disk(documents: Documents, folder: Path, backends: list[str], count: int) -> None:
    segment_bytes = _segment_bytes(documents)
    data = _pieces(documents, segment_bytes)
    stored = {name: Written(documents, f"{name}:{folder / name}", {}, segment_bytes) for name in backends}

    def plain(most: int) -> float:
        (folder / "plain").mkdir()
        begin = time.perf_counter()
        for number, piece in enumerate(data):
            with open(folder / "plain" / str(number), "xb", buffering=0) as file:
                while len(piece):
                    piece = piece[file.write(piece[:most]) :]
                os.fsync(file.fileno())
        descriptor = os.open(folder / "plain", os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        return time.perf_counter() - begin

    def before() -> None:
        for left in folder.iterdir():
            shutil.rmtree(left)
        os.sync()

    limits: dict[str, Callable[[int], float]] = {
        "write + fsync": lambda turn: plain(segment_bytes),
        "write by 256 KiB + fsync": lambda turn: plain(256 << 10),
    }
    nothing = NothingStored(documents, folder / "nothing", segment_bytes)
    seconds = rounds.take_turns({**limits, "nothing stored": nothing, **stored}, count, before=before)
    limit = rounds.fastest(limits, seconds)
    table = _table(documents, f"{len(data)} segments", "in the backend")
    for name in limits:
        table.add_row(f"the limit: {name}" if name == limit else name, _speed(documents, seconds[name]))
    table.add_row("nothing stored", _speed(documents, seconds["nothing stored"]))
    for name, contestant in stored.items():
        ratio = str(rounds.Spread.of(seconds[limit] / seconds[name]))
        table.add_row(name, _speed(documents, seconds[name]), ratio, f"{np.median(contestant.shares[1:]):.0%}")
    console.print(table)


def on_objects(documents: Documents, made: Bucket, count: int) -> None:
    segment_bytes = _segment_bytes(documents)
    data = [bytes(piece) for piece in _pieces(documents, segment_bytes)]
    requests, bare = Requests(), Bare(made, "plain/")

    def straight(write: Callable[[str, bytes], None]) -> None:
        for number, piece in enumerate(data):
            write(str(number), piece)

    stored = Written(documents, f"s3://{made.name}/store", made.options, segment_bytes)
    contestants = {name: Metered(lambda turn, write=write: straight(write)) for name, write in bare.writes().items()}
    contestants["s3"] = Metered(stored)
    try:
        seconds = rounds.take_turns(contestants, count, before=made.empty)
    finally:
        requests.stop()
        bare.close()
    limit = min(bare.writes(), key=lambda name: float(np.median(seconds[name])))
    table = _table(documents, f"{len(data)} objects", "in the backend", "requests", "client CPU ms/MB")
    table.caption = made.server
    for name, contestant in contestants.items():
        ours = name == "s3"
        table.add_row(
            f"the limit: {name}" if name == limit else name,
            _speed(documents, seconds[name]),
            str(rounds.Spread.of(seconds[limit] / seconds[name])) if ours else "",
            f"{np.median(stored.shares[1:]):.0%}" if ours else "",
            f"{requests.count / (count + 1):.0f}" if ours else "",
            f"{contestant.per_megabyte(documents.nbytes * count):.2f}",
        )
    console.print(table)


def _segment_bytes(documents: Documents) -> int:
    """Return the size of a segment: the default, but half of a small corpus, so that writing overlaps filling."""
    return min(SEGMENT_BYTES, -(-documents.nbytes // 2))


def _pieces(documents: Documents, nbytes: int) -> list[memoryview]:
    """Return all rows' bytes, cut into segments."""
    data = documents.rows.reshape(-1).view(np.uint8).data
    return [data[start : start + nbytes] for start in range(0, len(data), nbytes)]


def _table(documents: Documents, files: str, *more: str) -> Table:
    title = (
        f"writing {documents.shape.name}: {len(documents.keys)} documents, {documents.nbytes / 2**20:.0f} MiB, {files}"
    )
    table = Table(title=title)
    for column in ("", "GB/s", "ratio to the limit", *more):
        table.add_column(column, justify="left" if not column else "right")
    return table


def _speed(documents: Documents, seconds: np.ndarray) -> str:
    return str(rounds.Spread.of(documents.nbytes / seconds / 1e9))


if __name__ == "__main__":
    main()
