"""The index of a large space: how long it takes to open, what it costs in memory, how fast it finds keys.

    python -m bench.index --entries 10_000_000

The table is synthetic (random keys, one segment a thousand entries), written to a file as a store has it, and opened
in a fresh process after the page cache was dropped (as root; else warm, and it says so).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from actcache.backend import EXTRAS, TOKEN_IDS, VALUES, Extent
from actcache.segments.index import Table
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.segment import Segment, next_name

COLUMNS = {VALUES: ("<f2", (384,)), TOKEN_IDS: ("<i4", ()), **EXTRAS}
TOKENS = 28
QUERIES = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--per-segment", type=int, default=12_000, help="256 MiB of short documents")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.open:
        print(json.dumps(measure(options.open)))
        return
    with tempfile.TemporaryDirectory(prefix="actcache-index-") as folder:
        path = Path(folder, "table.index")
        table(options.entries, options.per_segment, Path(folder)).write(path)
        dropped = _drop_caches()
        command = [sys.executable, "-m", "bench.index", "--open", str(path)]
        figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = path.stat().st_size
    print(
        f"{options.entries:,} entries, {size / options.entries:.1f} bytes each on disk, {'cold' if dropped else 'warm'}"
    )
    print(f"open: {figures['open']:.3f} s")
    print(f"memory of its own after opening: {figures['memory_open'] / options.entries:.2f} bytes an entry")
    print(
        f"memory after the look-ups, with mapped pages: {figures['memory_found'] / options.entries:.1f} bytes an entry"
    )
    print(f"{QUERIES:,} look-ups in one call: {figures['cold']:.2f} s at first, then {figures['warm']:.2f} s")


def table(entries: int, per_segment: int, folder: Path) -> Table:
    """Return a table of random keys."""
    rng = np.random.default_rng(0)
    count = -(-entries // per_segment)
    rows = per_segment * TOKENS
    extents = {
        VALUES: Extent("", 4096, "<f2", (rows, 384)),
        "offsets": Extent("", 0, "<i8", (per_segment + 1,)),
        "keys": Extent("", 0, "|u1", (per_segment, 32)),
        "checksums": Extent("", 0, "<u8", (per_segment,)),
        TOKEN_IDS: Extent("", 0, "<i4", (rows,)),
    }
    names: list[str] = []
    for _ in range(count):
        names.append(next_name(names[-1:]))
    segments = tuple(Segment(LocalSegment(folder / f"{n}.h5"), n, extents, rows * 768) for n in names)
    number = np.arange(entries)
    return Table(
        segments,
        tuple(names),
        np.sort(rng.integers(0, 2**64, entries, np.uint64)),
        rng.integers(0, 256, (entries, 24), np.uint8),
        (number // per_segment).astype(np.uint32),
        (number // per_segment).astype(np.uint32),
        (number % per_segment).astype(np.uint32),
        number % per_segment * TOKENS,
        np.full(entries, TOKENS, np.uint32),
        rng.integers(0, 2**64, entries, np.uint64),
    )


def measure(path: Path) -> dict[str, float]:
    """Open the index at ``path`` and look keys up; return seconds and bytes."""
    before = _resident()
    start = time.perf_counter()
    opened = Table.open(path, lambda name: LocalSegment(path.parent / f"{name}.h5"), COLUMNS)
    seconds = {"open": time.perf_counter() - start, "memory_open": _resident() - before}
    which = np.random.default_rng(1).choice(len(opened), min(QUERIES, len(opened)), replace=False)
    prefix, rest = opened.prefix[which], opened.rest[which]
    for name in ("cold", "warm"):
        start = time.perf_counter()
        found = opened.find(prefix, rest)
        seconds[name] = time.perf_counter() - start
        if not np.array_equal(found, which):
            raise SystemExit("wrong positions")
    return {**seconds, "memory_found": _resident() - before}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _drop_caches() -> bool:
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
