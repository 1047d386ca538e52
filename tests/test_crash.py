"""``kill -9`` of a writer, and several processes on one space."""

from __future__ import annotations

import json
import random
import signal
import time

import pytest

import actcache
from actcache.storage.segment import is_name
from tests.support import check, key, put, recipe, run, start

#: Puts and flushes blocks of seven; deletes the fourth of each after it was flushed. Says what it begins and ends.
WRITER = """
import sys
import actcache
from tests.support import *

root, number, deleting = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
with actcache.open(root) as store, store.space(recipe(), segment_bytes=2000) as space:
    print("ready", number, flush=True)
    while True:
        put(space, range(number, number + 7))
        space.flush()
        print("flushed", number, flush=True)
        if deleting:
            print("deleting", number + 3, flush=True)
            space.delete([key(number + 3)])
            print("deleted", number + 3, flush=True)
        number += 7
"""

#: Reads everything in a fresh process, in mode "r" and without repair.
CHECKER = """
import json, sys
import actcache
from tests.support import *
sure, gone, last = json.loads(sys.argv[2])
for mapped in (True, False):
    with actcache.open(sys.argv[1], "r", mapped=mapped) as store, store.space(recipe()) as space:
        assert space.damaged() == {}, space.damaged()
        there = [n for n in range(last) if key(n) in space]
        assert set(sure) <= set(there), sorted(set(sure) - set(there))
        assert not set(gone) & set(there), sorted(set(gone) & set(there))
        check(space, dict.fromkeys(there, 0), range(last))  # what was not acknowledged is whole or absent
        assert len(space) == len(there)
"""


def kill_rounds(root, rounds, seed, deleting):
    """Return what is surely there, what is surely gone, and how many writers had flushed when they were killed."""
    rng = random.Random(seed)
    sure, gone, number, late = set(), set(), 0, 0
    for _ in range(rounds):
        process = start(WRITER, root, number, deleting)
        assert process.stdout.readline() == f"ready {number}\n", process.stderr.read()
        heard = [process.stdout.readline() for _ in range(rng.randrange(9))]  # however slow the machine is
        time.sleep(rng.random() * 0.03)
        process.send_signal(signal.SIGKILL)
        heard += process.stdout.read().splitlines(keepends=True)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        process.stdout.close()
        process.stderr.close()
        said = [line.split() for line in heard if line.endswith("\n")]  # one that was cut off counts for nothing
        for kind, text in said:
            n = int(text)
            if kind == "flushed":
                sure.update(range(n, n + 7))
                number = n + 7
            elif kind == "deleting":
                sure.discard(n)
            else:
                gone.add(n)
        late += bool(said)
        number += 7  # what it was writing when it was killed is put by nobody else
        listed = [path for kind in ("segments", "tombstones", "index") for path in root.glob(f"spaces/*/{kind}/*")]
        assert all(is_name(path.stem) for path in listed), "a leftover is listed"
        run(CHECKER, root, json.dumps([sorted(sure), sorted(gone), number + 7]))
    return sure, gone, late


def finish(root, sure, gone):
    """The store goes on: the next writer puts what is missing, and nothing that is there."""
    with actcache.open(root) as store, store.space(recipe()) as space:
        assert put(space, sorted(sure)) == 0
        assert put(space, sorted(gone)) == len(gone)
        space.flush()
        check(space, dict.fromkeys(sure | gone, 0), sorted(sure | gone))
        assert len(store.recipes()) == 1
        assert store.collections() == []


@pytest.mark.timeout(240)
@pytest.mark.parametrize("deleting", [False, True])
def test_killed_writers(tmp_path, deleting):
    sure, gone, late = kill_rounds(tmp_path / "store", 10, 1, deleting)
    assert len(sure) > 50
    assert late >= 7
    assert bool(gone) == deleting
    finish(tmp_path / "store", sure, gone)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("deleting", [False, True])
def test_killed_writers_two_hundred_times(tmp_path, deleting):
    sure, gone, late = kill_rounds(tmp_path / "store", 200, 2, deleting)
    assert late >= 100
    finish(tmp_path / "store", sure, gone)


#: Puts documents of its own and some that the other writer puts too, overwrites and deletes its own, for a while.
BUSY_WRITER = """
import sys, time
import actcache
from tests.support import *

root, me, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rng = np.random.default_rng(me)
own, versions, shared = range(1000 * me, 1000 * me + 60), {}, set()
end = time.monotonic() + seconds
with actcache.open(root) as store, store.space(recipe(), segment_bytes=1500) as space:
    while time.monotonic() < end:
        numbers = rng.choice(own, 5, replace=False).tolist()
        match rng.integers(5):
            case 0 | 1:
                put(space, numbers, version=me)
                versions = {**dict.fromkeys(numbers, me), **versions}
            case 2:
                version = int(rng.integers(2, 9))
                put(space, numbers, version=version, overwrite=True)
                versions.update(dict.fromkeys(numbers, version))
            case 3:
                space.delete([key(n) for n in numbers[:2]])
                versions = {n: v for n, v in versions.items() if n not in numbers[:2]}
            case 4:
                common = rng.choice(200, 5, replace=False).tolist()
                put(space, common)
                shared.update(common)
        if rng.random() < 0.3:
            space.flush()
        check(space, versions, own)  # it always sees what it did itself
    space.flush()
print(repr((versions, sorted(shared))))
"""

BUSY_READER = """
import sys, time
import actcache
from tests.support import *

root, seconds, mapped = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "True"
end, reads, seen = time.monotonic() + seconds, 0, set()
with actcache.open(root, "r", mapped=mapped) as store, store.space(recipe()) as space:
    numbers = [*range(200), *range(1000, 1060), *range(2000, 2060)]
    while time.monotonic() < end:
        space.refresh()
        entries = space.get([key(n) for n in numbers])  # raises where one fails its checksum
        present = space.contains([key(n) for n in numbers]).tolist()
        assert [entry is not None for entry in entries] == present, "not one snapshot"
        for n, entry in zip(numbers, entries, strict=True):
            if entry is not None:
                assert any(np.array_equal(entry.activations, rows(n, v)) for v in range(9)), n
                if n < 200:
                    seen.add(n)
            else:
                assert n not in seen, f"{n} went away"  # nobody deletes the shared ones
        reads += 1
    assert space.damaged() == {}
print(reads, len(seen))
"""


@pytest.mark.timeout(120)
def test_two_writers_and_two_readers(tmp_path):
    root, seconds = tmp_path / "store", 4
    actcache.open(root).space(recipe()).close()
    writers = [start(BUSY_WRITER, root, me, seconds) for me in (1, 2)]
    readers = [start(BUSY_READER, root, seconds, mapped) for mapped in (True, False)]
    said = []
    for process in [*writers, *readers]:
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        said.append(out)
    held = {}
    for out in said[:2]:
        versions, shared = eval(out)  # noqa: S307 - our own process's words
        held.update(versions)
        held.update(dict.fromkeys(shared, 0))
    assert len(held) > 60
    for out in said[2:]:
        reads, seen = map(int, out.split())
        assert reads > 3
        assert seen > 0
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        check(space, held, [*range(200), *range(1000, 1060), *range(2000, 2060)])
        assert sorted(space.keys()) == sorted(key(n) for n in held)
        assert space.damaged() == {}
