"""Damages a small store in many ways, and reads each with both row sources; run as a process of its own.

    python -m tests.damage <golden store> <work folder> <first seed> <last seed>

Prints a line per seed before and after, so that whoever started it knows which damage killed the process.
"""

from __future__ import annotations

import contextlib
import logging
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import actcache
from actcache.errors import CorruptEntryError, DataError, StoreError, UsageError
from tests.support import ids, key, put, recipe, rows

EXTRA = recipe(layer=2, dtype="float16")
SECONDS = 20  # for one damage, before the alarm kills the process
DELETED = [1, 8]
VERSIONS = {n: [0] for n in range(24)} | {n: [0, 1] for n in (2, 3, 9)}


def make(root: Path) -> None:
    """Make the golden store: overwritten and deleted entries, an index that covers some segments, two spaces."""
    with actcache.open(root) as store:
        with store.space(recipe()) as space:
            for first in range(0, 18, 6):
                put(space, range(first, first + 6))
                space.flush()
            space.delete([key(DELETED[0])])
            put(space, [2, 3, 9], version=1, overwrite=True)
            space.delete([key(DELETED[1])])
        store.put_collection("all", [key(n) for n in range(24)], [str(n) for n in range(24)])
    with actcache.open(root) as store:
        space = store.space(recipe())
        put(space, range(18, 24))
        space.flush()  # not closed: the index does not cover this segment
        with store.space(EXTRA) as extra:
            spans = [np.ones((len(rows(n)), 2), int) for n in range(4)]
            extra.put([key(n) for n in range(4)], [rows(n) for n in range(4)], [ids(n) for n in range(4)], spans=spans)
        space._index_if_due = None
        store._spaces.clear()


def damage(rng: random.Random, root: Path) -> str:
    """Do one or two things to files of the store; return what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        kind = rng.choice(
            ["flip", "flip", "flip", "flip", "byte", "zero", "ones", "cut", "grow", "swap", "lose", "mix"]
        )
        where = rng.randrange(max(1, len(data)))
        if kind in ("flip", "byte") and rng.random() < 0.7:  # most of a small HDF5 file is empty
            full = np.flatnonzero(np.frombuffer(bytes(data), np.uint8))
            where = int(rng.choice(full)) if len(full) else 0
        length = rng.choice([1, 8, 64, 512, 4096])
        match kind:
            case "flip" if data:
                data[where] ^= 1 << rng.randrange(8)
            case "byte" if data:
                data[where] = rng.randrange(256)
            case "zero":
                data[where : where + length] = bytes(len(data[where : where + length]))
            case "ones":
                data[where : where + length] = b"\xff" * len(data[where : where + length])
            case "cut":
                del data[where:]
            case "grow":
                data += rng.randbytes(length)
            case "swap":
                other = rng.choice([file for file in files if file.suffix == path.suffix])
                theirs = other.read_bytes()
                other.write_bytes(data)
                data = bytearray(theirs)
            case "mix":
                there = rng.randrange(max(1, len(data)))
                data[where : where + length], data[there : there + length] = (
                    data[there : there + length],
                    data[where : where + length],
                )
        if kind == "lose":
            path.unlink()
        else:
            path.write_bytes(data)
        done.append(f"{kind} {path.relative_to(root)} at {where}, {length}")
    return "; ".join(done)


def same(entry, number: int, version: int) -> bool:
    right = np.array_equal(entry.activations, rows(number, version))
    return right and (entry.token_ids is None or np.array_equal(entry.token_ids, ids(number, version)))


def read(root: Path, what: str, counts: Counter, **options) -> None:
    """Read everything, all at once and one by one."""
    numbers = range(26)
    # Tombstones name places by the names of files; where files change places, they name other entries.
    tombstones_lost = "swap" in what or ("lose" in what and "tombstones" in what)
    try:
        store = actcache.open(root, "r", **options)
    except (DataError, StoreError, UsageError):
        counts["store refused"] += 1
        return
    with store:
        with contextlib.suppress(DataError):
            collection = store.collection("all") if "all" in store.collections() else None
            if collection is not None:
                assert collection.ids == [str(n) for n in range(24)]
                assert collection.keys.tobytes() == b"".join(key(n) for n in range(24))
        with contextlib.suppress(DataError, StoreError), store.space(EXTRA) as extra:
            for n in range(4):
                with contextlib.suppress(CorruptEntryError):
                    entry = extra.get([key(n)])[0]
                    assert entry is None or (same(entry, n, 0) and (entry.extras["spans"] == 1).all())
        try:
            space = store.space(recipe())
        except (DataError, StoreError):
            counts["space refused"] += 1
            return
        with space:
            space.damaged()
            space.usage()
            corrupt = set()
            try:
                found = space.get([key(n) for n in numbers])
            except CorruptEntryError as error:
                corrupt = set(error.keys)
                counts["corrupt"] += 1
                found = space.get([name for n in numbers if (name := key(n)) not in corrupt])
            found = iter(found)
            for n in numbers:
                if key(n) in corrupt:
                    try:
                        entry = space.get([key(n)])[0]
                    except CorruptEntryError:
                        continue
                    raise AssertionError(f"{n} is corrupt in a batch and fine alone: {entry}")
                entry = next(found)
                if entry is None:
                    counts["absent"] += n < 24 and n not in DELETED
                    continue
                assert n not in DELETED or tombstones_lost, f"{n} was deleted and is served"
                assert any(same(entry, n, v) for v in VERSIONS.get(n, [])), f"{n} is wrong"
                counts["right"] += 1
            lengths = space.lengths([key(n) for n in numbers])
            out = np.empty((26, max(1, int(lengths.max())), rows(0).shape[1]), np.float32)
            refused = set()
            try:
                space.read_into([key(n) for n in numbers], out)
            except CorruptEntryError as error:
                refused = set(error.keys)
            assert refused == corrupt
            for n in numbers:
                if key(n) not in corrupt and lengths[n]:
                    assert any(np.array_equal(out[n, : lengths[n]], rows(n, v)) for v in VERSIONS[n]), f"{n} is wrong"
                    assert not out[n, lengths[n] :].any()


def main(golden: str, work: str, first: int, last: int) -> None:
    logging.disable()
    counts: Counter = Counter()
    for seed in range(first, last):
        rng = random.Random(seed)
        root = Path(work) / "store"
        shutil.copytree(golden, root)
        what = damage(rng, root)
        print(seed, what, flush=True)
        signal.alarm(SECONDS)
        for options in ({"mapped": True}, {"mapped": False}):
            try:
                read(root, what, counts, **options)
            except BaseException as error:
                raise AssertionError(f"seed {seed}: {what}") from error
        signal.alarm(0)
        shutil.rmtree(root)
    print(dict(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
