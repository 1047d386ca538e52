"""Statistics kept with a space, against a look at all of its rows."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache
from actcache.errors import CorruptEntryError
from actcache.format import codec
from actcache.format.moments import Moments
from actcache.io import loops
from actcache.store import statistics
from tests.support import HIDDEN, PYTHONPATH, ROOT, compact, key, put, recipe, rows
from tests.support.backends import each


def agree(found, wanted):
    """Within 1e-6 of what a full scan in double precision gives."""
    wanted = np.asarray(wanted, np.float64)
    assert found.count == len(wanted)
    if not len(wanted):
        return
    scale = wanted.std(axis=0) + 1e-30
    assert (np.abs(found.mean - wanted.mean(axis=0)) / scale).max() < 1e-6
    np.testing.assert_allclose(found.variance, wanted.var(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.mean_norm, np.linalg.norm(wanted, axis=1).mean(), rtol=1e-6)
    np.testing.assert_array_equal(found.maximum, wanted.max(axis=0))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
@pytest.mark.parametrize("dtype", codec.names())
def test_moments_are_those_of_double_precision(dtype, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(loops, "_library", None)
    rng = np.random.default_rng(0)
    for hidden in (1, 7, 64, 129):
        spread = rng.uniform(0.1, 5, hidden)
        values = (rng.standard_normal((3000, hidden)) * spread + rng.uniform(-30, 30, hidden)).astype(np.float32)
        stored = codec.get(dtype).stored_rows(values)
        wanted = codec.get(dtype).decode(stored)
        agree(Moments.of(stored, dtype, hidden), wanted)
        parts = [Moments.of(stored[a:b], dtype, hidden) for a, b in ((0, 1), (1, 1), (1, 900), (900, 3000))]
        agree(Moments.joined(parts, hidden), wanted)


@pytest.fixture(params=[True, False], ids=["kept", "small"])
def worth(request, monkeypatch):
    """Whether parts of a few rows are worth a file."""
    if request.param:
        monkeypatch.setattr(statistics, "_WORTH_BYTES", 1)
    monkeypatch.setattr(statistics, "PART_BYTES", 300)
    return request.param


def of(space, held):
    found = [entry.activations for entry in space.get([key(n) for n in held])]
    return np.concatenate(found) if found else np.empty((0, HIDDEN))


@each()
def test_they_stay_right_after_deletion_replacement_and_compaction(kind, tmp_path, worth, monkeypatch):
    scanned = []
    scan = actcache.Space._scan
    monkeypatch.setattr(
        actcache.Space, "_scan", lambda self, view, keys: scanned.append(len(keys)) or scan(self, view, keys)
    )
    with actcache.open(kind.url(tmp_path)) as store:
        with store.space(recipe()) as space:
            agree(space.statistics(), np.empty((0, HIDDEN)))
            for first in range(0, 40, 10):
                put(space, range(first, first + 10))
                space.flush()
            agree(space.statistics(), of(space, range(40)))
            assert not scanned  # made while filling
            put(space, range(40, 45))
            agree(space.statistics(), of(space, range(45)))
            assert not scanned
            space.delete([key(3), key(41)])
            held = [n for n in range(45) if n not in (3, 41)]
            agree(space.statistics(), of(space, held))
            assert sum(scanned) == 13  # the entries that lay beside those
            put(space, [7, 20], version=1, overwrite=True)
            agree(space.statistics(), of(space, held))
            compact(space)
            scanned.clear()
            agree(space.statistics(), of(space, held))
            assert not scanned
        with store.space(recipe()) as space:
            agree(space.statistics(), of(space, held))
            assert bool(scanned) != worth
            space.delete([key(n) for n in range(45)])
            agree(space.statistics(), np.empty((0, HIDDEN)))


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "float16+zstd", "int8+zstd"])
def test_of_rows_as_they_are_read(tmp_path, worth, monkeypatch, dtype):
    """Of codes and of what is compressed: the statistics are of the numbers that come out."""
    rng = np.random.default_rng(1)
    with actcache.open(tmp_path) as store:
        with store.space(recipe(dtype=dtype)) as space:
            for first in range(0, 30, 10):
                given = [rng.standard_normal((n % 7 + 1, HIDDEN)) * 5 - 20 for n in range(first, first + 10)]
                space.put([key(n) for n in range(first, first + 10)], given)
                space.flush()
            agree(space.statistics(), of(space, range(30)))
            space.delete([key(3)])
            held = [n for n in range(30) if n != 3]
            agree(space.statistics(), of(space, held))
            compact(space)
            agree(space.statistics(), of(space, held))
        with store.space(recipe(dtype=dtype)) as space:
            agree(space.statistics(), of(space, held))


WRITER = """
import sys
import numpy as np
import actcache
from actcache.store import statistics
from tests.support import key, put, recipe

statistics._WORTH_BYTES, statistics._MOST_FILES = 1, 2
rng = np.random.default_rng(int(sys.argv[2]))
with actcache.open(sys.argv[1]) as store:
    while True:
        with store.space(recipe(), segment_bytes=300) as space:
            put(space, rng.permutation(60)[:9].tolist(), version=int(rng.integers(5)), overwrite=True)
            space.flush()
            space.delete([key(int(rng.integers(60)))])
            space.statistics()
            print("wrote", flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.long)])
def test_killed_writers_leave_no_wrong_number(tmp_path, kills):
    rng = np.random.default_rng(4)
    for number in range(kills):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(number)]
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=ROOT) as writer:
            for _ in range(int(rng.integers(1, 6))):
                assert writer.stdout.readline() == b"wrote\n"
            time.sleep(rng.random() * 0.02)
            writer.kill()
        with actcache.open(tmp_path) as store, store.space(recipe()) as space:
            keys = space.key_array()
            agree(space.statistics(), space.read_packed(keys).columns["values"])


def files(folder):
    return sorted(folder.glob("spaces/*/statistics/*"))


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "foreign", "other"])
def test_what_is_damaged_costs_a_scan_and_never_a_wrong_number(tmp_path, monkeypatch, harm):
    monkeypatch.setattr(statistics, "_WORTH_BYTES", 1)
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(20))
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    harmed = {"truncate": [data[:-9], data[:40], b""], "foreign": [b"x" * 300, b"{}"], "remove": [None]}.get(harm)
    if harm == "flip":
        harmed = [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(0, len(data), 29)]
    if harm == "other":  # of another space of the same shape
        with actcache.open(tmp_path / "2") as store, store.space(recipe()) as space:
            put(space, range(20), version=1)
        harmed = [files(tmp_path / "2")[0].read_bytes()]
    with actcache.open(tmp_path, "r") as store, store.space(recipe()) as space:
        wanted = of(space, range(20))
    for damaged in harmed:
        file.unlink(missing_ok=True)
        if damaged is not None:
            file.write_bytes(damaged)
        with actcache.open(tmp_path, "r") as store, store.space(recipe()) as space:
            agree(space.statistics(), wanted)


def test_files_do_not_grow_in_number(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_WORTH_BYTES", 1)
    with actcache.open(tmp_path) as store:
        for number in range(20):
            with store.space(recipe()) as space:
                put(space, [number])
                space.flush()
                put(space, [0], version=number, overwrite=True)
                agree(space.statistics(), of(space, range(number + 1)))
    assert len(files(tmp_path)) <= 2 * statistics._MOST_FILES


def test_another_process_sees_what_was_published(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_WORTH_BYTES", 1)
    with (
        actcache.open(tmp_path) as one,
        actcache.open(tmp_path) as two,
        one.space(recipe()) as writer,
        two.space(recipe()) as reader,
    ):
        put(writer, range(5))
        writer.flush()
        reader.refresh()
        agree(reader.statistics(), of(writer, range(5)))
        put(writer, range(5, 9))
        writer.flush()
        agree(reader.statistics(), of(writer, range(5)))
        reader.refresh()
        agree(reader.statistics(), of(writer, range(9)))


def test_a_corrupt_entry_is_named_not_counted(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(9))
    (segment,) = tmp_path.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    data[data.index(rows(5).tobytes())] ^= 1
    segment.write_bytes(data)
    with actcache.open(tmp_path) as store, store.space(recipe()) as space, pytest.raises(CorruptEntryError) as caught:
        space.statistics()
    assert caught.value.keys == [key(5)]


@given(st.lists(st.sampled_from(range(8)), max_size=30))
def test_whatever_parts_claim_no_entry_counts_twice(numbers):
    rng = np.random.default_rng(len(numbers))
    parts = [
        statistics.Part(np.array(sorted({int(n), *rng.integers(0, 12, 2).tolist()}), np.uint64), Moments.none(1))
        for n in numbers
    ]
    valid, left = statistics._claim(parts, np.arange(10, dtype=np.uint64)[::-1].copy())
    claimed = [int(one) for part in valid for one in part.checksums]
    assert len(set(claimed)) == len(claimed)
    assert sorted(claimed) == sorted(set(range(10)) - set((9 - np.flatnonzero(left)).tolist()))
