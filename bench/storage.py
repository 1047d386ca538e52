"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

    python -m bench.storage --shape paper,short --backends hdf5,zarr,lmdb,s3 --mode warm,cold

Contestants read the same random batches, turn by turn. A ratio is the time of the limit over the time of the backend in
the same round: the median, and its 95 % interval.

The limit of a warm read is the fastest raw way to get these documents' rows into the buffer plus the fastest xxh3 pass
over them; of a cold read, direct reads of the same extents. Beside it stands the limit of one coalesced read, which no
shuffled batch can be: as many bytes that lie side by side, by the fastest copy (plus the same xxh3 pass), or by direct
reads of 1 MiB. Where documents are short that is what their smallness and their scattering are held against.

For s3 see ``bench.remote``, and ``bench.server`` for the server that it takes; it has no modes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from actcache.storage.workers import available_cpus
from bench import remote, rounds
from bench.caches import drop_caches, refuse_mappings
from bench.corpus import Corpus, Documents
from bench.limits import FlatFile
from bench.rounds import fastest
from bench.server import bucket
from bench.shapes import SHAPES, Shape

console = Console(width=120)

#: Name, seconds by round, and the seconds of the limit and of one coalesced read, where they are compared.
Row = tuple[str, np.ndarray, tuple[np.ndarray, np.ndarray] | None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--mode", default="warm", help="warm, cold (as root the whole page cache is dropped)")
    parser.add_argument("--backends", default="hdf5", help="hdf5, zarr, lmdb, safetensors, s3")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--s3-mib", type=float, default=256, help="size of the corpus for s3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches of a turn")
    parser.add_argument("--s3-batches", type=int, default=1, help="the same for s3")
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    options = parser.parse_args()
    shapes = [SHAPES[name] for name in options.shape.split(",")]
    modes = [{"warm": warm, "cold": cold}[name] for name in options.mode.split(",")]
    names = options.backends.split(",")
    local = [name for name in names if name != "s3"]
    for shape in shapes:
        if local:
            folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
            try:
                corpus = _local_corpus(folder, shape, int(options.gib * 2**30), local)
                for mode in modes:
                    mode(corpus, folder, options.rounds, options.batches)
            finally:
                shutil.rmtree(folder)
        if "s3" in names:
            with bucket() as made:
                remote.compare(console, made, shape, int(options.s3_mib * 2**20), options.rounds, options.s3_batches)


def _local_corpus(folder: Path, shape: Shape, nbytes: int, backends: list[str]) -> Corpus:
    urls = {name: f"{name}:{folder / name}" for name in backends}
    return Corpus(Documents(shape, nbytes), urls, {}, flat=_flat(folder))


def _flat(folder: Path) -> Path:
    return folder / "rows.bin"


def warm(corpus: Corpus, folder: Path, count: int, batches: int) -> None:
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    flat = FlatFile(_flat(folder), corpus.lengths, corpus.shape.hidden, [out], available_cpus())
    contestants: dict[str, Callable[[int], float]] = {}
    for name, read in (flat.warm() | flat.coalesced_warm()).items():
        contestants[name] = lambda turn, read=read: _each(turns[turn], read)
    for name in ("xxh3 one", "xxh3 shared"):
        threads = name.removeprefix("xxh3 ")
        contestants[name] = lambda turn, threads=threads: _each(
            turns[turn], lambda which: flat.hash_passes(which)[threads]()
        )
    spaces = {name: corpus.open(name) for name in corpus.urls}
    for name, space in spaces.items():
        for verify in (True, False):
            label = name if verify else f"{name}, no checksums"
            contestants[label] = lambda turn, space=space, verify=verify: _each(
                turns[turn], lambda which: space.read_into(corpus.keys[which], out, verify=verify)
            )
    # Warm means mapped as well: a page's first touch through a mapping is a fault, for the limit as for a backend.
    for which in np.array_split(np.arange(len(corpus.lengths)), 1 + len(corpus.lengths) // corpus.shape.batch):
        flat.warm()["index_select"](which)
        for space in spaces.values():
            space.read_into(corpus.keys[which], out)
    seconds = rounds.run(contestants, count)
    raw, together = fastest(flat.warm(), seconds), fastest(flat.coalesced_warm(), seconds)
    digest = fastest(("xxh3 one", "xxh3 shared"), seconds)
    unchecked = seconds[raw], seconds[together]
    checked = seconds[raw] + seconds[digest], seconds[together] + seconds[digest]
    rows: list[Row] = [(name, seconds[name], None) for name in (*flat.warm(), *flat.coalesced_warm())]
    rows += [(name, seconds[name], None) for name in ("xxh3 one", "xxh3 shared")]
    rows += [(f"the limit: {raw}", unchecked[0], None), (f"the limit: {raw} + {digest}", checked[0], None)]
    rows += [(f"one coalesced read: {together} + {digest}", checked[1], None)]
    for name in spaces:
        rows += [(name, seconds[name], checked)]
        rows += [(f"{name}, no checksums", seconds[f"{name}, no checksums"], unchecked)]
    _print("warm", corpus, rows, turns)
    for space in spaces.values():
        space.close()
    flat.close()


def cold(corpus: Corpus, folder: Path, count: int, batches: int) -> None:
    out, turns = corpus.buffer(), corpus.turns(count, batches)
    flat = FlatFile(_flat(folder), corpus.lengths, corpus.shape.hidden, [out], available_cpus())
    contestants: dict[str, Callable[[int], float]] = {}
    for name, read in flat.cold().items():  # all of a turn in one go: batches would have the disk wait in between
        contestants[name] = lambda turn, read=read: _each([np.concatenate(turns[turn])], read)
    for name, read in flat.coalesced_cold().items():
        contestants[name] = lambda turn, read=read: _each(turns[turn], read)
    for name in corpus.urls:
        contestants[name] = lambda turn, name=name: _cold_turn(corpus, name, turns[turn], out)

    def before() -> None:
        refuse_mappings([folder / name for name in corpus.urls])
        drop_caches(folder)

    seconds = rounds.run(contestants, count, before=before)
    raw, together = fastest(flat.cold(), seconds), fastest(flat.coalesced_cold(), seconds)
    limits = seconds[raw], seconds[together]
    rows: list[Row] = [(name, seconds[name], None) for name in (*flat.cold(), *flat.coalesced_cold())]
    rows += [(f"the limit: {raw}", limits[0], None), (f"one coalesced read: {together}", limits[1], None)]
    _print("cold", corpus, rows + [(name, seconds[name], limits) for name in corpus.urls], turns)
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


def _print(mode: str, corpus: Corpus, rows: list[Row], turns: list[list[np.ndarray]]) -> None:
    payload = corpus.payload(turns)
    title = f"{corpus.shape.name}, {mode}: {len(corpus.lengths)} documents, {corpus.nbytes / 2**30:.1f} GiB"
    table = Table(title=title)
    for column in ("", "GB/s", "ratio to the limit", "to one coalesced read"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds, limits in rows:
        ratios = [] if limits is None else [str(rounds.Spread.of(limit / seconds)) for limit in limits]
        table.add_row(name, str(rounds.Spread.of(payload / seconds / 1e9)), *ratios)
    console.print(table)


if __name__ == "__main__":
    main()
