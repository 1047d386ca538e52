"""Four writers and two readers on one space: every acknowledged entry is right, and nobody ever sees a torn one."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

import actcache
from tests.support import HIDDEN, key, recipe, run, start
from tests.support.backends import each

pytestmark = pytest.mark.processes

WRITERS, OWN, SHARED = 4, 40, 150


def stamped(number, version):
    """The rows of a document; the first number of each is the version."""
    rng = np.random.default_rng([number, version])
    rows = rng.integers(-100, 100, (1 + (number * 7 + version * 3) % 9, HIDDEN)).astype(np.float32)
    rows[:, 0] = version
    return rows


def right(entry, number):
    """Return an entry's version after comparing all of it."""
    version = int(entry.activations[0, 0])
    np.testing.assert_array_equal(entry.activations, stamped(number, version))
    np.testing.assert_array_equal(entry.token_ids, np.arange(len(entry.activations)) + version)
    return version


def put(space, numbers, version, **options):
    documents = [stamped(n, version) for n in numbers]
    ids = [np.arange(len(rows)) + version for rows in documents]
    return space.put([key(n) for n in numbers], documents, ids, **options)


def enough(count, least, end):
    """Return whether a slow machine has got somewhere; a minute after the end it has to."""
    return count >= least or time.monotonic() > end + 60


#: Changes documents of its own, puts some that the others put too, and compacts. Its versions grow.
WRITER = """
import json, sys, time
import actcache
from tests.store.test_concurrency import *

url, me, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rng = np.random.default_rng(me)
own, versions, shared, done = range(1000 * me, 1000 * me + OWN), {}, set(), dict.fromkeys("podsc", 0)
end, version = time.monotonic() + seconds, 0
with actcache.open(url) as store, store.space(recipe(), segment_bytes=1500) as space:
    while time.monotonic() < end or not (enough(min(done.values()), 1, end) and enough(sum(done.values()), 30, end)):
        version += 1
        numbers = rng.choice(own, 5, replace=False).tolist()
        what = str(rng.choice(list("ppoodssc"))) if rng.random() < 0.9 else "c"
        match what:
            case "p":
                put(space, numbers, version)
                versions = {**dict.fromkeys(numbers, version), **versions}
            case "o":
                put(space, numbers, version, overwrite=True)
                versions.update(dict.fromkeys(numbers, version))
            case "d":
                count = space.delete([key(n) for n in numbers[:2]])
                assert count == len(versions.keys() & set(numbers[:2]))
                versions = {n: v for n, v in versions.items() if n not in numbers[:2]}
            case "s":
                common = rng.choice(SHARED, 5, replace=False).tolist()
                put(space, common, 0)
                shared.update(common)
            case "c":
                space.compact(waste=0.1, grace=float(rng.choice([0.0, 0.5, 60.0])))
        done[what] += 1
        if rng.random() < 0.4:
            space.flush()
        # It always sees what it did itself.
        for n, entry in zip(own, space.get([key(n) for n in own]), strict=True):
            assert (entry is None) == (n not in versions), (n, versions.get(n), version, what)
            assert entry is None or right(entry, n) == versions[n], (n, versions[n], version, what)
    space.flush()
    for n, entry in zip(own, space.get([key(n) for n in own]), strict=True):
        assert (entry is None) == (n not in versions), n
    assert space.damaged() == {}
print(json.dumps([list(versions.items()), sorted(shared), done]))
"""

READER = """
import json, sys, time
import actcache
from tests.store.test_concurrency import *

url, seconds, options = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
end, reads, seen, latest = time.monotonic() + seconds, 0, set(), {}
numbers = [*range(SHARED), *(1000 * me + n for me in range(1, WRITERS + 1) for n in range(OWN))]
with actcache.open(url, "r", **options) as store, store.space(recipe()) as space:
    while time.monotonic() < end or not enough(reads, 4, end) or not enough(len(seen), 51, end):
        space.refresh()
        for n, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
            if entry is None:
                assert n not in seen, f"{n} went away"  # nobody deletes the shared ones
                continue
            version = right(entry, n)
            assert version >= latest.get(n, 0), f"{n} is served at {version} again, after {latest[n]}"
            latest[n] = version
            if n < SHARED:
                seen.add(n)
        reads += 1
    assert space.damaged() == {}
print(json.dumps([reads, len(latest)]))
"""


def work(kind, root, seconds):
    url = kind.url(root)
    actcache.open(url).space(recipe()).close()
    writers = [start(WRITER, url, me, seconds) for me in range(1, WRITERS + 1)]
    options = (kind.options[0], kind.options[-1])
    readers = [start(READER, url, seconds, json.dumps(chosen)) for chosen in options]
    said, failures = [], []
    for process in [*writers, *readers]:
        out, err = process.communicate(timeout=seconds + 120)
        if process.returncode != 0:
            failures.append(err)
        said.append(out)
    assert not failures, "\n\n".join(failures)
    held, done = {}, dict.fromkeys("podsc", 0)
    for out in said[:WRITERS]:
        versions, shared, counts = json.loads(out)
        held.update(versions)
        held.update(dict.fromkeys(shared, 0))
        done = {what: done[what] + counts[what] for what in done}
    assert min(done.values()) > 0, done
    numbers = [*range(SHARED), *(1000 * me + n for me in range(1, WRITERS + 1) for n in range(OWN))]
    code = """
import json, sys
import actcache
from tests.store.test_concurrency import *
held, numbers = {int(n): v for n, v in json.loads(sys.argv[2])}, json.loads(sys.argv[3])
with actcache.open(sys.argv[1], "r") as store, store.space(recipe()) as space:
    for n, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
        assert (entry is None) == (n not in held), n
        assert entry is None or right(entry, n) == held[n], n
    assert sorted(space.keys()) == sorted(key(n) for n in held)
    assert space.damaged() == {}
"""
    run(code, url, json.dumps(list(held.items())), json.dumps(numbers))
    reads = [json.loads(out) for out in said[WRITERS:]]
    return {"steps": done, "entries": len(held), "reads": [n for n, _ in reads], "seen": [n for _, n in reads]}


@pytest.mark.timeout(200)
@each(everyday=("hdf5",))  # lmdb has test_lmdb_processes.py
def test_four_writers_and_two_readers(kind, tmp_path):
    result = work(kind, tmp_path / "store", 0.3)
    assert result["entries"] > 100
    assert min(result["reads"]) > 3
    assert min(result["seen"]) > 50


@pytest.mark.long
@pytest.mark.timeout(300)
@each()
def test_four_writers_and_two_readers_for_a_minute(kind, tmp_path):
    print(kind.name, work(kind, tmp_path / "store", 60))
