"""Codecs against torch's casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from actcache.errors import CodecOverflowError, NonFiniteError, RecipeError
from actcache.format import codec
from actcache.format.arguments import to_numpy
from actcache.format.codecs import floats

_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def _hex(words):
    return np.array([int(word, 16) for word in words.split()], np.uint32)


#: Bit patterns of float32 where roundings go wrong: subnormals, ties, both sides of each overflow, zeros.
_EDGES = _hex(
    "00000000 00000001 00000002 007fffff 00800000 3f7f8000 3f808000 3f818000 3f808001 7f7f7fff 7f7f8000 7f7fffff "
    "477fe000 477fefff 477ff000 33000000 33000001 33800000 387fc000 387fe000 38800000"
)
_BITS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([*_EDGES.tolist(), *(_EDGES | 2**31).tolist()]))


def encoded(name, rows):
    stored = np.empty(rows.shape, codec.get(name).stored)
    codec.get(name).encode(rows, stored)
    return stored


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@given(bits=st.lists(_BITS, min_size=1, max_size=30))
def test_any_float32_is_torchs_cast_or_refused(name, bits):
    rows = np.array(bits, np.uint32).view(np.float32).reshape(1, -1)
    cast = torch.from_numpy(rows).to(_TORCH[name])
    if not torch.isfinite(cast).all():
        expected = NonFiniteError if not np.isfinite(rows).all() else CodecOverflowError
        with pytest.raises(expected):
            encoded(name, rows)
        return
    stored = encoded(name, rows)
    assert stored.tobytes() == cast.view(torch.int16 if name != "float32" else torch.int32).numpy().tobytes()
    delivered = codec.get(name).decode(stored)
    assert delivered.dtype == codec.get(name).delivered
    np.testing.assert_array_equal(delivered.astype(np.float32), cast.float().numpy())


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
@given(rows=hnp.arrays(np.float64, (2, 3), elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_float64_input(name, rows):
    """The largest float64s overflow everything; no warning, no infinity, is to come of it."""
    try:
        stored = encoded(name, rows)
    except CodecOverflowError:
        with np.errstate(over="ignore"):
            assert not np.isfinite(torch.from_numpy(rows.astype(np.float32)).to(_TORCH[name]).float().numpy()).all()
    except NonFiniteError:
        assert not np.isfinite(rows).all()
    else:
        assert np.isfinite(codec.get(name).decode(stored)).all()
        np.testing.assert_allclose(codec.get(name).decode(stored), rows, rtol=2**-8, atol=2**-25)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_all_sixteen_bit_floats_come_back(name):
    """Every finite float16 and bfloat16 that the codec can hold is stored exactly."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    brains = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    for values in (halves, brains):
        exact = torch.from_numpy(values).to(_TORCH[name]).float().numpy()
        values = values[np.isfinite(values) & (exact == values)].reshape(-1, 1)
        assert len(values) > 8_000
        np.testing.assert_array_equal(codec.get(name).decode(encoded(name, values)), values)


@pytest.mark.parametrize(
    ("name", "largest", "smallest_lost"),
    [
        ("float16", 65519.99, 65520.0),  # halfway between the largest float16 and what would follow it
        ("bfloat16", float(np.uint32(0x7F7F7FFF).view(np.float32)), float(np.uint32(0x7F7F8000).view(np.float32))),
        ("float32", float(np.finfo(np.float32).max), 3.5e38),
    ],
)
def test_the_edge_of_overflow(name, largest, smallest_lost):
    rows = np.zeros((3, 4))
    rows[1, 2] = largest
    assert np.isfinite(codec.get(name).decode(encoded(name, rows))).all()
    for sign in (1, -1):
        rows[1, 2] = sign * smallest_lost
        with pytest.raises(CodecOverflowError, match=r"the document holds .* at token 1, column 2"):
            encoded(name, rows)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000, 0xFF800000])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_no_nan_payload_and_no_infinity_slips_through(name, bits):
    rows = np.zeros((2, 2), np.float32)
    rows.view(np.uint32)[1, 0] = bits
    stored = np.empty(rows.shape, codec.get(name).stored)
    with pytest.raises(NonFiniteError, match=r"entry 7 holds .* at token 1, column 0") as caught:
        codec.get(name).encode(rows, stored, what="entry 7")
    assert type(caught.value) is NonFiniteError


def test_layouts_of_input():
    """Strided, transposed and big-endian rows are read by their values, not by their memory."""
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    for name in codec.FLOATS:
        for view in (rows.T, rows[::2], rows[:, ::-1], rows.astype(">f4"), np.asfortranarray(rows)):
            np.testing.assert_array_equal(codec.get(name).decode(encoded(name, view)), view)


def test_tensors():
    tensor = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = to_numpy(tensor)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(codec.get("bfloat16").decode(encoded("bfloat16", rows)), tensor.detach().float())


def test_unknown_codec():
    with pytest.raises(RecipeError, match=r"int3.*float16"):
        codec.get("int3")


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8"])
def test_what_is_stored_already_is_not_copied(dtype):
    rows = np.random.default_rng(0).standard_normal((5, 8)).astype(dtype)
    for name in ("float16", "float32", "bfloat16"):
        stored, out = codec.get(name).stored_rows(rows), np.empty(rows.shape, codec.get(name).stored)
        codec.get(name).encode(rows, out)
        np.testing.assert_array_equal(stored, out)
        assert stored.dtype == out.dtype
        assert (stored is rows) == (rows.dtype == codec.get(name).stored and name != "bfloat16")
    np.testing.assert_array_equal(codec.get("float16").stored_rows(rows.T), rows.T.astype(np.float16))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("rest", [0.0, -1.0, 65504.0, -65504.0, 6e-8])
def test_every_number_that_is_none_is_found(bad, rest):
    for place in (0, 17, 39):
        rows = np.full((5, 8), rest, np.float16)
        assert codec.get("float16").stored_rows(rows) is rows
        rows.reshape(-1)[place] = bad
        with pytest.raises(NonFiniteError):
            codec.get("float16").stored_rows(rows)


def test_all_half_precision_numbers():
    for bits in np.arange(1 << 16, dtype=np.uint16).reshape(-1, 256):
        for one in bits[::51]:
            rows = np.array([[one]], np.uint16).view(np.float16)
            assert floats._all_finite(rows) == bool(np.isfinite(rows).all())
