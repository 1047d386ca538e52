"""Batches in which published, unpublished, absent and overwritten entries stand in any order, with and without ids."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from actcache.errors import CorruptEntryError
from actcache.segments.snapshot import SegmentedSnapshot
from tests.support import HIDDEN, ids, key, length, recipe, rows
from tests.support.backends import each

COUNT = 80


@pytest.fixture(params=[True, False], ids=["all-with-ids", "some-without-ids"])
def held(request, tmp_path):
    """A space, and the version of each document that it should give."""
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        yield fill(space, every=request.param)


def fill(space, *, every):
    versions, rng = {}, np.random.default_rng(7)
    for version, share in enumerate((0.5, 0.5)):
        for number in np.flatnonzero(rng.random(COUNT) < share).tolist():
            with_ids = every or number % 3
            given = [ids(number, version)] if with_ids else None
            space.put([key(number)], [rows(number, version)], given, overwrite=True)
            versions[number] = version
        if not version:
            space.flush()
    return space, versions


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows(held, layout):
    space, versions = held
    without = {number for number in versions if space.get([key(number)])[0].token_ids is None}
    order = np.random.default_rng(1).permutation(COUNT)
    lengths = [length(n, versions[n]) if n in versions else 0 for n in order.tolist()]
    width = max(lengths) + 2
    shape = (sum(lengths) + 3,) if layout == "packed" else (COUNT, width)
    out = np.full((*shape, HIDDEN), 7, np.float32)
    given = None if without else np.full(shape, 7, np.int32)
    report = space.read_into([key(n) for n in order.tolist()], out, token_ids=given)
    assert report.lengths.tolist() == lengths
    begin = 0
    for i, number in enumerate(order.tolist()):
        version = versions.get(number)
        here = slice(begin, begin + lengths[i]) if layout == "packed" else (i, slice(0, lengths[i]))
        if version is not None:
            np.testing.assert_array_equal(out[here], rows(number, version))
            if given is not None:
                np.testing.assert_array_equal(given[here], ids(number, version))
        if layout == "padded":
            assert not out[i, lengths[i] :].any()
        begin += lengths[i]
    if layout == "packed":
        assert (out[begin:] == 7).all(), "what belongs to nobody is left alone"


def test_a_corrupt_entry_is_named(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(n) for n in range(0, COUNT, 2)], [rows(n) for n in range(0, COUNT, 2)])
        space.flush()
    victim = rows(40)
    (path,) = (tmp_path / "store").glob("spaces/*/segments/*")
    data = bytearray(path.read_bytes())
    data[data.index(victim.tobytes())] ^= 1
    path.write_bytes(data)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(n) for n in range(1, COUNT, 2)], [rows(n) for n in range(1, COUNT, 2)])
        out = np.zeros((COUNT, 20, HIDDEN), np.float32)
        with pytest.raises(CorruptEntryError) as caught:
            space.read_into([key(n) for n in range(COUNT)], out)
        assert caught.value.keys == [key(40)]
        for number in set(range(COUNT)) - {40}:
            np.testing.assert_array_equal(out[number, : length(number)], rows(number))


def test_a_few_gathers_for_any_order(held, monkeypatch):
    space, _ = held
    calls, gather = [], SegmentedSnapshot.gather
    monkeypatch.setattr(SegmentedSnapshot, "gather", lambda *given: calls.append(1) or gather(*given))
    space.get([key(n) for n in range(COUNT)])
    assert len(calls) <= 8  # ids and rows of each kind


@each()
def test_every_backend(kind, tmp_path):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        space, versions = fill(space, every=True)
        for number, entry in enumerate(space.get([key(n) for n in range(COUNT)])):
            assert (entry is None) == (number not in versions)
            if entry is not None:
                np.testing.assert_array_equal(entry.activations, rows(number, versions[number]))
                np.testing.assert_array_equal(entry.token_ids, ids(number, versions[number]))
