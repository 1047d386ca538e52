"""docs/format.md's section on LMDB, read by a program that uses lmdb, struct, NumPy and xxhash alone."""

from __future__ import annotations

import shutil
import struct
from typing import ClassVar

import lmdb
import numpy as np
import pytest
import xxhash
import zstandard

import actcache
from actcache.format import codec
from tests.support import HIDDEN, ids, key, length, put, recipe, rows

M = 2**64
P = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]


def space_checksum(fingerprint, dtype, hidden, name, tokens, token_ids, values):
    chain = xxhash.xxh3_64_intdigest(f"{fingerprint} {dtype} {hidden}".encode())
    for word, prime in zip(struct.unpack("<4Q", name), P, strict=False):
        chain ^= word * prime % M
    chain ^= tokens * P[4] % M
    if token_ids is not None:
        chain = xxhash.xxh3_64_intdigest(token_ids, chain ^ 0x5851F42D4C957F2D)
    return xxhash.xxh3_64_intdigest(values, chain)


def head_check(name, head):
    """``check`` of a head, from its key and its first 48 bytes."""
    total = 0
    for i, word in enumerate(struct.unpack("<10Q", name + head[:48])):
        mixed = word * (P[i % 5] * (2 * i + 1)) % M
        total += mixed ^ mixed >> 32
    return total % M


class Space:
    """What docs/format.md says."""

    ROW_BYTES: ClassVar = {"values": HIDDEN * 4, "token_ids": 4, "spans": 8, "word_ids": 4, "type_ids": 1}

    def __init__(self, folder):
        newest = sorted(path for path in folder.iterdir() if path.name.isdigit())[-1]
        self.env = lmdb.open(str(newest), readonly=True, max_dbs=4)
        self.heads = self.env.open_db(b"heads", dupsort=True, dupfixed=True, create=False)
        self.entries = self.env.open_db(b"entries", create=False)
        self.state_db = self.env.open_db(b"state", create=False)

    def state(self):
        with self.env.begin(db=self.state_db) as txn:
            data = txn.get(b"state")
        magic, version, *fields, check = struct.unpack("<4sI8Q", data)
        assert (magic, version) == (b"ACTL", 1)
        assert check == xxhash.xxh3_64_intdigest(data[:-8])
        names = ("sequence", "next_id", "horizon", "entries", "tokens", "nbytes", "created")
        return dict(zip(names, fields, strict=True))

    def names(self):
        with self.env.begin(db=self.heads) as txn:
            return [bytes(name) for name in txn.cursor().iternext_nodup(values=False)]

    def read(self, name):
        """Return an entry's arrays and checksum, None where it is absent."""
        with self.env.begin() as txn:
            head = txn.get(name, db=self.heads)  # of several versions the first: the newest
            if head is None:
                return None
            (age,) = struct.unpack(">Q", head[:8])
            number, page, tokens, columns, checksum, _extra, check = struct.unpack("<QQIIQQQ", head[8:])
            assert check == head_check(name, head)
            if not number:
                return None
            value = txn.get(number.to_bytes(8, "big"), db=self.entries)
        header = struct.unpack("<IIQIIQ32sQQ32x", value[:112])
        assert header[:3] == (0x45544341, 1, number)
        assert header[3:5] == (tokens, columns)
        assert header[5] == M - 1 - age
        assert header[6:8] == (name, checksum)
        arrays, at = {"page": page}, 112
        for bit, (column, row_bytes) in enumerate(self.ROW_BYTES.items()):
            if columns >> bit & 1:
                at = -(-at // 8) * 8
                arrays[column] = value[at : at + tokens * row_bytes]
                at += tokens * row_bytes
        return arrays, tokens, checksum


@pytest.fixture
def folder(tmp_path):
    with actcache.open(f"lmdb:{tmp_path}/store") as store, store.space(recipe()) as space:
        put(space, range(30))
        space.put(
            [key(50)], [rows(50)], [ids(50)], word_ids=[np.arange(length(50))], type_ids=[np.ones(length(50), int)]
        )
        space.put([key(51)], [rows(51)])
        space.flush()
        put(space, [3, 4], version=1, overwrite=True)
        space.flush()
        space.delete([key(5)])
    return tmp_path / "store" / "spaces" / recipe().fingerprint / "lmdb"


def test_an_independent_reader(folder):
    data = next(folder.glob("*/data.mdb")).read_bytes()
    space = Space(folder)
    state = space.state()
    assert set(space.names()) == {key(n) for n in [*range(30), 50, 51]}
    assert space.read(key(99)) is None
    assert space.read(key(5)) is None
    tokens_in_all = 0
    for number in [n for n in [*range(30), 50, 51] if n != 5]:
        version = 1 if number in (3, 4) else 0
        arrays, tokens, checksum = space.read(key(number))
        values = arrays["values"]
        np.testing.assert_array_equal(np.frombuffer(values, "<f4").reshape(-1, HIDDEN), rows(number, version))
        token_ids = arrays.get("token_ids")
        assert (token_ids is None) == (number == 51)
        if token_ids is not None:
            np.testing.assert_array_equal(np.frombuffer(token_ids, "<i4"), ids(number, version))
        expected = space_checksum(recipe().fingerprint, "float32", HIDDEN, key(number), tokens, token_ids, values)
        assert checksum == expected
        begin = arrays["page"] * 4096 + 128  # without LMDB: the rows are one extent of the file
        assert data[begin : begin + len(values)] == values
        tokens_in_all += tokens
    arrays, _, _ = space.read(key(50))
    np.testing.assert_array_equal(np.frombuffer(arrays["word_ids"], "<i4"), np.arange(length(50)))
    np.testing.assert_array_equal(np.frombuffer(arrays["type_ids"], "i1"), np.ones(length(50)))
    assert (state["entries"], state["tokens"], state["sequence"]) == (31, tokens_in_all, 5)
    space.env.close()


def test_a_newer_format_is_refused_by_name(folder):
    path = next(folder.glob("*/data.mdb")).parent
    with lmdb.open(str(path), max_dbs=4) as env, env.begin(write=True, db=env.open_db(b"state")) as txn:
        data = bytearray(txn.get(b"state"))
        data[4:8] = struct.pack("<I", 2)
        data[-8:] = struct.pack("<Q", xxhash.xxh3_64_intdigest(bytes(data[:-8])))
        txn.put(b"state", bytes(data))
    with pytest.raises(actcache.errors.FormatVersionError, match="version 2"):
        actcache.open(f"lmdb:{folder.parent.parent.parent}").space(recipe())


def test_a_damaged_state_is_refused(folder):
    path = next(folder.glob("*/data.mdb")).parent
    with lmdb.open(str(path), max_dbs=4) as env, env.begin(write=True, db=env.open_db(b"state")) as txn:
        data = bytearray(txn.get(b"state"))
        data[20] ^= 1
        txn.put(b"state", bytes(data))
    with pytest.raises(actcache.errors.FormatError, match="state"):
        actcache.open(f"lmdb:{folder.parent.parent.parent}").space(recipe())


def test_what_a_killed_compaction_leaves_is_passed_over(folder):
    shutil.copytree(folder / "00000001", folder / "tmp-1-abc")
    (folder / "00000002.old").mkdir()
    with actcache.open(f"lmdb:{folder.parent.parent.parent}") as store, store.space(recipe()) as space:
        assert len(space) == 31


@pytest.mark.parametrize("dtype", ["float32", "float16+zstd", "int8+zstd"])
def test_usage_counts_what_entries_take(tmp_path, dtype):
    """Rows as they are compressed, and token ids; after what replaces, deletes and rewrites them."""

    def one(number, version):
        rng = np.random.default_rng([number, version])
        return rng.standard_normal((200 + 50 * number, HIDDEN)).astype(np.float32)

    def taken(held):
        nbytes = 0
        for number, version in held.items():
            stored = codec.get(dtype).stored_rows(one(number, version))
            planes = np.ascontiguousarray(stored).view(np.uint8).reshape(-1, stored.itemsize).T
            frames = sum(len(zstandard.compress(np.ascontiguousarray(plane), 1)) for plane in planes)
            nbytes += (frames if "zstd" in dtype else stored.nbytes) + 4 * len(stored)
        return nbytes

    held = {}
    with actcache.open(f"lmdb:{tmp_path}/store", grace=0) as store, store.space(recipe(dtype=dtype)) as space:

        def puts(numbers, version):
            some = [one(n, version) for n in numbers]
            given = [np.arange(len(rows)) for rows in some]
            space.put([key(n) for n in numbers], some, given, overwrite=True)
            space.flush()
            held.update(dict.fromkeys(numbers, version))

        def check():
            found = space.usage()
            assert found.tokens == sum(len(one(*which)) for which in held.items())
            assert found.nbytes == pytest.approx(taken(held), rel=0 if dtype == "float32" else 0.02)

        puts(range(8), 0)
        check()
        puts([2, 3, 4], 1)
        check()
        space.delete([key(0), key(2)])
        del held[0], held[2]
        check()
        space.compact(waste=0.0, grace=0.0)
        check()
        space.delete([key(n) for n in held])
        held.clear()
        assert space.usage().nbytes == 0
