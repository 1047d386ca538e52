"""Codes of one byte with a scale a token: ``int8`` and ``float8_e4m3``.

A stored row is the codes of its numbers, one byte each, then the row's scale as float32: a number is its code times the
scale. So a row needs nothing but itself: one read brings it, one checksum covers it, one copy moves it. The codes of
float8_e4m3 and their scales are those of vLLM's ``hs_connectors.fp8_utils``, bit for bit.

Codes of int8 are piecewise linear where that makes the row's error less: beyond a knee a step is several scales. Knee
and ratio, the row's *shape*, are the lowest byte of its scale, which has 16 digits (docs/format.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CodecOverflowError, FormatError
from actcache.format.codecs.interface import Codec
from actcache.io import loops
from actcache.io.numpy_loops import IS_SHAPE, KNEES, RATIOS


class Scaled(Codec):
    """See the module; ``name`` is one of ``loops.CODES``."""

    rounds_alone = False

    def width(self, hidden: int) -> int:
        return hidden + loops.SCALE_BYTES

    def hidden(self, width: int) -> int:
        return width - loops.SCALE_BYTES

    def encode(self, rows: NDArray[np.generic], out: NDArray[Any], *, what: str = "the document") -> None:
        with np.errstate(over="ignore"):
            wide = np.ascontiguousarray(rows, np.float32)
        if loops.narrow(wide, out, self.name):
            self._refuse(rows, wide, what)

    def _refuse(self, rows: NDArray[Any], wide: NDArray[np.float32], what: str) -> None:
        finite = np.isfinite(wide)
        if finite.all():  # the largest number times 1.00002 is none any more
            token, column = np.unravel_index(int(np.abs(wide).argmax()), wide.shape)
            raise CodecOverflowError(
                f"{what} holds {float(wide[token, column]):g} at token {token}, column {column}, too large for "
                f"{self.name}: store it as float32 (another recipe, another space)"
            )
        self.refuse(rows, finite, what)

    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        out = np.empty((*stored.shape[:-1], self.hidden(stored.shape[-1])), np.float32)
        self.decode_into(stored, out, "float32")
        return out

    def decode_into(self, stored: NDArray[Any], out: NDArray[Any], dtype: str) -> bool:
        if dtype not in loops.FORMS:
            return False
        flat = np.ascontiguousarray(stored).reshape(-1, stored.shape[-1])
        if loops.widen(flat, self.name, out.reshape(-1, out.shape[-1]), dtype):
            if len(bad := self.stray(flat)):
                raise FormatError(f"row {bad[0]} of these {self.name} rows has no scale that a writer makes")
            raise self._too_large(flat, dtype)
        return True

    def _too_large(self, flat: NDArray[Any], dtype: str) -> Exception:
        wide = np.empty((len(flat), self.hidden(flat.shape[1])), np.float32)
        if loops.widen(flat, self.name, wide, "float32"):
            return FormatError(f"these {self.name} rows hold codes that are no numbers")
        most = float(np.abs(wide).max())
        return CodecOverflowError(f"these rows hold {most:g}, too large for {dtype}: ask for float32 or bfloat16")

    def bound(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        hidden = self.hidden(stored.shape[1])
        codes, tails = stored[:, :hidden], stored[:, hidden:].copy()
        if self.name == "int8":
            scales, shapes = _scales_and_shapes(tails)
            beyond = np.abs(codes.view(np.int8).astype(np.int16)) >= KNEES[shapes][:, None]
            steps = np.linalg.norm(np.where(beyond, RATIOS[shapes][:, None], 1.0), axis=1)
        else:  # of each code's exponent, 3 digits behind the first
            scales = tails.view("<f4")[:, 0]
            steps = np.linalg.norm(np.ldexp(1.0, np.maximum(codes >> 3 & 15, 1).astype(np.int64) - 10), axis=1)
        # Half a step; and a number is a quotient, times the scale again, each rounded to float32.
        bounds: NDArray[np.float64] = steps / 2 * scales.astype(np.float64) * (1 + 2.0**-10)
        return bounds

    def decode_tensor(self, torch: Any, stored: Any) -> Any:
        hidden = self.hidden(stored.shape[-1])
        if self.name != "int8":
            scales = stored[..., hidden:].contiguous().view(torch.float32)
            return stored[..., :hidden].view(torch.float8_e4m3fn).float().mul_(scales)
        tails = stored[..., hidden:].contiguous().view(torch.int32)
        shapes, scales = tails & 0xFF, (tails & -0x100).view(torch.float32)
        # By arithmetic, not by the tables: to bring these to a device, its stream would be waited for.
        knees = (shapes // 16 * 8).float()
        more = torch.where(shapes == 0, 0, ((2 + shapes % 2) << (shapes % 16 // 2)) - 1).float()
        codes = stored[..., :hidden].view(torch.int8).float()  # whole numbers, exact in whatever order
        beyond = codes - torch.maximum(torch.minimum(codes, knees), -knees)
        return codes.addcmul_(beyond, more).mul_(scales)

    def stray(self, stored: NDArray[Any]) -> NDArray[np.int64]:
        if not len(stored):
            return np.empty(0, np.int64)
        hidden = self.hidden(stored.shape[1])
        scales = np.ndarray(len(stored), "<f4", stored, hidden, (stored.strides[0],))  # where they are, unaligned
        return self._stray(scales, stored[:, hidden], lambda bad: stored[bad])

    def stray_among(self, stored: NDArray[Any], which: NDArray[np.int64]) -> NDArray[np.int64]:
        if not len(which):
            return np.empty(0, np.int64)
        tails = np.ascontiguousarray(stored[which, self.hidden(stored.shape[1]) :])
        return self._stray(tails.view("<f4")[:, 0], tails[:, 0], lambda bad: stored[which[bad]])

    def _stray(
        self,
        scales: NDArray[Any],
        shapes: NDArray[Any],
        rows: Callable[[NDArray[np.bool_]], NDArray[Any]],
    ) -> NDArray[np.int64]:
        """Return which rows of these scales, ``[n]``, and shapes, ``[n]``, are stray; ``rows`` brings some of them."""
        least = _LEAST if self.name == "int8" else _LEAST_OF_ALL
        any_shape = self.name != "int8"
        if scales.min() >= least and scales.max() < np.inf and (any_shape or IS_SHAPE[shapes].all()):
            return np.empty(0, np.int64)  # not of NaN, with which nothing compares
        bad = ~((scales >= least) & (scales < np.inf))
        if not any_shape:
            bad |= ~IS_SHAPE[shapes]
        bad[bad] = rows(bad).any(axis=1)  # a row of padding is all zeros
        return np.flatnonzero(bad)


def _scales_and_shapes(tails: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Return what the last bytes of rows of int8, ``[n, 4]``, say: ``[n]`` each."""
    bits = tails.view("<u4")[:, 0].astype(np.uint32)
    return (bits & np.uint32(0xFFFFFF00)).view(np.float32), (bits & 0xFF).astype(np.intp)


_LEAST, _LEAST_OF_ALL = np.finfo(np.float32).tiny, np.finfo(np.float32).smallest_subnormal

INT8 = Scaled("int8", np.dtype("|u1"), np.dtype("<f4"))
FLOAT8_E4M3 = Scaled("float8_e4m3", np.dtype("|u1"), np.dtype("<f4"))
