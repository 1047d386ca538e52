"""Rows that come from a disk: the next batch is asked for while one is read."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import actcache
from actcache.reader.epoch import ReadingClock
from tests.support import key, recipe, rows
from tests.support.waiting import DEADLINE

COUNT = 30
KEYS = [key(n) for n in range(COUNT)]


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put(KEYS, [rows(n) for n in range(COUNT)])
        space.flush()
        yield space


class Disk:
    """Reads that are slow: each waits until so many have begun, or for good. Counts how many there are at a time."""

    def __init__(self, space, monkeypatch, *, together=1, cold=True):
        self._read, self._together = space.read_into, together
        self._lock = threading.Condition()
        self.begun = self.now = self.most = 0
        self.failing: dict[int, BaseException] = {}  # by the number of the read
        monkeypatch.setattr(space, "read_into", self.read_into)
        monkeypatch.setattr(space, "read_ahead", lambda keys: cold)

    def read_into(self, keys, out, **options):
        with self._lock:
            number = self.begun
            self.begun, self.now = self.begun + 1, self.now + 1
            self.most = max(self.most, self.now)
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: self.begun >= self._together, DEADLINE)
        try:
            if number in self.failing:
                raise self.failing[number]
            return self._read(keys, out, **options)
        finally:
            with self._lock:
                self.now -= 1


def delivered(batches):
    return [n for batch in batches for n in batch.documents.tolist()]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_next_batch_is_read_while_one_is(space, layout, monkeypatch):
    """Without that, what the first read waits for never comes."""
    wanted = space.get(KEYS)
    disk = Disk(space, monkeypatch, together=2)
    kept = list(space.reader(KEYS, batch_size=4, layout=layout, depth=1))
    assert delivered(kept) == list(range(COUNT))
    assert disk.most == 2
    for batch in kept:
        for i, n in enumerate(batch.documents.tolist()):
            count = len(wanted[n].activations)
            at = (i, slice(count)) if layout == "padded" else slice(batch.offsets[i], batch.offsets[i + 1])
            np.testing.assert_array_equal(batch.activations[at], wanted[n].activations)


@pytest.mark.parametrize(("depth", "cold"), [(0, True), (2, False)], ids=["no-thread", "in-memory"])
def test_elsewhere_one_is_read_at_a_time(space, depth, cold, monkeypatch):
    disk = Disk(space, monkeypatch, cold=cold)
    assert delivered(space.reader(KEYS, batch_size=4, depth=depth)) == list(range(COUNT))
    assert disk.most == 1


def test_the_first_batches_are_read_before_others_are_announced(space, monkeypatch):
    """To announce them takes as long as to read them; later ones are announced two batches before they are read."""
    read, told, order = space.read_into, space.read_ahead, []
    first = {tuple(KEYS[n]): n // 4 for n in range(0, COUNT, 4)}

    def which(keys):
        return first[tuple(keys[0].tobytes())]

    monkeypatch.setattr(space, "read_ahead", lambda keys: order.append(("told", which(keys))) or told(keys) or True)
    monkeypatch.setattr(
        space, "read_into", lambda keys, *a, **o: order.append(("read", which(keys))) or read(keys, *a, **o)
    )
    assert delivered(space.reader(KEYS, batch_size=4)) == list(range(COUNT))
    batches = range(-(-COUNT // 4))
    assert [n for what, n in order if what == "told"] == list(batches)
    at = {event: place for place, event in enumerate(order)}
    assert at["read", 0] < at["told", 2]
    for n in batches[4:]:
        assert at["told", n] < at["read", n - 1], "while others are read, it is on its way"


def test_a_failure_comes_in_its_turn(space, monkeypatch):
    disk = Disk(space, monkeypatch)
    disk.failing = {2: OSError("the disk has gone")}
    # Which of two batches asks first is chance; each of the two before the failure was asked for before it.
    reader = iter(space.reader(KEYS, batch_size=6, depth=3))
    got = []
    with pytest.raises(OSError, match="the disk has gone"):
        got.extend(batch.documents.tolist() for batch in reader)
    got = [n for batch in got for n in batch]
    assert got == list(range(len(got)))
    assert 6 <= len(got) <= 18
    with pytest.raises(StopIteration):
        next(reader)


def test_closing_waits_for_what_is_read(space, monkeypatch):
    """The space may be closed right behind it."""
    disk = Disk(space, monkeypatch)
    for _ in range(5):
        iterator = iter(space.reader(KEYS, batch_size=2, depth=2))
        next(iterator)
        iterator.close()
        assert disk.now == 0
    left = iter(space.reader(KEYS, batch_size=2, depth=2))
    next(left)
    del left  # the fixture of this folder sees that no thread stays


def test_seconds_of_reading_are_counted_once():
    clock = ReadingClock()
    assert clock.passed(0.0, 2.0) == 2.0
    assert clock.passed(1.0, 3.0) == 1.0
    assert clock.passed(1.5, 2.5) == 0.0
    assert clock.passed(5.0, 6.0) == 1.0
