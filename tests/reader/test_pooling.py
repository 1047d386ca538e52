"""One row a document, against the documents' own rows."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from actcache.errors import CorruptEntryError, MissingEntryError, ShapeError, UsageError
from actcache.reader import pooling
from tests.support import HIDDEN, key, length, put, recipe, rows
from tests.support.backends import each

COUNT = 30
KEYS = [key(n) for n in range(COUNT)]
POSITIONS = [n % length(n) for n in range(COUNT)]
WAYS = {
    "last": (lambda n: rows(n)[-1]),
    "mean": (lambda n: rows(n).mean(axis=0)),
    "max": (lambda n: rows(n).max(axis=0)),
    0: (lambda n: rows(n)[0]),
    -1: (lambda n: rows(n)[-1]),
}


@each(everyday=["hdf5", "lmdb"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float16+zstd"])
def test_each_document_gives_one_row(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(pooling, "_PORTION_BYTES", 300)
    with actcache.open(kind.url(tmp_path)) as store, store.space(recipe(dtype=dtype)) as space:
        for first in range(0, COUNT, 10):
            put(space, range(first, first + 10))
            space.flush()
        put(space, [COUNT])  # not flushed
        shuffled = np.random.default_rng(0).permutation(COUNT + 1).tolist()
        for how, wanted in WAYS.items():
            found = space.pooled([key(n) for n in shuffled], how)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, np.stack([wanted(n) for n in shuffled]), rtol=1e-6)
        at = space.pooled(KEYS, POSITIONS)
        np.testing.assert_array_equal(at, np.stack([rows(n)[p] for n, p in enumerate(POSITIONS)]))
        out = np.empty((COUNT, HIDDEN), np.float32)
        assert space.pooled(KEYS, "max", out=out) is out
        every = space.pooled()
        np.testing.assert_array_equal(every, space.pooled(space.key_array()))
        assert space.pooled([]).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3", "int8+zstd"])
def test_codes_are_decoded_first(dtype, tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe(dtype=dtype)) as space:
        put(space, range(COUNT))
        space.flush()
        given = [entry.activations for entry in space.get(KEYS)]
        for how, wanted in (("mean", lambda one: one.mean(axis=0)), ("max", lambda one: one.max(axis=0))):
            np.testing.assert_allclose(space.pooled(KEYS, how), np.stack([wanted(one) for one in given]), rtol=1e-6)
        np.testing.assert_array_equal(space.pooled(KEYS, "last"), np.stack([one[-1] for one in given]))
        with pytest.raises(UsageError, match="use pooled"):
            space.pool_into(KEYS, np.empty((COUNT, HIDDEN), np.float32), "mean", 0)


@pytest.mark.parametrize("mapped", [True, False])
def test_rows_are_pooled_where_they_lie(mapped, tmp_path):
    """In one call where all is in memory, in another where it is not; buffers that do not fit are refused by both."""
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
    total = sum(map(length, range(COUNT)))
    wanted = np.stack([rows(n).max(axis=0) for n in range(COUNT)])
    with actcache.open(tmp_path, "r", mapped=mapped) as store, store.space(recipe()) as space:
        for _ in range(2):
            out = np.full((COUNT, HIDDEN), 9, np.float32)
            assert space.pool_into(KEYS, out, "max", total).found.all()
            np.testing.assert_array_equal(out, wanted)
            absent = space.pool_into([key(999), *KEYS[1:]], out, "max", total - length(0))
            assert absent.found.tolist() == [False, *[True] * (COUNT - 1)]
            np.testing.assert_array_equal(out, wanted)  # the row of what is absent is left alone
            for bad in (out[1:], out.astype(np.float16), out.T):
                with pytest.raises(ShapeError, match="out must be"):
                    space.pool_into(KEYS, bad, "max", total)
            with pytest.raises(ShapeError, match="were expected"):
                space.pool_into(KEYS, out, "max", total - 1)
            with pytest.raises(IndexError):
                space.pool_into(KEYS, out, "at", total, at=np.array([length(n) for n in range(COUNT)]))


def test_what_does_not_fit_is_refused(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        for how, error, said in (
            ("median", UsageError, "how is 'last' or 'mean' or 'max'"),
            (9, UsageError, "document 0 has 1 tokens, and none at position 9"),
            (-2, UsageError, "none at position -2"),
            ([1, 2], ShapeError, "30 documents and 2 positions"),
            (0.5, UsageError, "positions"),
        ):
            with pytest.raises(error, match=said):
                space.pooled(KEYS, how)
        for out in (np.empty((COUNT, HIDDEN)), np.empty((3, HIDDEN), np.float32), [1]):
            with pytest.raises(ShapeError, match="out must be"):
                space.pooled(KEYS, out=out)
        with pytest.raises(MissingEntryError):
            space.pooled([key(1000)])


def test_a_flipped_byte_is_never_pooled(tmp_path):
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
    (segment,) = tmp_path.glob("spaces/*/segments/*")
    data = bytearray(segment.read_bytes())
    data[data.index(rows(5).tobytes())] ^= 1  # not in its last row
    segment.write_bytes(data)
    with actcache.open(tmp_path) as store, store.space(recipe()) as space:
        with pytest.raises(CorruptEntryError) as caught:
            space.pooled(KEYS, "last")
        assert caught.value.keys == [key(5)]
