"""Checksums, against code written from their description; and what they have to tell apart."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

import actcache
from actcache.errors import CorruptEntryError
from actcache.format import checksum
from actcache.format.safetensors import mapped
from tests.support import HIDDEN, ids, key, make_store, recipe, rows, segment_files

MASK = 2**64 - 1
PRIMES = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]


def independent(fingerprint: str, dtype: str, hidden: int, name: bytes, values: bytes, tokens: int, token_ids) -> int:
    """An entry's checksum, in Python integers."""
    seed = xxhash.xxh3_64_intdigest(f"{fingerprint} {dtype} {hidden}".encode())
    for i in range(4):
        seed ^= int.from_bytes(name[8 * i : 8 * i + 8], "little") * PRIMES[i] & MASK
    seed ^= tokens * PRIMES[4] & MASK
    if token_ids is not None:
        seed = xxhash.xxh3_64_intdigest(token_ids, seed ^ 0x5851F42D4C957F2D)
    return xxhash.xxh3_64_intdigest(values, seed)


def stored(space, numbers):
    with actcache.open(space, "r") as store, store.space(recipe()) as opened:
        located = opened._snapshot.locate(np.frombuffer(b"".join(key(n) for n in numbers), np.uint8).reshape(-1, 32))
        return located.checksums.tolist()


def test_checksums_of_a_store(tmp_path):
    make_store(tmp_path / "store", range(20))
    for number, found in zip(range(20), stored(tmp_path / "store", range(20)), strict=True):
        values, tokens = rows(number).astype("<f4"), ids(number).astype("<i4")
        arguments = (recipe().fingerprint, "float32", HIDDEN, key(number), values.tobytes(), len(values))
        assert found == independent(*arguments, tokens.tobytes())
        assert found != independent(*arguments, None)


def test_checksums_without_token_ids_and_of_extras(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(1)], [rows(1)])
        tokens = len(rows(2))
        extras = {"spans": np.ones((tokens, 2)), "word_ids": np.arange(tokens), "type_ids": np.zeros(tokens)}
        space.put([key(2)], [rows(2)], [ids(2)], **{name: [array.astype(int)] for name, array in extras.items()})
    (found,) = stored(tmp_path / "store", [1])
    assert found == independent(recipe().fingerprint, "float32", HIDDEN, key(1), rows(1).tobytes(), len(rows(1)), None)
    # The chain goes on over the optional arrays, in the order of their names.
    (digest,) = stored(tmp_path / "store", [2])
    for name in ("spans", "type_ids", "word_ids"):
        data = extras[name].astype("i1" if name == "type_ids" else "<i4").tobytes()
        digest = xxhash.xxh3_64_intdigest(data, digest)
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        located = space._snapshot.locate(np.frombuffer(key(2), np.uint8).reshape(1, 32))
        assert space._snapshot.extra_checksums(located).tolist() == [digest]


def base():
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (2, 32)).astype(np.uint8)
    return {
        "seed": checksum.space_seed("f" * 32, "float16", 4),
        "keys": keys,
        "ids": np.arange(6, dtype=np.int32),
        "values": rng.standard_normal((6, 4)).astype(np.float16),
        "lengths": np.array([2, 4]),
    }


def sums(seed, keys, ids, values, lengths):
    columns = {"values": values} if ids is None else {"token_ids": ids, "values": values}
    return checksum.entry_checksums(seed, keys, np.array([0, lengths[0]]), lengths, columns)[0].tolist()


CHANGES = {
    "swapped keys": lambda b: b | {"keys": b["keys"][::-1]},
    "swapped key words": lambda b: b | {"keys": np.roll(b["keys"], 8, axis=1)},
    "one key bit": lambda b: b | {"keys": b["keys"] ^ np.uint8(128)},
    "fingerprint": lambda b: b | {"seed": checksum.space_seed("e" * 32, "float16", 4)},
    "dtype": lambda b: b | {"seed": checksum.space_seed("f" * 32, "bfloat16", 4)},
    "hidden size": lambda b: b | {"seed": checksum.space_seed("f" * 32, "float16", 2)},
    "no token ids": lambda b: b | {"ids": None},
    "one token id": lambda b: b | {"ids": b["ids"] + np.int32(1)},
    "swapped rows": lambda b: b | {"values": b["values"][::-1]},
    "one bit of each row": lambda b: b | {"values": (b["values"].view(np.uint16) ^ 1).view(np.float16)},
    "negative zero": lambda b: b | {"values": np.where(b["values"] != 0, b["values"], -b["values"]) * np.float16(-1)},
    "zeros": lambda b: b | {"values": np.zeros_like(b["values"])},
    "lengths": lambda b: b | {"lengths": np.array([3, 3])},
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_entry_feels_every_change(change):
    before, after = sums(**base()), sums(**CHANGES[change](base()))
    assert all(one != two for one, two in zip(before, after, strict=True))


def test_a_shorter_entry_of_zeros_is_another():
    """XXH3 of zeros depends on their number, and so does the seed."""
    zeros = np.zeros((6, 4), np.float16)
    entry = {**base(), "values": zeros, "ids": None}
    digests = {sums(**entry | {"lengths": np.array([n, 1])})[0] for n in (1, 2, 3, 4, 5)}
    assert len(digests) == 5


def test_rows_of_another_key_in_the_same_file_are_refused(tmp_path):
    """Two entries of a real segment swap their keys: over the rows alone both would pass."""
    import h5py

    folder = make_store(tmp_path / "store", [0, 9, 18])  # three entries of one length
    with h5py.File(segment_files(folder)[0], "r+") as file:
        file["keys"][...] = file["keys"][...][[1, 0, 2]]
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        with pytest.raises(CorruptEntryError) as caught:
            space.get([key(0), key(9), key(18)])
        assert caught.value.keys == [key(0), key(9)]
        buffer = np.empty((9, HIDDEN), np.float32)
        assert space.get([key(18)])[0] is not None
        with pytest.raises(CorruptEntryError):
            space.read_into([key(9)], buffer)


def test_the_index_repeats_the_checksums(tmp_path):
    folder = make_store(tmp_path / "store", range(10), segments=3)
    (index,) = (folder / "index").iterdir()
    _, arrays = mapped(index)
    assert sorted(arrays["checksum"].tolist()) == sorted(stored(tmp_path / "store", range(10)))
