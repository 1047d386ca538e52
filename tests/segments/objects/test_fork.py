"""Forks of a process that has a store in an object store open: what the children print, read and write."""

from __future__ import annotations

import json

import pytest

from tests import support

CHILDREN = """
import gc, json, os, signal, sys, time, warnings
import actcache
from tests.support import *

warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: what is tested here
url, options = sys.argv[1], json.loads(sys.argv[2])
held = dict.fromkeys(range(20), 0)
store = actcache.open(url, **options)
other = actcache.open(url, "r", **options)  # a second client
space, reader = store.space(recipe()), other.space(recipe())
put(space, range(20))
space.flush()                                # s3fs
check(space, held, range(25))                # and whatever reads
reader.refresh()
check(reader, held, range(25))
put(space, [77])                             # the parent's own, not flushed

def nothing():
    pass

def leaves():
    sys.exit(0)                              # the interpreter's end, with all that the parent had open

def closes():
    reader.close()
    store.close()
    other.close()

def reads():
    check(space, held, range(25))
    check(reader, held, range(25))

def writes():
    put(space, [100 + os.getpid() % 2])
    space.flush()
    check(space, held, range(25))

for child in (nothing, leaves, closes, reads, writes):
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        child()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0, child
    check(reader, held, range(25))           # the parent's connections still work
put(space, [30])
space.flush()
check(space, {**held, 30: 0, 77: 0}, [*range(25), 30, 77])
"""

#: As ``multiprocessing`` and PyTorch's workers fork.
WORKERS = """
import multiprocessing

def work(number):
    check(space, held, range(number, 25))
    return os.getpid()

with multiprocessing.get_context("fork").Pool(2) as pool:
    assert os.getpid() not in pool.map(work, range(8))

import torch
batches = reader.reader([key(n) for n in range(20)], batch_size=4)
dataset = batches.dataset()
loader = torch.utils.data.DataLoader(
    dataset, batch_size=4, collate_fn=dataset.collate, num_workers=2, multiprocessing_context="fork"
)
for _ in range(2):
    found = [batch["activations"] for batch in loader]
    assert len(found) == 5
    for first, padded in zip(range(0, 20, 4), found):
        for n, got in zip(range(first, first + 4), padded):
            np.testing.assert_array_equal(got[: length(n)], rows(n))
"""

#: Forks while four threads of the parent have requests in flight, and its connections go from one request to the next.
IN_FLIGHT = """
import threading
from actcache.io.metrics import process_metrics

ended, failures, asked = threading.Event(), [], 0

def ask(thread):
    global asked
    try:
        while not ended.is_set():
            check(reader, held, range(thread, 25, 4))
            reader.refresh()
            asked += 1
    except BaseException as error:
        failures.append(error)

def collects():
    gc.collect()                             # what the parent had open, and nobody here refers to
    check(reader, held, range(25))
    gc.collect()

def forks():
    check(reader, held, range(25))
    pid = os.fork()
    if not pid:
        check(reader, held, range(25))
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    check(reader, held, range(25))

threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for child in 2 * (leaves, closes, collects, forks):
    pid = os.fork()
    if not pid:
        child()
        sys.exit(0)
    assert os.waitpid(pid, 0)[1] == 0, child
    before = asked
    while asked < before + 2 and not failures:
        time.sleep(0.01)
ended.set()
for thread in threads:
    thread.join()
assert not failures, failures
# Nothing was asked twice: a request that stalled would have been given up first.
assert not any(metric.value for metric in process_metrics() if metric.short.endswith("failures"))
"""

END = """
other.close()
store.close()
print("done")
"""


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("client", "more"),
    [
        ("obstore", WORKERS),
        *(pytest.param("s3fs", more, marks=pytest.mark.long) for more in (WORKERS, IN_FLIGHT)),
        pytest.param("obstore", IN_FLIGHT, marks=pytest.mark.long),
    ],
    ids=["obstore", "s3fs", "s3fs in flight", "obstore in flight"],
)
def test_children_are_silent_and_the_parent_goes_on(bucket, client, more):
    # A request that stalls, as one did in the parent of a fork, would be repeated after these seconds.
    options = {**bucket.options, "client": client, "timeout": 600}
    process = support.start(CHILDREN + more + END, bucket.url, json.dumps(options))
    out, err = process.communicate(timeout=140)
    assert (process.returncode, out, err) == (0, "done\n", ""), err
