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


SHAPES = [0, *(16 * knee + ratio for knee in range(1, 16) for ratio in range(15))]


def meaning(code, shape):
    """What a code of int8 means, in scales: docs/format.md, word for word, one by one."""
    if shape == 0:
        return code
    knee, ratio = shape // 16 * 8, (2 + shape % 2) * 2 ** (shape % 16 // 2)
    size = abs(code)
    return (-1 if code < 0 else 1) * (size if size <= knee else knee + ratio * (size - knee))


def expected_error(row, shape):
    """What a row's error should be by a shape: steps' squares / 12, but for the largest number, which has a code."""
    scale, sizes = np.abs(row).max() / meaning(127, shape), np.sort(np.abs(row))[:-1]
    beyond = np.where(sizes > (shape // 16 * 8 if shape else 127) * scale, meaning(127, shape) - meaning(126, shape), 1)
    return scale * np.linalg.norm(beyond) / np.sqrt(12)


def test_int8_by_its_rule():
    rows = rows_of(0, tokens=10, hidden=200, spread=2.0)
    rows[6] *= np.exp(np.arange(200) / 30)  # of all sizes
    rows[7:9, :3] *= np.float32([[300], [20]])
    one = codec.get("int8")
    stored = one.stored_rows(rows)
    tails = stored[:, -4:].copy().view("<u4")[:, 0]
    scales, shapes = (tails & 0xFFFFFF00).view(np.float32), tails & 0xFF
    assert {0} < set(shapes) <= set(SHAPES)
    assert len(set(shapes)) > 3
    largest = np.abs(rows).max(axis=1) / np.array([meaning(127, int(shape)) for shape in shapes])
    some = largest > 0
    assert ((scales >= largest) | ~some).all()
    assert (scales[some] <= largest[some] * (1 + 2.0**-14)).all()
    decoded, coded = one.decode(stored), stored[:, :-4].view(np.int8)
    for row, codes, shape, scale, found in zip(rows, coded, shapes, scales, decoded, strict=True):
        means = np.array([meaning(int(code), int(shape)) for code in codes], np.float64)
        np.testing.assert_array_equal(found, (means * scale).astype(np.float32))
        if row.any():
            errors = {one_shape: expected_error(row, one_shape) for one_shape in SHAPES}
            assert errors[int(shape)] <= 1.07 * min(errors.values()), (shape, min(errors, key=errors.get))
            assert np.linalg.norm(found - row) <= 1.2 * errors[int(shape)]


def test_what_int8_without_a_knee_has_left_is_not_changed():
    """Rows that were stored by a plain absmax int8 come out as they were, though a knee would have suited them."""
    rows = rows_of(0)
    rows[9:13, 7] *= 300
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    scales = np.maximum((scales.view(np.uint32) + 0xFF & 0xFFFFFF00).view(np.float32), np.finfo(np.float32).tiny)
    plain = np.rint(rows / scales).astype(np.int8)
    stored = codec.get("int8").stored_rows(plain * scales)
    np.testing.assert_array_equal(stored[:, :-4].view(np.int8), plain)
    assert stored[:, -4:].tobytes() == scales.tobytes()
    assert (codec.get("int8").stored_rows(rows)[:, -4] != 0).any()


def test_outliers_cost_the_other_channels_little():
    """Three channels sixty times the others, as large decoders have them: what is left of the others' digits."""
    rows = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    rows[:, [7, 101, 200]] *= 60
    others = np.delete(np.arange(256), [7, 101, 200])

    def error(decoded):
        return np.linalg.norm((decoded - rows)[:, others]) / np.linalg.norm(rows[:, others])

    scales = np.abs(rows).max(axis=1, keepdims=True) / 127
    assert error(np.rint(rows / scales) * scales) > 0.15
    assert error(codec.get("int8").decode(codec.get("int8").stored_rows(rows))) < 0.025


@pytest.mark.parametrize("hidden", [16, 21])
def test_all_codes_of_all_shapes_of_int8(hidden):
    codes = np.arange(-128, 128).repeat(hidden).reshape(256, hidden)
    for shape in range(256):
        stored = np.zeros((256, hidden + 4), np.uint8)
        stored[:, :hidden] = codes.astype(np.int8).view(np.uint8)
        stored[:, hidden:] = (np.array([0.25], "<f4").view("<u4") | shape).view(np.uint8)
        wide, other = np.zeros((2, 256, hidden), np.float32)
        bad = loops.widen(stored, "int8", wide, "float32"), numpy_loops.widen(stored, "int8", other, "float32")
        assert bad == ((0, 0) if shape in SHAPES else (256, 256))
        assert len(codec.get("int8").stray(stored)) == bad[0]
        if shape in SHAPES:
            expected = np.array([meaning(code, shape) for code in range(-128, 128)], np.float32) * np.float32(0.25)
            np.testing.assert_array_equal(wide, np.repeat(expected[:, None], hidden, axis=1))
            np.testing.assert_array_equal(other, wide)
        else:
            with pytest.raises(FormatError, match="no scale that a writer makes"):
                codec.get("int8").decode(stored)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("hidden", [1, 8, 15, 16, 37, 64])
def test_the_compiled_loops_do_what_numpy_does(name, hidden):
    rows = rows_of(hidden, hidden=max(hidden, 8), spread=1.0)[:, :hidden].copy()
    stored, other = (np.zeros((len(rows), hidden + 4), np.uint8) for _ in range(2))
    assert loops.narrow(rows, stored, name) == numpy_loops.narrow(rows, other, name) == 0
    np.testing.assert_array_equal(stored, other)
    assert name != "int8" or hidden < 8 or (stored[:, hidden] != 0).any()  # rows with a knee are among them
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
    rows[:20, 3] *= 50
    stored = one.stored_rows(rows)
    assert name != "int8" or len(set(stored[:, rows.shape[1]].tolist())) > 3  # shapes of several kinds
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
    which = np.array([3, 9, 0, 9, 5])
    assert one.stray_among(stored, which).tolist() == one.stray(stored[which]).tolist() == [1, 3]
    assert not len(one.stray_among(stored, which[:0]))
    assert not len(one.stray(stored[:0]))


@pytest.mark.parametrize("name", SCALED)
def test_a_number_that_is_too_large_for_the_dtype_that_is_asked_for(name):
    one = codec.get(name)
    stored = one.stored_rows(np.full((2, 16), 70_000, np.float32))
    with pytest.raises(CodecOverflowError, match=r"7\d*.*float16"):
        one.decode_into(stored, np.empty((2, 16), np.float16), "float16")
    codec.decode_as(one, stored, "bfloat16", np.empty((2, 16), np.uint16))
