"""Entries in memory: the same numbers, fewer reads, never more bytes than allowed."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import actcache
from actcache.errors import UsageError
from actcache.format.arguments import nbytes_of
from actcache.reader.caches.ram_cache import RamCache
from tests.support import HIDDEN, ids, key, length, put, recipe, rows

COUNT = 40
ALL = sum(length(n) for n in range(COUNT)) * HIDDEN * 4


class Counting:
    """A space that counts the entries that are read from it."""

    def __init__(self, space):
        self.space = space
        self.read = 0
        self.recipe, self.has, self.lengths, self.read_ahead = space.recipe, space.has, space.lengths, space.read_ahead

    def read_into(self, keys, out, *, token_ids=None):
        self.read += len(keys)
        return self.space.read_into(keys, out, token_ids=token_ids)


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def check(source, numbers, *, padded):
    keys = [key(n) for n in numbers]
    lengths = [length(n) if n < COUNT else 0 for n in numbers]
    width = max(lengths, default=0) + 2
    shape = (len(numbers), width) if padded else (sum(lengths) + 3,)
    out, out_ids = np.full((*shape, HIDDEN), 7, np.float32), np.full(shape, 7, np.int32)
    report = source.read_into(keys, out, token_ids=out_ids)
    assert report.lengths.tolist() == lengths
    begin = 0
    for i, n in enumerate(numbers):
        part = (i, slice(lengths[i])) if padded else slice(begin, begin + lengths[i])
        begin += lengths[i]
        if lengths[i]:
            np.testing.assert_array_equal(out[part], rows(n))
            np.testing.assert_array_equal(out_ids[part], ids(n))
        if padded:
            assert not out[i, lengths[i] :].any()
            assert not out_ids[i, lengths[i] :].any()
    if not padded:
        assert (out[begin:] == 7).all()


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 5.0])
def test_the_same_numbers_at_any_size(space, padded, share):
    counting = Counting(space)
    cache = RamCache(counting, int(ALL * share))
    rng = np.random.default_rng(0)
    for _ in range(60):
        numbers = rng.integers(0, COUNT + 5, int(rng.integers(0, 12))).tolist()
        check(cache, numbers, padded=padded)
        assert cache.held <= ALL * share
    counting.read = 0
    for n in range(COUNT):
        check(cache, [n], padded=padded)
    if share >= 1:
        assert counting.read <= 5
        counting.read = 0
        check(cache, list(range(COUNT)), padded=padded)
        assert counting.read == 0
    elif share:
        assert 0 < counting.read < COUNT
    else:
        assert counting.read == COUNT


def test_a_reader_reads_once(space, monkeypatch):
    keys = [key(n) for n in range(COUNT)]
    reader = space.reader(keys, batch_size=6, shuffle=True, ram_cache="1MiB", device="cpu")
    epochs = [list(reader) for _ in range(3)]
    monkeypatch.setattr(space, "read_into", None)  # nothing is read any more
    epochs.append(list(reader))
    for batches in epochs:
        assert sorted(int(n) for batch in batches for n in batch.documents) == list(range(COUNT))
        for batch in batches:
            for i, n in enumerate(batch.documents.tolist()):
                np.testing.assert_array_equal(batch.activations[i, : length(n)].numpy(), rows(n))


def test_threads(space):
    cache, failures = RamCache(space, ALL // 2), []

    def work(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(60):
                check(cache, rng.integers(0, COUNT, 7).tolist(), padded=bool(seed % 2))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_travels_is_empty(space):
    cache = RamCache(space, ALL)
    check(cache, list(range(COUNT)), padded=True)
    assert len(pickle.dumps(cache)) < 2000


def test_sizes():
    assert [nbytes_of("x", value) for value in ("8GiB", "1.5 kB", "10", 7, "2Mi")] == [8 << 30, 1500, 10, 7, 2 << 20]
    for bad in ("8 gigs", "", "-1", -1, "GiB", None):
        with pytest.raises(UsageError):
            nbytes_of("ram_cache", bad)


def test_token_ids_beside_entries_that_have_none(space):
    """Such a batch has no token ids; those that it has are not taken for zeros in the next batch."""
    space.put([key(100)], [rows(100)])
    space.flush()
    keys = [key(n) for n in (*range(20), 100)]
    reader = space.reader(keys, batch_size=3, shuffle=True, ram_cache=2 * ALL)
    compared = 0
    for _ in range(4):
        for batch in reader:
            assert (batch.token_ids is None) == (20 in batch.documents)
            if batch.token_ids is not None:
                for i, n in enumerate(batch.documents.tolist()):
                    np.testing.assert_array_equal(batch.token_ids[i, : length(n)], ids(n))
                    compared += 1
    assert compared


def test_what_is_held_keeps_its_token_ids_when_it_is_deleted(space):
    reader = space.reader([key(n) for n in range(20)], batch_size=5, ram_cache=2 * ALL)
    list(reader)
    space.delete([key(3)])
    for batch in reader:
        for i, n in enumerate(batch.documents.tolist()):
            np.testing.assert_array_equal(batch.token_ids[i, : length(n)], ids(n))


def test_a_fork_while_entries_are_kept(space):
    cache = RamCache(space, ALL)
    with cache._lock:  # as a thread has it that the child will not have
        child = os.fork()
        if not child:
            try:
                check(cache, [1, 2], padded=True)
                os._exit(0)
            except BaseException:
                os._exit(1)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
