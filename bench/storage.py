"""Shuffled reads of stored entries, checksums on, beside what the machine itself can do.

    python -m bench.storage --shape paper,short --backends hdf5,zarr,lmdb,s3 --mode warm,cold

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

from rich.console import Console
from rich.table import Table

from actcache.admin.benchmark.corpus import SHAPES, Documents, Shape, StoredCorpus
from actcache.admin.benchmark.reading import Comparison, cold, flat_path, warm
from bench import remote
from bench.caches import drop_caches
from bench.server import bucket

console = Console(width=120)


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
    modes = options.mode.split(",")
    names = options.backends.split(",")
    local = [name for name in names if name != "s3"]
    for shape in shapes:
        if local:
            folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
            try:
                corpus = _local_corpus(folder, shape, int(options.gib * 2**30), local)
                for mode in modes:
                    compare = warm if mode == "warm" else partial(cold, drop=partial(drop_caches, folder))
                    _print(compare(corpus, folder, options.rounds, options.batches))
            finally:
                shutil.rmtree(folder)
        if "s3" in names:
            with bucket() as made:
                remote.compare(console, made, shape, int(options.s3_mib * 2**20), options.rounds, options.s3_batches)


def _local_corpus(folder: Path, shape: Shape, nbytes: int, backends: list[str]) -> StoredCorpus:
    urls = {name: f"{name}:{folder / name}" for name in backends}
    return StoredCorpus(Documents(shape, nbytes), urls, {}, flat=flat_path(folder))


def _print(found: Comparison) -> None:
    table = Table(title=found.title)
    for column in ("", "GB/s", "ratio to the limit", "to one coalesced read"):
        table.add_column(column, justify="left" if not column else "right")
    for row in found.contestants:
        table.add_row(row.name, str(found.speed(row)), *map(str, row.ratios))
    console.print(table)


if __name__ == "__main__":
    main()
