"""Codes with a scale a token, against torch's casts and vLLM's rule; and the bound that every codec states."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import CodecOverflowError, FormatError, NonFiniteError
from actcache.format import codec
from actcache.io import loops, numpy_loops

SCALED = ["int8", "float8_e4m3"]


def rows_of(seed, tokens=40, hidden=37, spread=3.0):
    """Rows of sizes that differ, one of zeros, one with a channel a hundred times the others."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((tokens, hidden)) * np.exp(rng.standard_normal((tokens, 1)) * spread)
    rows[3], rows[5, 7] = 0, 100 * np.abs(rows[5]).max()
    return rows.astype(np.float32)


def fp8_of_vllm(rows):
    """``quantize_tensor_to_fp8`` of vLLM's hs-connectors 0.9.0, word for word but for its imports."""
    tensor = torch.from_numpy(rows)
    fp8_max = torch.finfo(torch.float8_e4m3fn).max
    fp32 = tensor.float()
    amax = fp32.abs().amax(dim=(1,), keepdim=True)
    scale = (amax / fp8_max).clamp(min=1e-12)
    return (fp32 / scale).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize("hidden", [1, 7, 37, 384])
def test_float8_is_what_vllm_makes(hidden):
    rows = rows_of(hidden, hidden=max(hidden, 8))[:, :hidden]
    codes, scales = fp8_of_vllm(rows)
    stored = codec.get("float8_e4m3").stored_rows(rows)
    np.testing.assert_array_equal(stored[:, :hidden], codes.view(torch.uint8).numpy())
    assert stored[:, hidden:].tobytes() == scales.numpy().tobytes()
    np.testing.assert_array_equal(codec.get("float8_e4m3").decode(stored), (codes.to(torch.float32) * scales).numpy())


def test_int8_by_its_rule():
    rows = rows_of(0)
    stored = codec.get("int8").stored_rows(rows)
    scales = stored[:, -4:].copy().view("<f4")
    assert (scales.view(np.uint32) & 0xFF == 0).all()
    largest = np.abs(rows).max(axis=1, keepdims=True)
    some = largest > 0
    assert ((scales >= largest / 127) | ~some).all()
    assert (scales[some] <= largest[some] / 127 * (1 + 2.0**-14)).all()
    np.testing.assert_array_equal(stored[:, :-4].view(np.int8), np.rint(rows / scales))
    decoded = codec.get("int8").decode(stored)
    np.testing.assert_array_equal(decoded, stored[:, :-4].view(np.int8) * scales)
    assert codec.get("int8").stored_rows(decoded).tobytes() == stored.tobytes()  # what was int8 before stays what it is


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("hidden", [1, 8, 15, 16, 37, 64])
def test_the_compiled_loops_do_what_numpy_does(name, hidden):
    rows = rows_of(hidden, hidden=max(hidden, 8), spread=1.0)[:, :hidden].copy()
    stored, other = (np.zeros((len(rows), hidden + 4), np.uint8) for _ in range(2))
    assert loops.narrow(rows, stored, name) == numpy_loops.narrow(rows, other, name) == 0
    np.testing.assert_array_equal(stored, other)
    for form in loops.FORMS:
        wide, wider = (np.zeros(rows.shape, codec.get(form).stored) for _ in range(2))
        assert loops.widen(stored, name, wide, form) == numpy_loops.widen(stored, name, wider, form) == 0
        assert wide.tobytes() == wider.tobytes()
        expected = torch.from_numpy(codec.get(name).decode(stored)).to(getattr(torch, form))
        assert wide.tobytes() == expected.view(torch.uint8).numpy().tobytes()


def test_all_codes_of_float8():
    stored = np.zeros((256, 20), np.uint8)
    stored[:, :16] = np.arange(256)[:, None]
    stored[:, 16:] = np.array([0.25], "<f4").view(np.uint8)
    expected = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy() * np.float32(0.25)
    wide = np.empty((256, 16), np.float32)
    assert loops.widen(stored, "float8_e4m3", wide, "float32") == 2  # NaN, of both signs
    np.testing.assert_array_equal(wide, np.repeat(expected[:, None], 16, axis=1))
    with pytest.raises(FormatError, match="codes that are no numbers"):
        codec.get("float8_e4m3").decode(stored)


@pytest.mark.parametrize("name", SCALED)
def test_on_a_device_the_numbers_are_the_same(name):
    one, rows = codec.get(name), rows_of(1)
    stored = one.stored_rows(rows)
    assert one.decode_tensor(torch, torch.from_numpy(stored)).numpy().tobytes() == one.decode(stored).tobytes()
    stacked = torch.from_numpy(np.stack([stored, stored], axis=1))  # rows of two sites
    np.testing.assert_array_equal(one.decode_tensor(torch, stacked).numpy()[:, 1], one.decode(stored))


@pytest.mark.parametrize("name", [*codec.names(), "int8+zstd"])
@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0, 4), exponent=st.integers(-60, 10))
def test_every_entry_is_within_the_bound_that_its_codec_states(name, seed, spread, exponent):
    one = codec.get(name)
    rows = np.ldexp(rows_of(seed, tokens=8, hidden=24, spread=spread), exponent)
    rows = rows[np.abs(rows).max(axis=1) < 60_000]
    stored = one.stored_rows(rows)
    errors = np.linalg.norm(one.decode(stored).astype(np.float64) - rows, axis=1)
    assert (errors <= one.bound(stored)).all()


@pytest.mark.parametrize("name", SCALED)
def test_a_row_that_cannot_be_stored_is_refused_by_name(name):
    one, out = codec.get(name), np.empty((3, 24), np.uint8)
    rows = np.ones((3, 20), np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        rows[1, 17] = bad
        with pytest.raises(NonFiniteError, match=r"document x holds -?(nan|inf) at token 1, column 17"):
            one.encode(rows, out, what="document x")
    rows[1, 17] = np.finfo(np.float32).max
    if name == "int8":  # whose largest code is a little more than the largest number
        with pytest.raises(CodecOverflowError, match=r"document x holds 3.4.*e.38 at token 1, column 17, .*int8"):
            one.encode(rows, out, what="document x")
    with pytest.raises(CodecOverflowError):
        one.encode(rows.astype(np.float64) * 10, out, what="document x")


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_no_writer_makes(name, scale):
    one = codec.get(name)
    stored = one.stored_rows(rows_of(2))
    assert not len(one.stray(stored))
    assert not len(one.stray(np.zeros_like(stored)))  # rows of padding
    stored[9, -4:] = np.array([scale], "<f4").view(np.uint8)
    assert one.stray(stored).tolist() == [9]


@pytest.mark.parametrize("name", SCALED)
def test_a_number_that_is_too_large_for_the_dtype_that_is_asked_for(name):
    one = codec.get(name)
    stored = one.stored_rows(np.full((2, 16), 70_000, np.float32))
    with pytest.raises(CodecOverflowError, match=r"7\d*.*float16"):
        one.decode_into(stored, np.empty((2, 16), np.float16), "float16")
    codec.decode_as(one, stored, "bfloat16", np.empty((2, 16), np.uint16))
