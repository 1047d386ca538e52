"""Rows that go to places all over a buffer, on every backend: what is read packed, put there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import CorruptEntryError, ShapeError
from tests.support import HIDDEN, ids, key, length, put, recipe, rows
from tests.support.backends import each

COUNT = 30
ORDER = np.random.default_rng(3).permutation(COUNT).tolist()
TOTAL = sum(map(length, range(COUNT)))


def check(space, dtype=np.float32, expected=rows):
    """Rows of all documents, scattered among others, and those of one of three sites."""
    targets = np.random.default_rng(5).permutation(TOTAL + 7)[:TOTAL]
    wanted = np.concatenate([expected(n) for n in ORDER])
    out = np.full((TOTAL + 7, 3, wanted.shape[1]), 9, dtype)
    given = np.full(TOTAL, -1, np.int32)
    report = space.scatter_into([key(n) for n in ORDER], out[:, 1], targets, token_ids=given)
    assert report.lengths.tolist() == [length(n) for n in ORDER]
    np.testing.assert_array_equal(out[targets, 1], wanted)
    np.testing.assert_array_equal(given, np.concatenate([ids(n) for n in ORDER]))
    out[targets, 1] = 9
    assert (out == 9).all()
    alone = np.full((TOTAL + 7, wanted.shape[1]), 9, dtype)
    space.scatter_into([key(n) for n in ORDER], alone, targets)
    np.testing.assert_array_equal(alone[targets], wanted)


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("flushed", [COUNT, 11, 0], ids=["published", "some-unpublished", "unpublished"])
def test_rows_and_token_ids(kind, tmp_path, flushed):
    with actcache.open(kind.url(tmp_path)) as store, store.space(recipe()) as space:
        put(space, range(flushed))
        space.flush()
        put(space, range(flushed, COUNT))
        check(space)
        check(space)  # what was read once is found by one call


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_other_stored_forms(tmp_path, dtype, compression):
    with actcache.open(tmp_path / "store") as store:
        space = store.space(recipe(dtype=dtype if compression is None else f"{dtype}+{compression}"))
        put(space, range(COUNT))
        space.flush()
        stored = space.read_packed([key(n) for n in range(COUNT)])
        starts = np.r_[0, np.cumsum(stored.lengths)]
        values = stored.columns["values"]
        check(space, values.dtype, lambda n: values[starts[n] : starts[n + 1]])


def test_rows_that_are_not_in_memory():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        with actcache.open(f"{folder}/store") as store, store.space(recipe()) as space:
            put(space, range(COUNT))
        for path in Path(folder).rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        for mapped in (False, True):
            with actcache.open(f"{folder}/store", "r", mapped=mapped) as store, store.space(recipe()) as space:
                check(space)


def test_what_does_not_fit_is_refused(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(3))
        count = sum(map(length, range(3)))
        out, targets = np.zeros((count, HIDDEN), np.float32), np.arange(count)
        for published in (False, True):
            for keys in ([key(0), key(1)], [key(0), key(1), key(99)], [key(0), key(1), key(2), key(2)]):
                with pytest.raises(ShapeError, match="were expected"):
                    space.scatter_into(keys, out, targets)
            with pytest.raises(IndexError):
                space.scatter_into([key(0), key(1), key(2)], out, targets + 1)
            for bad in (out.astype(np.float16), out[:, 1:], out.T):
                with pytest.raises(ShapeError, match="out must be"):
                    space.scatter_into([key(0), key(1), key(2)], bad, targets)
            with pytest.raises(ShapeError, match="token_ids"):
                space.scatter_into([key(0)], out, targets, token_ids=np.zeros(2, np.int32))
            if not published:
                space.flush()


def test_corrupt_entries_are_named_and_entries_without_ids_are_read(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(n) for n in range(COUNT)], [rows(n) for n in range(COUNT)])
    (path,) = (tmp_path / "store").glob("spaces/*/segments/*")
    data = bytearray(path.read_bytes())
    data[data.index(rows(8).tobytes())] ^= 1
    path.write_bytes(data)
    targets = np.random.default_rng(5).permutation(TOTAL)
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        for _ in range(2):
            out = np.zeros((TOTAL, HIDDEN), np.float32)
            with pytest.raises(CorruptEntryError) as caught:
                space.scatter_into([key(n) for n in range(COUNT)], out, targets)
            assert caught.value.keys == [key(8)]
            good = np.repeat(np.arange(COUNT), [length(n) for n in range(COUNT)]) != 8
            np.testing.assert_array_equal(out[targets][good], np.concatenate([rows(n) for n in range(COUNT)])[good])
        with pytest.raises(ShapeError, match="without token ids"):
            space.scatter_into([key(0)], out, targets[: length(0)], token_ids=np.zeros(length(0), np.int32))
