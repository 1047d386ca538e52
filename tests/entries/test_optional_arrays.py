"""Spans, word ids and type ids come with an entry, and cost a batch a fixed number of reads, not one an entry."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from actcache.backend import EXTRAS
from actcache.errors import CorruptEntryError
from actcache.segments.segment import Segment
from actcache.segments.snapshot import SegmentedSnapshot
from tests.support import ids, key, length, recipe, rows
from tests.support.backends import each

COUNT = 60


def optional(name, number):
    dtype, trailing = EXTRAS[name]
    array = np.arange(length(number) * int(np.prod(trailing, dtype=int))).reshape(-1, *trailing)
    return (array % 50 + number * (1 if name == "type_ids" else 1000)).astype(dtype)


def put(space, numbers, names, *, with_ids=True):
    extras = {name: [optional(name, n) for n in numbers] for name in names}
    given = [ids(n) for n in numbers] if with_ids else None
    space.put([key(n) for n in numbers], [rows(n) for n in numbers], given, **extras)


def check(space, names_of):
    """Every entry has just what it was put with, whatever stands beside it in the batch."""
    order = np.random.default_rng(2).permutation(COUNT + 5).tolist()
    for number, entry in zip(order, space.get([key(n) for n in order]), strict=True):
        if number not in names_of:
            assert entry is None
            continue
        names, with_ids = names_of[number]
        np.testing.assert_array_equal(entry.activations, rows(number))
        assert entry.extras.keys() == set(names)
        for name in names:
            np.testing.assert_array_equal(entry.extras[name], optional(name, number))
        assert (entry.token_ids is not None) == with_ids
        if with_ids:
            np.testing.assert_array_equal(entry.token_ids, ids(number))


KINDS = [(("spans",), True), ((), True), (("spans", "word_ids", "type_ids"), False), (("type_ids",), True)]


@each()
def test_kinds_in_any_order(kind, tmp_path):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        names_of = {number: KINDS[number % 4] for number in range(COUNT)}
        for rest, (names, with_ids) in enumerate(KINDS):
            put(space, range(rest, COUNT // 2, 4), names, with_ids=with_ids)
        space.flush()
        for rest, (names, with_ids) in enumerate(KINDS):  # these are not published yet
            put(space, [n for n in range(COUNT // 2, COUNT) if n % 4 == rest], names, with_ids=with_ids)
        check(space, names_of)
        assert space.verify().intact
        space.flush()
        check(space, names_of)
        found = space.verify()
        assert found.intact
        assert found.entries == COUNT


@pytest.fixture
def counted(monkeypatch):
    """How many gathers there were, and how often a segment's checksums of optional arrays were read."""
    calls = {"gather": 0, "extra_checksums": 0}
    gather, read = SegmentedSnapshot.gather, Segment.read

    def gathering(*given):
        calls["gather"] += 1
        return gather(*given)

    def reading(segment, array):
        calls["extra_checksums"] += array == "extra_checksums"
        return read(segment, array)

    monkeypatch.setattr(SegmentedSnapshot, "gather", gathering)
    monkeypatch.setattr(Segment, "read", reading)
    return calls


@pytest.mark.parametrize("backend", ["hdf5", "zarr"])
def test_reads_are_counted_by_kind_not_by_entry(backend, counted, tmp_path):
    with actcache.open(f"{backend}:{tmp_path / 'store'}") as store, store.space(recipe()) as space:
        for names, numbers in (((), range(0, COUNT, 2)), (("spans", "word_ids"), range(1, COUNT, 2))):
            put(space, numbers, names)
            space.flush()
        kinds = segments = 2
        for read in (lambda: space.get([key(n) for n in range(COUNT)]), space.verify):
            counted.update(gather=0, extra_checksums=0)
            read()
            assert 0 < counted["gather"] <= 2 * kinds  # small arrays, then rows
            assert counted["extra_checksums"] <= segments
        counted.update(gather=0, extra_checksums=0)
        for _ in range(3):
            space.get([key(1), key(3)])
        assert counted["extra_checksums"] <= 1  # of a segment, however many batches


@each()
def test_a_get_without_checks_gives_them_too(kind, tmp_path):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        put(space, range(3), ("spans",))
        space.flush()
        for number, entry in enumerate(space.get([key(n) for n in range(3)], verify=False)):
            np.testing.assert_array_equal(entry.extras["spans"], optional("spans", number))


def test_damage_of_an_optional_array_is_its_entries_alone(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT), ("spans",))
        space.flush()
    (path,) = (tmp_path / "store").glob("spaces/*/segments/*")
    data = bytearray(path.read_bytes())
    data[data.index(optional("spans", 40).tobytes())] ^= 1
    path.write_bytes(data)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        with pytest.raises(CorruptEntryError) as caught:
            space.get([key(n) for n in range(COUNT)])
        assert caught.value.keys == [key(40)]
        assert space.verify().corrupt == [key(40)]
        assert len(space.get([key(n) for n in range(40)])) == 40
