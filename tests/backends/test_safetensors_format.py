"""Safetensors segments, read back by the safetensors library; and headers that no segment has."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import actcache
from actcache.backend import Block
from actcache.errors import FormatError
from actcache.format.ragged import Origins
from actcache.segments.places.local_place import LocalSegment
from actcache_s3 import backend
from tests.support import HIDDEN, check, key, put, recipe, segment_files

HEADER = 8


def block(lengths=(3, 1, 4), dtype=np.float32, hidden=HIDDEN, extras=False, origins=None):
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    tokens, count = int(offsets[-1]), len(lengths)
    rng = np.random.default_rng(tokens)
    columns = {
        "values": rng.integers(0, 50, (tokens, hidden)).astype(dtype),
        "token_ids": np.arange(tokens, dtype=np.int32),
    }
    if extras:
        columns |= {
            "spans": rng.integers(0, 9, (tokens, 2)).astype(np.int32),
            "word_ids": np.arange(tokens, dtype=np.int32),
            "type_ids": np.ones(tokens, np.int8),
        }
    return Block(
        rng.integers(0, 256, (count, 32)).astype(np.uint8),
        offsets,
        np.arange(count, dtype=np.uint64),
        columns,
        np.arange(count, dtype=np.uint64) if extras else None,
        origins,
    )


ORIGINS = Origins(
    ("000000000001-" + "a" * 16, "000000000002-" + "b" * 16),
    np.array([0, 1, 1], np.uint32),
    np.array([5, 0, 7], np.uint32),
    ("000000000002-" + "b" * 16,),
)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint16, np.int8, np.uint8])
@pytest.mark.parametrize("hidden", [1, 3, 8, 768])
@pytest.mark.parametrize(("extras", "origins"), [(False, None), (True, None), (True, ORIGINS)])
def test_any_reader_opens_it(tmp_path, dtype, hidden, extras, origins):
    path = tmp_path / "segment.safetensors"
    written = block(dtype=dtype, hidden=hidden, extras=extras, origins=origins)
    backend.write(path, written, {"space": "x", "segment": "y"})
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"space": "x", "segment": "y"}
    found = safetensors.numpy.load_file(path)
    assert found.keys() == written.arrays().keys()
    for name, array in written.arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    layout = backend.layout(LocalSegment(path))
    assert layout.metadata == {"space": "x", "segment": "y"}
    data = path.read_bytes()
    for name, extent in layout.extents.items():
        got = np.frombuffer(data[extent.offset : extent.offset + extent.nbytes], extent.dtype).reshape(extent.shape)
        np.testing.assert_array_equal(got, found[name])
    assert layout.extents["values"].offset % 4096 == 0
    for name in ("token_ids", "word_ids", "spans", "type_ids"):  # gathered from a mapping, too
        if name in layout.extents:
            assert layout.extents[name].offset % np.gcd(4096, layout.extents[name].row_bytes) == 0
    behind = {n for n, extent in layout.extents.items() if extent.offset > layout.extents["values"].offset}
    assert behind <= {"type_ids", "origins", "sources"}


def test_odd_blocks_are_gathered_from_a_mapping(tmp_path):
    for hidden in (1, 3, 5):
        here = recipe(hidden_size=hidden, dtype="float16")
        values = {n: np.full((n % 5 + 1, hidden), n, np.float16) for n in range(30)}
        with actcache.open(f"safetensors:{tmp_path}/store", mapped=True) as store, store.space(here) as space:
            space.put([key(n) for n in values], list(values.values()), [np.arange(len(v)) for v in values.values()])
            space.flush()
            for n, entry in enumerate(space.get([key(n) for n in values])):
                np.testing.assert_array_equal(entry.activations, values[n])
                np.testing.assert_array_equal(entry.token_ids, np.arange(len(values[n])))


def test_bfloat16_is_stored_as_its_bits(tmp_path):
    with actcache.open(f"safetensors:{tmp_path}/s") as store, store.space(recipe(dtype="bfloat16")) as space:
        put(space, range(5))
        space.flush()
    (path,) = segment_files(tmp_path / "s" / "spaces" / recipe(dtype="bfloat16").fingerprint)
    assert safetensors.numpy.load_file(path)["values"].dtype == np.uint16


# --- headers that lie ------------------------------------------------------------------------------------------------


def craft(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        craft({}, length=2**63),
        craft({}, length=1 << 40),
        craft({}, length=0),
        craft(b"[" * 100_000),
        craft(b'{"a":' * 50_000),
        craft(b"{}" + b" " * (2 << 20)),
        craft(b"\xff\xfe"),
        craft(b"[]"),
        craft(b"null"),
        craft({"values": ENTRY}, bytes(7)),
        craft({"values": ENTRY}, bytes(9)),
        craft({"values": {**ENTRY, "shape": [2**70]}}, bytes(8)),
        craft({"values": {**ENTRY, "shape": [-2]}}, bytes(8)),
        craft({"values": {**ENTRY, "shape": [2.0]}}, bytes(8)),
        craft({"values": {**ENTRY, "shape": [True]}}, bytes(8)),
        craft({"values": {**ENTRY, "shape": "22"}}, bytes(8)),
        craft({"values": {**ENTRY, "dtype": "F8"}}, bytes(8)),
        craft({"values": {**ENTRY, "dtype": ["F32"]}}, bytes(8)),
        craft({"values": {**ENTRY, "data_offsets": [0]}}, bytes(8)),
        craft({"values": {**ENTRY, "data_offsets": [0, 2**80]}}, bytes(8)),
        craft({"values": {**ENTRY, "data_offsets": [-8, 0]}}, bytes(8)),
        craft({"a": ENTRY, "b": ENTRY}, bytes(8)),
        craft({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, bytes(24)),
        craft(b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}", bytes(8)),
        craft({"__metadata__": {"a": 1}, "values": ENTRY}, bytes(8)),
        craft({"__metadata__": [], "values": ENTRY}, bytes(8)),
        craft({"values": {**ENTRY, "shape": [10**400]}}, bytes(8)),
        craft(b'{"values":{"dtype":"F32","shape":[' + b"9" * 9000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        craft({"values": {**ENTRY, "shape": [2] + [1] * 1000}}, bytes(8))[:-1],
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data):
    path = tmp_path / "segment.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError):
        backend.layout(LocalSegment(path))


def test_a_folder_and_a_missing_file_are_told(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(FormatError):
        backend.layout(LocalSegment(tmp_path / "folder.safetensors"))
    with pytest.raises(FileNotFoundError):
        backend.layout(LocalSegment(tmp_path / "absent.safetensors"))


def test_random_damage_is_refused_or_harmless(tmp_path):
    """Flipped and lost bytes of headers: a layout that stays inside of the file, or a FormatError."""
    path = tmp_path / "segment.safetensors"
    backend.write(path, block(extras=True, origins=ORIGINS), {"space": "x"})
    whole = path.read_bytes()
    for seed in range(1500):
        rng = random.Random(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            data[rng.randrange(HEADER + len(json.dumps({})) + 1200)] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            layout = backend.layout(LocalSegment(path))
        except FormatError:
            continue
        for extent in layout.extents.values():
            assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(data), seed


def test_a_damaged_segment_is_left_out(tmp_path):
    url = f"safetensors:{tmp_path}/store"
    with actcache.open(url) as store, store.space(recipe()) as space:
        for part in range(3):
            put(space, range(part * 5, part * 5 + 5))
            space.flush()
    folder = tmp_path / "store" / "spaces" / recipe().fingerprint
    path = segment_files(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    for index in (folder / "index").iterdir():
        index.unlink()
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        held = {n: 0 for n in range(15) if not 5 <= n < 10}
        check(space, held, range(15))
        assert len(space) == 10
