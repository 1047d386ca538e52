"""A store on an S3 server, read with and without a local cache.

    python -m bench.localcache --shape paper,short

The iterated reader (packed, shuffled, checksums on, its consumer does nothing) takes an epoch a turn: straight from the
server; with an empty local cache, which it fills; with a full one; and, what a full one is held against, the same
entries in a local store. Requests are those of the epoch; a full cache should make none. The server of
``ACTCACHE_S3_ENDPOINT`` or moto's runs on this machine and takes a core of it; what comes from the disk is warm.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from actcache.admin.benchmark import rounds
from actcache.admin.benchmark.corpus import SHAPES, Documents, Shape, StoredCorpus
from actcache.admin.benchmark.rounds import Spread
from actcache.reader.reader import Reader
from bench.bare import Requests
from bench.report import Cell, Report
from bench.server import Bucket, bucket

LOCAL = "a local store"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="paper,short", help="paper (60-512 tokens x 768), short (8-48 x 384)")
    parser.add_argument("--mib", type=float, default=256, help="size of the corpus")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dir", type=Path, help="where to put the local files (removed afterwards)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    report = Report()
    for name in options.shape.split(","):
        folder = Path(tempfile.mkdtemp(prefix="actcache-bench-", dir=options.dir))
        try:
            with bucket() as server:
                compare(SHAPES[name], int(options.mib * 2**20), folder, server, options.rounds, report)
        finally:
            shutil.rmtree(folder)
    report.save(options.json)


def compare(shape: Shape, nbytes: int, folder: Path, server: Bucket, count: int, report: Report) -> None:
    documents, requests = Documents(shape, nbytes), Requests()
    try:
        local = StoredCorpus(documents, {LOCAL: f"safetensors:{folder / 'store'}"}, {})
        remote = StoredCorpus(documents, {"s3": f"s3://{server.name}/{shape.name}"}, server.options)
        made: dict[str, list[int]] = {}

        def epoch(name: str, reader: Reader, number: int) -> float:
            reader.set_epoch(number)
            before, start = requests.count, time.perf_counter()
            for _ in reader:
                pass
            seconds = time.perf_counter() - start
            made.setdefault(name, []).append(requests.count - before)
            return seconds

        with local.open(LOCAL) as near, remote.open("s3") as far:

            def reader(space: object, **kept: object) -> Reader:
                return space.reader(documents.keys, batch_size=shape.batch, shuffle=True, layout="packed", **kept)  # type: ignore[attr-defined,no-any-return]

            def filling(number: int) -> float:
                cache = folder / f"cache-{number}"
                with reader(far, local_cache=cache, local_bytes=4 * nbytes) as one:
                    seconds = epoch("an empty local cache", one, number)
                shutil.rmtree(cache)
                return seconds

            full = reader(far, local_cache=folder / "cache", local_bytes=4 * nbytes)
            epoch("filled before", full, 0)
            straight, held = reader(far), reader(near)
            contestants: dict[str, Callable[[int], float]] = {
                "straight from the server": lambda number: epoch("straight from the server", straight, number),
                "an empty local cache": filling,
                "a full local cache": lambda number: epoch("a full local cache", full, number),
                LOCAL: lambda number: epoch(LOCAL, held, number),
            }
            seconds = rounds.take_turns(contestants, count)
            full.close()
        payload = documents.nbytes
        rows: list[list[Cell]] = []
        for name, spent in seconds.items():
            ratios = [Spread.of(seconds[other] / spent) for other in ("straight from the server", LOCAL)]
            rows.append([name, Spread.of(payload / spent / 1e9), *ratios, float(np.median(made[name]))])
        columns = ("", "GB/s", "x straight", "of a local store", "requests an epoch")
        report.table(f"{shape.name}: {payload / 2**20:.0f} MiB; {server.server}", columns, rows)
    finally:
        requests.stop()


if __name__ == "__main__":
    main()
