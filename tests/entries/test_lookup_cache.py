"""A batch that was asked for ahead is looked up once, and never read by a look-up that has become old."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest

from actcache.format.keys import key_array
from actcache.segments.snapshot import SegmentedSnapshot
from actcache.store.store import open_store
from tests.support import ids, key, recipe, rows


@pytest.fixture
def space(tmp_path):
    with open_store(tmp_path / "store") as store, store.space(recipe()) as one:
        one.put([key(i) for i in range(20)], [rows(i) for i in range(20)], [ids(i) for i in range(20)])
        one.flush()
        yield one


@pytest.fixture
def looked_up(monkeypatch):
    """How many keys were looked up, call by call."""
    calls, locate = [], SegmentedSnapshot.locate
    monkeypatch.setattr(SegmentedSnapshot, "locate", lambda self, keys: calls.append(len(keys)) or locate(self, keys))
    return calls


def batch(*numbers):
    return key_array([key(number) for number in numbers])


def test_once(space, looked_up):
    space.read_ahead(batch(3, 1))
    space.checksums(batch(3, 1))
    first, second = space.get(batch(3, 1))
    np.testing.assert_array_equal(first.activations, rows(3))
    np.testing.assert_array_equal(second.activations, rows(1))
    assert looked_up == [2]
    assert space.lengths(batch(1, 3)).tolist() == [len(rows(1)), len(rows(3))]  # the same keys in another order
    assert looked_up == [2, 2]


def test_a_reader_looks_a_batch_up_once(space, looked_up, monkeypatch):
    """By itself, or within the one call that reads what is in memory."""
    at_once, read = [], SegmentedSnapshot.read_at_once

    def reading(self, keys, *rest):
        found = read(self, keys, *rest)
        if found is not None:
            at_once.append(len(keys))
        return found

    reader = space.reader([key(i) for i in range(20)], batch_size=4)
    looked_up.clear()
    monkeypatch.setattr(SegmentedSnapshot, "read_at_once", reading)
    assert [len(one) for one in reader] == [4] * 5
    announced = len(looked_up) + len(at_once) - 5  # batches that were announced, then read at once
    assert set(looked_up + at_once) == {4}
    assert len(looked_up) <= 5
    assert 0 <= announced <= 4


def test_what_changed_meanwhile_is_looked_up_again(space, looked_up):
    space.read_ahead(batch(0, 1, 2))
    space.delete([key(1)])
    space.put([key(2)], [rows(2, 1)], [ids(2, 1)], overwrite=True)
    found = space.get(batch(0, 1, 2))
    assert found[1] is None
    np.testing.assert_array_equal(found[2].activations, rows(2, 1))  # not flushed
    space.flush()
    np.testing.assert_array_equal(space.get(batch(0, 1, 2))[2].activations, rows(2, 1))


def test_no_snapshot_is_kept_alive(space):
    space.read_ahead(batch(0))
    old = weakref.ref(space._view())
    space.refresh()
    gc.collect()
    assert old() is None


def test_threads(space):
    """Eight threads ask and read at once, each its own batches."""
    wrong = []

    def read(thread):
        rng = np.random.default_rng(thread)
        for _ in range(100):
            numbers = rng.permutation(20)[:5].tolist()
            space.read_ahead(batch(*numbers))
            for number, entry in zip(numbers, space.get(batch(*numbers)), strict=True):
                if not np.array_equal(entry.activations, rows(number)):
                    wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
