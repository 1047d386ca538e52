"""Numbers rounded one by one: float16, float32, and bfloat16, which NumPy has not: kept as its bits in uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format.codecs.interface import Codec
from actcache.io import loops


class Float(Codec):
    """A dtype that NumPy has."""

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        finite = loops.round_to_float16(rows, out)
        if finite is None:
            with np.errstate(over="ignore"):
                np.copyto(out, rows, casting="unsafe")
            finite = _all_finite(out)
        if not finite:
            self.refuse(rows, np.isfinite(out), what)

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        if rows.dtype == self.stored and rows.flags.c_contiguous:
            if not _all_finite(rows):
                self.refuse(rows, np.isfinite(rows), what)
            return rows
        return super().stored_rows(rows, what=what)

    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        return stored

    def bound(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        return _rounding(stored, *((2.0**-11, 2.0**-25) if self.stored.itemsize == 2 else (0.0, 0.0)))


class Bfloat16(Codec):
    """The upper 16 bits of a float32, rounded to nearest even."""

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        with np.errstate(over="ignore"):
            wide = np.ascontiguousarray(rows, np.float32)
        bits = wide.view(np.uint32)
        np.copyto(out, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16, casting="unsafe")
        # exponent all ones: infinity, NaN, or a float32 that rounded up to infinity
        finite = np.isfinite(wide) & ((out.view(np.uint16) & 0x7F80) != 0x7F80)
        if not finite.all():
            self.refuse(rows, finite, what)

    def decode(self, stored: NDArray[Any]) -> NDArray[Any]:
        return (stored.astype(np.uint32) << 16).view(np.float32)

    def decode_into(self, stored: NDArray[Any], out: NDArray[Any], dtype: str) -> bool:
        if dtype != "float32":
            return False
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
        return True

    def bound(self, stored: NDArray[Any]) -> NDArray[np.float64]:
        return _rounding(self.decode(stored), 2.0**-8, 2.0**-134)

    def decode_tensor(self, torch: Any, stored: Any) -> Any:
        return stored.view(torch.bfloat16)


def _rounding(rows: NDArray[Any], share: float, least: float) -> NDArray[np.float64]:
    """Return the L2 norms of what rounding takes from rows: of each number a share, or half of the least step."""
    bounds: NDArray[np.float64] = np.linalg.norm(np.maximum(np.abs(rows.astype(np.float64)) * share, least), axis=1)
    return bounds if share else np.zeros(len(rows))


def _all_finite(rows: NDArray[np.generic]) -> bool:
    """Return whether there is no NaN or infinity. NumPy's own test of float16 converts each number: 15 times slower."""
    if rows.dtype == np.float16 and rows.size and rows.dtype.isnative and rows.flags.c_contiguous:
        # Positive ones are those from 0x7C00 on, as signed numbers; negative ones from 0xFC00 on, as unsigned ones.
        return bool(rows.view(np.int16).max() < 0x7C00) and bool(rows.view(np.uint16).max() < 0xFC00)
    return bool(np.isfinite(rows).all())


FLOAT16 = Float("float16", np.dtype("<f2"), np.dtype("<f2"))
FLOAT32 = Float("float32", np.dtype("<f4"), np.dtype("<f4"))
BFLOAT16 = Bfloat16("bfloat16", np.dtype("<u2"), np.dtype("<f4"))
