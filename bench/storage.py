"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

    python -m bench.storage --shape paper,short --backends hdf5,zarr,lmdb,s3 --mode warm,cold
    python -m bench.storage --batch 1,8,32,64,256,1024         # what a batch of so many costs: bench.batches
    python -m bench.storage --threads 1,2,4,8,16               # with so many threads, the limit's and the package's

``actcache.admin.benchmark.reading`` says what is compared and what the limits are. ``cachectl bench`` is the same for a
disk of the user's; here s3 is measured, too, and where root runs it the whole page cache is emptied, names and all.

For s3 see ``bench.remote``, and ``bench.server`` for the server that it takes; it has no modes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path

from actcache.admin.benchmark.corpus import SHAPES, Documents, Shape, StoredCorpus
from actcache.admin.benchmark.reading import Comparison, cold, flat_path, warm
from actcache.io.workers import available_cpus
from bench import batches, remote
from bench.caches import drop_caches
from bench.report import Cell, Report
from bench.server import bucket
from bench.threads import counts_of, sharing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="paper (60-512 tokens x 768), short (8-48 x 384); both, or with --batch short")
    parser.add_argument("--batch", help="documents of a batch, as 1,8,32: microseconds a batch instead, warm")
    parser.add_argument("--threads", help="that share a batch, as 1,2,4; those that there are processors for")
    parser.add_argument("--mode", default="warm", help="warm, cold (as root the whole page cache is dropped)")
    parser.add_argument("--backends", help="hdf5, zarr, lmdb, safetensors, s3 (hdf5; with --batch hdf5,zarr,lmdb)")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the corpus")
    parser.add_argument("--s3-mib", type=float, default=256, help="size of the corpus for s3")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, default=8, help="batches of a turn")
    parser.add_argument("--s3-batches", type=int, default=1, help="the same for s3")
    parser.add_argument("--dir", type=Path, help="where to put the corpus (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    sizes = [int(size) for size in (options.batch or "").split(",") if size]
    shapes = [SHAPES[name] for name in (options.shape or ("short" if sizes else "paper,short")).split(",")]
    names = (options.backends or ("hdf5,zarr,lmdb" if sizes else "hdf5")).split(",")
    local = [name for name in names if name != "s3"]
    report = Report()
    counts, too_many = counts_of(options.threads)
    if too_many:
        report.say(f"left out: {too_many} threads, for this machine has {available_cpus()} processors")
    for shape in shapes:
        for threads in counts:
            note = f", threads: {threads}" if options.threads else ""
            with sharing(threads):
                if sizes:
                    batches.compare(shape, sizes, local, options, report, note)
                elif local:
                    _compare(shape, local, options, report, threads if options.threads else None, note)
        if "s3" in names and not sizes:
            with bucket() as made:
                nbytes = int(options.s3_mib * 2**20)
                remote.compare(report.console, made, shape, nbytes, options.rounds, options.s3_batches)
    report.save(options.json)


def _compare(
    shape: Shape, local: list[str], options: argparse.Namespace, report: Report, threads: int | None, note: str
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
    try:
        corpus = _local_corpus(folder, shape, int(options.gib * 2**30), local)
        for mode in options.mode.split(","):
            compare = partial(warm, threads=threads)
            if mode == "cold":
                compare = partial(cold, drop=partial(drop_caches, folder))
            _print(compare(corpus, folder, options.rounds, options.batches), report, note)
    finally:
        shutil.rmtree(folder)


def _local_corpus(folder: Path, shape: Shape, nbytes: int, backends: list[str]) -> StoredCorpus:
    urls = {name: f"{name}:{folder / name}" for name in backends}
    return StoredCorpus(Documents(shape, nbytes), urls, {}, flat=flat_path(folder))


def _print(found: Comparison, report: Report, note: str) -> None:
    columns = ("", "GB/s", "ratio to the limit", "to one coalesced read")
    rows: list[list[Cell]] = []
    for row in found.contestants:
        ratios: list[Cell] = [*row.ratios] or [None, None]
        rows.append([row.name, found.speed(row), *ratios])
    report.table(f"{found.title}{note}", columns, rows)


if __name__ == "__main__":
    main()
