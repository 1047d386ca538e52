"""Forks, spawned processes, threads, and what is left behind: nothing."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import actcache
from actcache.backend import SpaceDriver
from actcache.errors import OutOfSpaceError, StorageIOError
from actcache.segments.space_driver import SegmentedSpace
from tests.support import HIDDEN, PYTHONPATH, ROOT, check, ids, key, make_store, put, recipe, rows, run
from tests.support.waiting import DEADLINE, no_hang, until

pytestmark = pytest.mark.processes

HELD = dict.fromkeys(range(30), 0)


@pytest.fixture
def root(tmp_path):
    make_store(tmp_path / "store", range(30), segments=4)
    return tmp_path / "store"


# --- forks and other processes ---------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading, time, warnings
import actcache
from tests.support import *

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tested here
root, mapped = sys.argv[1], sys.argv[2] == "True"
held = dict.fromkeys(range(30), 0)
store = actcache.open(root, mapped=mapped)
space = store.space(recipe(), segment_bytes=2000)
check(space, held, range(35))          # threads of the pool, mappings, open files
put(space, range(30, 40))
space.flush()                          # the writer's thread
held.update(dict.fromkeys(range(30, 40), 0))
put(space, [77])                       # the parent's own, not flushed

stop, failures = threading.Event(), []
def busy(first):
    number = first
    try:
        while not stop.is_set():
            check(space, held, range(40))
            put(space, [number])
            space.flush()
            number += 1
    except BaseException as error:
        failures.append(repr(error))
busy_ones = [threading.Thread(target=busy, args=(first,)) for first in (1000, 2000)]
for thread in busy_ones:
    thread.start()

children = []
for child in range(12):
    time.sleep(0.02)
    pid = os.fork()
    if not pid:
        signal.alarm(90)
        try:
            check(space, held, range(40))
            put(space, [100 + child])
            space.flush()
            check(space, {100 + child: 0}, [100 + child])
            if child % 2:
                store.close()
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    children.append(pid)
statuses = [os.waitpid(pid, 0)[1] for pid in children]
stop.set()
for thread in busy_ones:
    thread.join()
assert statuses == [0] * 12, statuses
assert not failures, failures
space.refresh()
check(space, {**held, 77: 0, **{100 + n: 0 for n in range(12)}}, [*range(40), 77, *range(100, 112)])
store.close()
with actcache.open(root, "r") as again, again.space(recipe()) as reader:
    check(reader, {77: 0, **{100 + n: 0 for n in range(12)}}, [77, *range(100, 112)])
    print(sorted(reader.keys()).count(key(77)), reader.usage().entries)
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize("mapped", [True, False])
def test_forks_while_threads_read_and_write(root, mapped):
    """A child's locks may be held by threads that it does not have; it opens everything anew."""
    assert run(FORK, root, mapped, timeout=140).split()[0] == "1"


def test_a_forked_child_does_not_flush_its_parents_entries(root):
    code = """
import os, sys
import actcache
from tests.support import *
store = actcache.open(sys.argv[1])
space = store.space(recipe())
put(space, [50])
pid = os.fork()
if not pid:
    assert key(50) not in space          # the parent's to flush
    store.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
with actcache.open(sys.argv[1], "r") as other, other.space(recipe()) as reader:
    assert key(50) not in reader
check(space, {50: 0}, [50])
pid = os.fork()
if not pid:
    store.close()                        # untouched in the child
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
store.close()
with actcache.open(sys.argv[1], "r") as other, other.space(recipe()) as reader:
    check(reader, {50: 0}, [50])
    assert reader.usage().segments == 5
"""
    run(code, root)


def test_spawned_processes_get_the_url_and_the_recipe(root):
    with actcache.open(root, mapped=False) as store, store.space(recipe()) as space:
        put(space, [40])  # not flushed: stays behind
        data = pickle.dumps((space, store))
        assert len(data) < 3000
        space.flush()
    code = """
import pickle, sys
from tests.support import *
space, store = pickle.load(sys.stdin.buffer)
check(space, dict.fromkeys([*range(30), 40], 0), [*range(32), 40])
put(space, [41])
space.close()
store.close()
"""
    process = subprocess.run(
        [sys.executable, "-c", code], input=data, cwd=ROOT, env={**os.environ, "PYTHONPATH": PYTHONPATH}, timeout=60
    )
    assert process.returncode == 0
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        check(space, {41: 0}, [41])


def read_part(arguments):
    space, numbers = arguments
    check(space, HELD, numbers)
    return len(numbers)


def test_a_pool_of_spawned_processes(root):
    import multiprocessing

    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            jobs = [(space, list(range(n, n + 10))) for n in (0, 10, 20)]
            assert pool.map(read_part, jobs) == [10, 10, 10]
            pool.close()
            pool.join()
        check(space, HELD, range(32))


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
def test_threads_on_one_space(tmp_path, mapped):
    """Each sees at once what it put, flushed or not, while segments are published, indexed and deleted around it."""
    failures, stop = [], time.monotonic() + 1

    def work(me):
        try:
            rng, versions = np.random.default_rng(me), {}
            own = range(100 * me, 100 * me + 40)
            while time.monotonic() < stop:
                numbers = rng.choice(own, 4, replace=False).tolist()
                match int(rng.integers(6)):
                    case 0 | 1:
                        put(space, numbers, version=1)
                        versions = {**dict.fromkeys(numbers, 1), **versions}
                    case 2:
                        version = int(rng.integers(2, 9))
                        put(space, numbers, version=version, overwrite=True)
                        versions.update(dict.fromkeys(numbers, version))
                    case 3:
                        if rng.random() < 0.3:
                            assert space.delete([key(n) for n in numbers]) == len(versions.keys() & set(numbers))
                            versions = {n: v for n, v in versions.items() if n not in numbers}
                    case 4:
                        space.flush()
                    case 5:
                        space.refresh()
                check(space, versions, own)
            held.update(versions)
        except BaseException as error:  # reported below
            failures.append(error)
            raise SystemExit from None

    held = {}
    with actcache.open(tmp_path / "store", mapped=mapped) as store:
        space = store.space(recipe(), segment_bytes=1000)
        threads = [threading.Thread(target=work, args=(me,)) for me in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        check(space, held, [100 * me + n for me in range(5) for n in range(40)])


def test_a_slow_refresh_does_not_hide_what_was_published_meanwhile(root, monkeypatch):
    """Two snapshots at once: the older one must not be the one that stays."""
    snapshot, slow = SegmentedSpace.snapshot, threading.Event()
    taken, go_on = threading.Event(), threading.Event()

    def snapshot_slowly(self):
        result = snapshot(self)
        if slow.is_set() and threading.current_thread().name == "refresher":
            taken.set()
            go_on.wait(DEADLINE)
        return result

    monkeypatch.setattr(SegmentedSpace, "snapshot", snapshot_slowly)
    with actcache.open(root) as store, store.space(recipe(), segment_bytes=100) as space:
        slow.set()
        refresher = threading.Thread(target=space.refresh, name="refresher")
        refresher.start()
        assert taken.wait(DEADLINE)
        threading.Timer(0.2, go_on.set).start()
        put(space, [50])
        space._writer.flush()  # published, and forgotten by the writer
        refresher.join()
        check(space, {50: 0}, [50])


# --- nothing is left -------------------------------------------------------------------------------------------------


def left():
    gc.collect()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer) and thread.finished.is_set():  # called off: it ends in a moment
            thread.join()
    return {*threading.enumerate(), *os.listdir("/proc/self/fd")}


@pytest.mark.parametrize("options", [{"mapped": True}, {"mapped": False}])
def test_no_threads_and_no_descriptors_stay(root, options):
    before = left()
    for mode in ("a", "r"):
        for _ in range(3):
            with actcache.open(root, mode, **options) as store:
                spaces = [store.space(recipe()) for _ in range(3)]
                for number, space in enumerate(spaces):
                    check(space, HELD, range(32))
                    if mode == "a":
                        put(space, [60 + number])
                        space.flush()
                    list(space.reader([key(n) for n in range(30)], batch_size=7, shuffle=True))
            until(lambda: left() <= before)  # although the closed spaces are still referred to
    with pytest.raises(actcache.errors.ReadOnlyError), actcache.open(root, "r", **options) as store:
        put(store.space(recipe()), [1])
    until(lambda: left() <= before)
    assert list((root / "tmp").iterdir()) == []


def test_spaces_that_are_closed_are_forgotten_by_their_store(root):
    with actcache.open(root) as store:
        for _ in range(5):
            with store.space(recipe()) as space:
                check(space, HELD, [1])
        assert store._spaces == []


def test_spaces_without_a_close_end_with_the_process(root):
    """What was flushed is there; nothing hangs, nothing crashes."""
    code = """
import sys
import actcache
from tests.support import *
space = actcache.open(sys.argv[1]).space(recipe(), segment_bytes=500)
check(space, dict.fromkeys(range(30), 0), range(32))
put(space, range(30, 60))
space.flush()
put(space, range(60, 90))
"""
    run(code, root, timeout=120)
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(60), 0), range(60))


def test_closing_as_the_interpreter_ends(root):
    """``atexit.register(store.close)``: no thread can be started any more, and nothing is lost all the same."""
    code = """
import atexit, sys
import actcache
from tests.support import *
store = actcache.open(sys.argv[1])
atexit.register(store.close)
space = store.space(recipe())
atexit.register(lambda: check(space, {**dict.fromkeys(range(30), 0), 50: 0}, [*range(32), 50]))
put(space, [50])
"""
    run(code, root)
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        check(space, {50: 0}, [50])


def test_the_writer_keeps_its_memory_bounded(tmp_path):
    """200 MB through a writer with segments of 4 MB, in another process, to measure."""
    code = """
import sys
import actcache, psutil
from tests.support import *
process = psutil.Process()
private = lambda: (lambda m: m.rss - m.shared)(process.memory_info())
with actcache.open(sys.argv[1]) as store, store.space(recipe(hidden_size=1024), segment_bytes=4 << 20) as space:
    one = np.ones((100, 1024), np.float32)  # 400 kB
    space.put([key(0)], [one], [np.arange(100)])
    space.flush()
    before, most = private(), 0
    for number in range(1, 500):
        space.put([key(number)], [one], [np.arange(100)])
        most = max(most, private() - before)
    space.flush()
    assert space.usage().entries == 500
print(most)
"""
    assert int(run(code, tmp_path / "store")) < 30 << 20


# --- failures in the background --------------------------------------------------------------------------------------


class Failing:
    """Stands for ``SpaceDriver.append`` while the disk is broken."""

    def __init__(self, monkeypatch, error):
        self.broken, self.attempts, self.error = True, 0, error
        append = SegmentedSpace.append

        def append_or_fail(driver, block):
            self.attempts += 1
            if self.broken:
                raise self.error
            append(driver, block)

        monkeypatch.setattr(SegmentedSpace, "append", append_or_fail)


def test_a_failure_in_the_background_surfaces_and_is_tried_again(root, monkeypatch):
    failing = Failing(monkeypatch, OutOfSpaceError("full"))
    with actcache.open(root) as store:
        space = store.space(recipe(), segment_bytes=200)
        held, raised = dict(HELD), 0
        for number in range(30, 60):
            try:
                put(space, [number])
                held[number] = 0
            except OutOfSpaceError:
                raised += 1
                assert key(number) not in space
            check(space, held, range(60))  # all that was accepted can be read
        assert raised > 5
        assert len(space._writer) < 20, "it does not go on collecting"
        with pytest.raises(OutOfSpaceError):
            space.flush()
        with pytest.raises(OutOfSpaceError):
            space.delete([key(30)])
        failing.broken = False
        space.flush()
        assert len(space._writer) == 0
        check(space, held, range(60))
    with actcache.open(root, "r") as store, store.space(recipe()) as reader:
        check(reader, held, range(60))


@pytest.mark.parametrize("error", [StorageIOError("broken"), RuntimeError("a bug"), MemoryError()])
def test_closing_ends_after_a_failure(root, monkeypatch, error):
    Failing(monkeypatch, error)
    before = left()
    store = actcache.open(root)
    spaces = [store.space(recipe()), store.space(recipe(layer=3))]
    for space in spaces:
        put(space, [50])
    with no_hang(), pytest.raises(type(error)):
        store.close()
    store.close()  # the second time it does nothing
    for space in spaces:
        with pytest.raises(actcache.errors.ClosedError):
            space.get([key(1)])
        space.close()
    del space, spaces
    until(lambda: left() <= before)


def test_an_interrupt_while_waiting_loses_and_doubles_nothing(root, monkeypatch):
    """Ctrl-C arrives while the main thread waits for a block to be published."""
    code = """
import os, signal, sys, threading, time
import actcache
from actcache.segments.space_driver import SegmentedSpace
from tests.support import *
append = SegmentedSpace.append
def slow(self, block):
    time.sleep(1)
    append(self, block)
SegmentedSpace.append = slow
with actcache.open(sys.argv[1]) as store, store.space(recipe()) as space:
    put(space, [50, 51])
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        space.flush()
        raise SystemExit("not interrupted")
    except KeyboardInterrupt:
        pass
    check(space, {50: 0, 51: 0}, [50, 51, 52])
    put(space, [52])
    space.flush()
    print(space.usage().segments)
"""
    assert run(code, root).strip() == "6"  # four, the interrupted one once, and the last
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        check(space, {**HELD, 50: 0, 51: 0, 52: 0}, [*range(30), 50, 51, 52])


def test_the_oldest_entries_go_by_time(root):
    with actcache.open(root) as store, store.space(recipe(), segment_seconds=0.05) as space:
        put(space, [50])
        time.sleep(0.1)
        put(space, [51])
        deadline = time.monotonic() + 60
        seen = False
        while not seen and time.monotonic() < deadline:
            with actcache.open(root, "r") as other, other.space(recipe()) as reader:
                seen = key(50) in reader
        assert seen
        check(space, {50: 0, 51: 0}, [50, 51])


def test_drivers_say_what_they_are(root):
    with actcache.open(root) as store, store.space(recipe()) as space:
        assert isinstance(space._driver, SpaceDriver)
        assert space.get([key(3)])[0].activations.shape == (len(rows(3)), HIDDEN)
        assert space.get([key(3)])[0].token_ids.tolist() == ids(3).tolist()
