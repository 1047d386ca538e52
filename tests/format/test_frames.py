"""Frames of zstd: bit for bit what went in, whatever the bits, and no memory by what a stranger's frame says."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.format import frames
from actcache.format.ragged import PAYLOAD, VALUES, Block, offsets_of
from actcache.io import loops, numpy_loops

DTYPES = ["<f2", "<f4", "<u2", "|u1"]


def block_of(rows, lengths):
    keys = np.arange(32 * len(lengths), dtype=np.uint8).reshape(-1, 32)
    return Block(keys, offsets_of(np.array(lengths)), np.zeros(len(lengths), np.uint64), {VALUES: rows})


def decoded(block, rows, sizes=None, payload=None, compiled=True):
    """Return what comes out of the frames of a block, and the positions of what is not intact."""
    payload = block.columns[PAYLOAD] if payload is None else payload
    sizes = np.diff(block.payload_offsets) if sizes is None else sizes
    out, lengths = np.full(rows.shape, 7, rows.dtype), np.diff(block.offsets)
    begins = block.payload_offsets[:-1]
    column = loops.Column(rows.strides[0], out, payload, begins, None, None, sizes, rows.itemsize)
    if compiled:
        return out, loops.gather([column], lengths, block.offsets).tolist()
    state = np.zeros(len(lengths), np.uint8)
    numpy_loops.gather([column], lengths, block.offsets[:-1], block.offsets[1:], None, False, state)
    return out, np.flatnonzero(state).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_every_bit_pattern_comes_back(dtype, data):
    """NaN with any payload, infinities, subnormals, both zeros."""
    kind = np.dtype(dtype)
    bits = hnp.arrays(f"u{kind.itemsize}", st.tuples(st.integers(1, 40), st.integers(1, 20)))
    rows = data.draw(bits).view(kind)
    cut = data.draw(st.integers(0, len(rows) - 1))
    block = frames.compressed(block_of(rows, [cut, len(rows) - cut] if cut else [len(rows)]))
    for compiled in (True, False):
        out, bad = decoded(block, rows, compiled=compiled)
        assert (out.tobytes(), bad) == (rows.tobytes(), [])


def test_all_half_precision_patterns():
    rows = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(64, -1)
    block = frames.compressed(block_of(rows, [1, 40, 23]))
    assert decoded(block, rows)[0].tobytes() == rows.tobytes()


def test_others_read_them():
    rows = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float16)
    block = frames.compressed(block_of(rows, [20, 30]))
    left, planes = block.columns[PAYLOAD][: block.payload_offsets[1]].tobytes(), []
    while left:
        decoder = zstandard.ZstdDecompressor().decompressobj()
        planes.append(np.frombuffer(decoder.decompress(left), np.uint8))
        left = decoder.unused_data
    assert np.stack(planes, axis=1).tobytes() == rows[:20].tobytes()


def test_numbers_take_fewer_bytes():
    rows = np.random.default_rng(0).standard_normal((2000, 384)).astype(np.float32)
    for stored, least in ((rows.astype(np.float16), 1.1), ((rows.view(np.uint32) >> 16).astype("<u2"), 1.35)):
        block = frames.compressed(block_of(stored, [500, 1500]))
        assert stored.nbytes > least * block.columns[PAYLOAD].nbytes


def foreign(plane, **options):
    return np.frombuffer(zstandard.ZstdCompressor(**options).compress(plane), np.uint8)


GOOD = np.random.default_rng(1).integers(0, 9, (16, 24)).astype(np.uint8)
DAMAGES = {
    "truncated": lambda frame: frame[:-3],
    "empty": lambda frame: frame[:0],
    "followed by more": lambda frame: np.concatenate([frame, frame[:1]]),
    "a second frame": lambda frame: np.concatenate([frame, frame]),
    "of a shorter entry": lambda frame: foreign(GOOD[1:].tobytes()),
    "expanding": lambda frame: foreign(bytes(1 << 24)),
    "without its size": lambda frame: foreign(GOOD.tobytes(), write_content_size=False),
    "of a dictionary": lambda frame: np.frombuffer(
        zstandard.ZstdCompressor(
            dict_data=zstandard.ZstdCompressionDict(GOOD.tobytes() * 4), write_dict_id=False
        ).compress(GOOD.tobytes()),
        np.uint8,
    ),
    "noise": lambda frame: np.random.default_rng(0).integers(0, 256, len(frame)).astype(np.uint8),
    "one that lies about its size": lambda frame: lying(frame),
}


def lying(frame):
    """A frame of 16 MiB of zeros whose header says that it has as many bytes as the entry."""
    body = bytearray(foreign(bytes(1 << 24)).tobytes())
    parameters = zstandard.get_frame_parameters(bytes(body))
    at = zstandard.frame_header_size(bytes(body)) - 4
    assert parameters.content_size == int.from_bytes(body[at : at + 4], "little") == 1 << 24
    body[at : at + 4] = GOOD.nbytes.to_bytes(4, "little")
    return np.frombuffer(bytes(body), np.uint8)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_no_frame_of_the_entry_is_corrupt(damage, compiled):
    block = frames.compressed(block_of(np.concatenate([GOOD, GOOD]), [16, 16]))
    first = block.columns[PAYLOAD][: block.payload_offsets[1]]
    bad = DAMAGES[damage](first)
    payload = np.concatenate([bad, block.columns[PAYLOAD][block.payload_offsets[1] :]])
    sizes = np.array([len(bad), np.diff(block.payload_offsets)[1]])
    moved = Block(block.keys, block.offsets, block.checksums, block.columns, None, None, offsets_of(sizes))
    out, corrupt = decoded(moved, np.concatenate([GOOD, GOOD]), sizes, payload, compiled)
    right = corrupt == [] and out[:16].tobytes() == GOOD.tobytes()  # a dictionary of which nothing was used
    assert corrupt == [0] or (damage == "of a dictionary" and right)
    np.testing.assert_array_equal(out[16:], GOOD)


@pytest.mark.parametrize("compiled", [True, False])
def test_sizes_beyond_the_payload_are_outside(compiled):
    block = frames.compressed(block_of(GOOD, [16]))
    for size in (len(block.columns[PAYLOAD]) + 1, 1 << 40, -1, 0):
        assert decoded(block, GOOD, np.array([size]), compiled=compiled)[1] == [0]
