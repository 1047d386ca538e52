"""Forks, maps that grow under readers, many processes, compaction under all of them, and kill -9 at any moment."""

from __future__ import annotations

import os
import random
import select
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import actcache
from actcache.errors import SegmentGoneError
from tests.support import check, key, put, recipe, run, start

pytestmark = pytest.mark.processes

TINY = {"map_size": 1 << 16}

WRITER = """
import sys, time, actcache
from tests.support import put, recipe
url, first, last, step = sys.argv[1], *map(int, sys.argv[2:5])
with actcache.open(url, map_size=1 << 16) as store, store.space(recipe()) as space:
    for n in range(first, last, step):
        put(space, range(n, min(n + step, last)))
        space.flush()
        print(min(n + step, last), flush=True)
"""

COMPACTOR = """
import sys, actcache
from tests.support import recipe
with actcache.open(sys.argv[1], grace=float(sys.argv[2])) as store, store.space(recipe()) as space:
    print("ready", flush=True)
    while True:
        space._driver.compact()
        print("compacted", flush=True)
"""


def settled(space, held, numbers):
    """Check, and once more where what was replaced went away meanwhile."""
    for _ in range(100):
        try:
            space.refresh()
            check(space, held, numbers)
            return
        except SegmentGoneError:
            continue
    raise AssertionError("never settled")


@pytest.fixture
def url(tmp_path):
    return f"lmdb:{tmp_path}/store"


def in_child(work) -> None:
    """Fork, run ``work`` in the child, and fail where it fails."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            os.write(2, repr(error).encode())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forks_child_opens_anew(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(20))
        space.flush()

        def work():
            check(space, dict.fromkeys(range(20), 0), range(25))
            put(space, range(20, 30))
            space.flush()
            check(space, dict.fromkeys(range(30), 0), range(35))
            in_child(lambda: check(space, dict.fromkeys(range(30), 0), range(35)))

        in_child(work)
        put(space, range(30, 40))
        space.flush()
        check(space, dict.fromkeys(range(40), 0), range(45))


def test_forks_while_threads_read_and_write(url):
    with actcache.open(url) as store, store.space(recipe(), segment_bytes=2048) as space:
        put(space, range(50))
        space.flush()
        stop = threading.Event()

        def reading():
            while not stop.is_set():
                check(space, dict.fromkeys(range(50), 0), range(50))

        def writing():
            for n in range(100, 100000):
                if stop.is_set():
                    return
                put(space, [n])
                space.flush()

        def work():
            with actcache.open(url) as mine, mine.space(recipe()) as other:
                check(other, dict.fromkeys(range(50), 0), range(50))
                put(other, range(50, 55))

        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(reading), pool.submit(reading), pool.submit(writing)]
            try:
                for _ in range(8):
                    in_child(work)
            finally:
                stop.set()
            for job in jobs:
                job.result()
        space.refresh()
        check(space, dict.fromkeys(range(55), 0), range(60))


def test_the_map_grows_under_readers(url):
    with actcache.open(url, **TINY) as store, store.space(recipe()) as space:
        put(space, range(10))
        space.flush()
        stop = threading.Event()
        rounds = []

        def reading():
            while not stop.is_set():
                check(space, dict.fromkeys(range(10), 0), range(10))
                rounds.append(1)

        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(reading) for _ in range(3)]
            try:
                for n in range(10, 700, 30):
                    put(space, range(n, n + 30))
                    space.flush()
            finally:
                stop.set()
            for job in jobs:
                job.result()
        assert len(rounds) > 3
        assert space._driver._wrapped._environment._lmdb.info()["map_size"] > 16 * TINY["map_size"]
        check(space, dict.fromkeys(range(700), 0), range(710))


def test_another_process_grows_the_map(url):
    with actcache.open(url, **TINY) as store, store.space(recipe()) as space:
        put(space, range(5))
        space.flush()
        for first in range(5, 305, 100):
            run(WRITER, url, first, first + 100, 50)
            space.refresh()
            check(space, dict.fromkeys(range(first + 100), 0), range(first + 110))
            put(space, [1000 + first])
            space.flush()
        assert len(space) == 308


def test_many_writers_and_readers(url):
    actcache.open(url, **TINY).space(recipe()).close()
    writers = [start(WRITER, url, 1000 * i, 1000 * i + 120, 7) for i in range(4)]
    with actcache.open(url, "r", **TINY) as store, store.space(recipe()) as space:
        while any(writer.poll() is None for writer in writers):
            space.refresh()
            check(space, {int(n): 0 for n in range(4000) if key(n) in space}, range(0, 4000, 37))
        for writer in writers:
            out, err = writer.communicate()
            assert writer.returncode == 0, err
            assert out.split()
        space.refresh()
        held = {1000 * i + n: 0 for i in range(4) for n in range(120)}
        check(space, held, range(4000))


@pytest.mark.parametrize("grace", [0, pytest.param(300, marks=pytest.mark.long)])
def test_compaction_under_readers_and_writers_that_are_killed(url, grace):
    rounds(url, grace, 1)


@pytest.mark.long
@pytest.mark.parametrize("grace", [0, 300])
def test_compaction_under_many_that_are_killed(url, grace):
    rounds(url, grace, 12)


def rounds(url, grace, count):
    """Whatever was acknowledged is there, in whichever generation, whoever died."""
    rng = random.Random(grace)
    acknowledged = 0
    held = {}
    with actcache.open(url, grace=grace) as store, store.space(recipe()) as space:
        put(space, range(90000, 90050))
        space.flush()
        held.update(dict.fromkeys(range(90000, 90050), 0))
        for _ in range(count):
            writer = start(WRITER, url, acknowledged, acknowledged + 4000, 5)
            compactors = [start(COMPACTOR, url, grace) for _ in range(2)]
            until = time.monotonic() + 1.5 + rng.random()
            assert compactors[0].stdout.readline() == "ready\n"
            deaths = 0
            while time.monotonic() < until or not select.select([writer.stdout], [], [], 0)[0]:
                settled(space, held, [*range(90000, 90060), *range(0, acknowledged, 11)])
                if rng.random() < 0.3:
                    victim = rng.randrange(2)
                    compactors[victim].send_signal(signal.SIGKILL)
                    compactors[victim].communicate()
                    compactors[victim] = start(COMPACTOR, url, grace)
                    deaths += 1
            writer.send_signal(signal.SIGKILL)
            out, err = writer.communicate()
            assert not err
            for compactor in compactors:
                compactor.send_signal(signal.SIGKILL)
                assert not compactor.communicate()[1]
            lines = [int(line) for line in out.split("\n")[:-1]]
            assert lines, "the writer got nowhere"
            acknowledged = lines[-1]
            held.update(dict.fromkeys(range(acknowledged), 0))
            settled(space, held, [*range(acknowledged), *range(90000, 90060)])
            # What was on its way may be there, whole.
            extra = {n: 0 for n in range(acknowledged, acknowledged + 20) if key(n) in space}
            settled(space, held | extra, range(acknowledged + 30))
            acknowledged += 20
            put(space, range(acknowledged))
            space.flush()
            held.update(dict.fromkeys(range(acknowledged), 0))
    with actcache.open(url) as store, store.space(recipe()) as space:
        check(space, held, [*range(acknowledged + 50), *range(90000, 90060)])
        assert space.usage().entries == len(space) == len(held)


def test_a_killed_reader_pins_nothing(url):
    with actcache.open(url, grace=0) as store, store.space(recipe()) as space:
        put(space, range(50))
        space.flush()
        child = start(
            "import sys, time, actcache\n"
            "from tests.support import recipe\n"
            "space = actcache.open(sys.argv[1], 'r').space(recipe())\n"
            "with space._driver._wrapped._environment.reading():\n"
            "    print('in', flush=True)\n"
            "    time.sleep(60)\n",
            url,
        )
        assert child.stdout.readline() == "in\n"
        child.kill()
        child.communicate()
        sizes = []
        for version in range(1, 25):
            put(space, range(50), version=version, overwrite=True)
            space.flush()
            sizes.append(space._driver._wrapped._environment.check_size())
        assert sizes[-1] < 3 * sizes[3]
        check(space, dict.fromkeys(range(50), 24), range(60))
