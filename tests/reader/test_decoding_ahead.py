"""Rows that are decoded: by a thread of their own, while the next batch is read."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import actcache
from actcache.format import codec
from actcache.reader import epoch as epochs
from actcache.reader.delivery import HostDelivery
from tests.support import key, length, recipe, rows
from tests.support.waiting import DEADLINE

KEYS = [key(n) for n in range(30)]


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype="int8")) as space:
        space.put(KEYS, [rows(n) for n in range(30)])
        space.flush()
        yield space


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_batches_that_are_kept_are_what_get_returns(space, depth, layout):
    wanted = space.get(KEYS)
    kept = list(space.reader(KEYS, batch_size=4, shuffle=True, depth=depth, layout=layout, dtype="float16"))
    assert sorted(n for batch in kept for n in batch.documents.tolist()) == list(range(30))
    for batch in kept:
        for i, n in enumerate(batch.documents.tolist()):
            at = (i, slice(length(n))) if layout == "padded" else slice(batch.offsets[i], batch.offsets[i + 1])
            np.testing.assert_array_equal(batch.activations[at], wanted[n].activations.astype(np.float16))


def test_the_next_batch_is_read_while_one_is_decoded(space, monkeypatch):
    """Without that, what decoding waits for here never comes."""
    decode, read = HostDelivery._numbers, epochs.read_batch
    begun, others = threading.Event(), []

    def slow(self, stored):
        assert begun.wait(DEADLINE)
        return decode(self, stored)

    def noted(work, delivery, members):
        others.append(threading.current_thread())
        if len(others) == 2:
            begun.set()
        return read(work, delivery, members)

    monkeypatch.setattr(HostDelivery, "_numbers", slow)
    monkeypatch.setattr(epochs, "read_batch", noted)
    assert len(list(space.reader(KEYS, batch_size=10, depth=1))) == 3
    assert begun.is_set()


def test_a_failure_of_decoding_comes_in_its_turn(space, monkeypatch):
    decode = codec.decode_as
    turns = []

    def failing(*given):
        turns.append(given)
        if len(turns) == 2:
            raise MemoryError("no room")
        decode(*given)

    monkeypatch.setattr(codec, "decode_as", failing)
    iterator = iter(space.reader(KEYS, batch_size=5, depth=2))
    next(iterator)
    with pytest.raises(MemoryError, match="no room"):
        next(iterator)
    with pytest.raises(StopIteration):
        next(iterator)


def test_breaking_off_ends_both_threads(space):
    iterator = iter(space.reader(KEYS, batch_size=2, depth=2))
    next(iterator)
    iterator.close()
    left = iter(space.reader(KEYS, batch_size=2, depth=2))
    next(left)
    del left  # the fixture of this folder sees that no thread stays
