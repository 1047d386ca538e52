"""Damages a small store in many ways, and reads each in every way; run as a process of its own.

    python -m tests.support.damage <backend> <golden store> <work folder> <first seed> <last seed>

Each damage is read by a fork, with little memory and little time. Prints a line a damage, and in the end what came of
them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np

import actcache
from actcache.errors import CorruptEntryError, DataError, StoreError, UsageError
from tests.support import compact, ids, key, put, recipe, rows, run
from tests.support.backends import KINDS, Kind

EXTRA = recipe(layer=2, dtype="float16")
SECONDS = 20  # of a processor, for one damage; before the alarm kills its process, several times as many pass
HUNG = {-signal.SIGALRM, -signal.SIGXCPU}  # how what takes too long ends
MEMORY = 256 << 20  # bytes beyond what the process has before it opens the store
DELETED = [1, 8, 5, 15]
VERSIONS = {n: [0] for n in range(24)} | {n: [0, 1] for n in (2, 3, 9)}

_UNCLOSED = """
import os, sys
import actcache
from tests.support import *
space = actcache.open(sys.argv[1]).space(recipe())
put(space, [23])
space.flush()
os._exit(0)
"""


def make(kind: Kind, root: Path) -> None:
    """Make the golden store: overwritten and deleted entries, compacted segments, some whose sources still stand, an
    index that covers all but one segment, a second space."""
    with actcache.open(kind.url(root)) as store:
        with store.space(recipe()) as space:
            for first in (0, 6):
                put(space, range(first, first + 6))
                space.flush()
            space.delete([key(DELETED[0])])
            put(space, [2, 3, 9], version=1, overwrite=True)
            space.delete([key(DELETED[1])])
            compact(space)
            space.delete([key(DELETED[2])])
            put(space, range(12, 18))
            space.flush()
            put(space, range(18, 22))
            compact(space, grace=600.0, waste=1.0, target_bytes=2500)  # the two small segments only
            space.delete([key(DELETED[3])])
            put(space, [22])
        with store.space(EXTRA) as extra:
            spans = [np.ones((len(rows(n)), 2), int) for n in range(4)]
            extra.put([key(n) for n in range(4)], [rows(n) for n in range(4)], [ids(n) for n in range(4)], spans=spans)
        store.put_collection("all", [key(n) for n in range(24)], [str(n) for n in range(24)])
    run(_UNCLOSED, kind.url(root))


def damage(rng: random.Random, root: Path) -> str:
    """Do one or two things to files of the store; return what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        files = sorted(path for path in root.rglob("*") if path.is_file())
        folders = sorted(path for path in root.glob("spaces/*/segments/*") if path.is_dir())
        if len(folders) > 1 and rng.random() < 0.05:
            one, other = rng.sample(folders, 2)
            aside = one.rename(root / "aside")
            other.rename(one)
            aside.rename(other)
            done.append(f"swap {one.relative_to(root)} with {other.name}")
            continue
        path = rng.choice(files)
        data = bytearray(path.read_bytes())
        kind = rng.choice(
            ["flip", "flip", "flip", "flip", "byte", "zero", "ones", "cut", "grow", "swap", "lose", "mix"]
        )
        where = rng.randrange(max(1, len(data)))
        if kind in ("flip", "byte") and rng.random() < 0.9:  # most of a small HDF5 file is empty
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


def read(url: str, what: str, counts: Counter, *, same_alone: bool, **options) -> None:
    """Read everything, all at once and one by one.

    Args:
        same_alone: whether an entry that is corrupt in a batch has to be so alone. (LMDB walks its pages for one key,
            and looks many up in a copy of them: of a damaged page it may see the one or the other.)
    """
    numbers = range(26)
    tombstones_lost = "lose" in what and "tombstones" in what
    try:
        store = actcache.open(url, "r", **options)
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
                    assert not same_alone, f"{n} is corrupt in a batch and fine alone: {entry}"
                    assert entry is None or any(same(entry, n, v) for v in VERSIONS.get(n, [])), f"{n} is wrong"
                    continue
                entry = next(found)
                if entry is None:
                    counts["absent"] += n < 24 and n not in DELETED
                    continue
                assert n not in DELETED or tombstones_lost, f"{n} was deleted and is served"
                assert any(same(entry, n, v) for v in VERSIONS.get(n, [])), f"{n} is wrong"
                counts["right"] += 1
            lengths = space.lengths([key(n) for n in numbers])
            out = np.empty((26, max(1, int(lengths.max())), rows(0).shape[1]), np.float32)
            refused: set[bytes] = set()
            try:
                space.read_into([key(n) for n in numbers], out, dtype="float32")
            except CorruptEntryError as error:
                refused = set(error.keys)
            assert refused == corrupt or not same_alone
            corrupt |= refused
            for n in numbers:
                if key(n) not in corrupt and lengths[n]:
                    assert any(np.array_equal(out[n, : lengths[n]], rows(n, v)) for v in VERSIONS[n]), f"{n} is wrong"
                    assert not out[n, lengths[n] :].any()


def examine(kind: Kind, root: Path, what: str, counts: Counter) -> None:
    """Read a damaged store, in this process."""
    for options in kind.options:
        read(kind.url(root), what, counts, same_alone=kind.segmented, **options)


def limited() -> None:
    """Bound this process's memory and time."""
    logging.disable()
    # What is allocated, not what is reserved or mapped from files: that costs nothing.
    status = Path("/proc/self/status").read_text().splitlines()
    (used,) = (int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + 2 * SECONDS))
    signal.alarm(5 * SECONDS)


def in_a_fork(kind: Kind, root: Path, what: str) -> tuple[int, Counter, str]:
    """Read a damaged store; return the exit status (a signal's is negative), the counts and the traceback."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        counts: Counter = Counter()
        status, trace = 0, ""
        try:
            limited()
            examine(kind, root, what, counts)
        except BaseException:
            status, trace = 1, traceback.format_exc()
        os.write(writing, json.dumps([counts, trace[-6000:]]).encode())
        os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    counts, trace = json.loads(said) if said else ({}, "")
    return status, Counter(counts), trace


def main(name: str, golden: str, work: str, first: int, last: int) -> None:
    kind, counts, root = KINDS[name], Counter(), Path(work) / "store"
    for seed in range(first, last):
        shutil.copytree(golden, root)
        what = damage(random.Random(seed), root)
        print(seed, what, flush=True)
        status, found, trace = in_a_fork(kind, root, what)
        shutil.rmtree(root)
        if status < 0 and status not in HUNG and not kind.segmented:
            counts["killed by a signal"] += 1  # docs/reliability.md says what remains where a library maps its file
            continue
        assert status == 0, f"seed {seed}: {what}: exit status {status}\n{trace}"
        counts += found
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
