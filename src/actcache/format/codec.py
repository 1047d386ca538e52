"""Codecs: how rows of activations become stored bytes and come back, and what they were rounded to on the way.

A codec turns one document's ``[tokens, hidden]`` rows into an array of the same shape in the stored dtype, and back. It
never stores an infinity or a NaN. NumPy has no bfloat16: its rows are kept as their bits in uint16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from actcache.errors import CodecOverflowError, NonFiniteError, RecipeError
from actcache.io import loops


@dataclass(frozen=True)
class Codec:
    """One way to store rows. ``encode`` and ``decode`` are pure and thread-safe."""

    name: str
    stored: np.dtype[np.generic]  # dtype of the stored rows
    delivered: np.dtype[np.generic]  # dtype of the rows that ``decode`` returns

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        """Write ``rows`` into ``out``, both ``[tokens, hidden]``, ``out`` in the stored dtype.

        Args:
            rows: floating point, or already in the stored dtype.
            what: how an error names the document.

        Raises:
            NonFiniteError: ``rows`` holds NaN or infinity.
            CodecOverflowError: a finite value is too large for the stored dtype.
        """
        finite = loops.round_to_float16(rows, out)
        if finite is None:
            with np.errstate(over="ignore"):
                np.copyto(out, rows, casting="unsafe")
            finite = _all_finite(out)
        if not finite:
            self._refuse(rows, np.isfinite(out), what)

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        """Return what ``encode`` would write, raising as it does: ``rows`` itself where that is what they are, else a
        new array."""
        if rows.dtype == self.stored == self.delivered and rows.flags.c_contiguous:
            if not _all_finite(rows):
                self._refuse(rows, np.isfinite(rows), what)
            return rows
        out = np.empty(rows.shape, self.stored)
        self.encode(rows, out, what=what)
        return out

    def decode(self, stored: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return stored rows as floating point; the same array where the stored dtype is one."""
        return stored

    def _refuse(self, rows: NDArray[np.generic], finite: NDArray[np.bool_], what: str) -> NoReturn:
        token, column = np.argwhere(~finite)[0].tolist()
        value = float(rows[token, column])
        where = f"{what} holds {value:g} at token {token}, column {column}"
        if np.isfinite(value):
            raise CodecOverflowError(
                f"{where}, too large for {self.name}: store it as bfloat16 or float32 (another recipe, another space)"
            )
        raise NonFiniteError(f"{where}: the model computed no number there; nothing of this call was stored")


class _Bfloat16(Codec):
    """The upper 16 bits of a float32, rounded to nearest even."""

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        with np.errstate(over="ignore"):
            wide = np.ascontiguousarray(rows, np.float32)
        bits = wide.view(np.uint32)
        np.copyto(out, (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16, casting="unsafe")
        # exponent all ones: infinity, NaN, or a float32 that rounded up to infinity
        finite = np.isfinite(wide) & ((out.view(np.uint16) & 0x7F80) != 0x7F80)
        if not finite.all():
            self._refuse(rows, finite, what)

    def decode(self, stored: NDArray[np.generic]) -> NDArray[np.generic]:
        return (stored.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class _ByWayOf(Codec):
    """A codec whose rows are rounded to others' dtypes first, so that they are like those that were stored so once."""

    end: Codec
    before: tuple[Codec, ...]

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        self.end.encode(self._rounded(rows, what), out, what=what)

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        return self.end.stored_rows(self._rounded(rows, what), what=what)

    def decode(self, stored: NDArray[np.generic]) -> NDArray[np.generic]:
        return self.end.decode(stored)

    def _rounded(self, rows: NDArray[np.generic], what: str) -> NDArray[np.generic]:
        for codec in self.before:
            rows = codec.decode(codec.stored_rows(rows, what=what))
        return rows


def _all_finite(rows: NDArray[np.generic]) -> bool:
    """Return whether there is no NaN or infinity. NumPy's own test of float16 converts each number: 15 times slower."""
    if rows.dtype == np.float16 and rows.size and rows.dtype.isnative and rows.flags.c_contiguous:
        # Positive ones are those from 0x7C00 on, as signed numbers; negative ones from 0xFC00 on, as unsigned ones.
        return bool(rows.view(np.int16).max() < 0x7C00) and bool(rows.view(np.uint16).max() < 0xFC00)
    return bool(np.isfinite(rows).all())


_CODECS = {
    name: kind(name, np.dtype(stored), np.dtype(delivered))
    for kind, name, stored, delivered in (
        (Codec, "float16", "<f2", "<f2"),
        (Codec, "float32", "<f4", "<f4"),
        (_Bfloat16, "bfloat16", "<u2", "<f4"),
    )
}


def names() -> list[str]:
    """Return the names of the codecs."""
    return list(_CODECS)


def get(name: str, via: Sequence[str] = ()) -> Codec:
    """Return the codec of that name, ``RecipeError`` where there is none; rows are rounded to the dtypes of the codecs
    in ``via`` first, one after the other."""
    if via:
        end = get(name)
        return _ByWayOf(end.name, end.stored, end.delivered, end, tuple(get(one) for one in via))
    try:
        return _CODECS[name]
    except KeyError:
        raise RecipeError(f"there is no codec {name!r}; there are {', '.join(_CODECS)}") from None


# --- what rows were rounded to before they came to be stored as they are ----------------------------------------------
#
# Digits that were lost do not come back. So a recipe names, beside the dtype that its rows are stored in, those that
# they passed through and that left a trace; only these, as the others give what is stored at once, bit for bit.


def traces(dtypes: Sequence[str], compute_dtype: str) -> tuple[str, ...]:
    """Return which dtypes on the way of rows show in what is stored at its end; none where they were stored at once.

    Two ways give the same numbers exactly when they have the same traces and the same end
    (tests/format/test_rounding.py tries all ways of four steps; a number that does not fit a dtype is refused on the
    way). That follows from three facts:

    * float32 holds every number of a smaller dtype, and every one that was computed in a smaller one.
    * Rows that were rounded to a dtype before are not changed by it: those of float16 that were rounded to bfloat16, or
      the other way round, have few enough digits for both, and are in the range of both.
    * bfloat16 is made of float64 by way of float32.

    ``dtypes`` are names of codecs in the order in which the rows are stored as them, the end last.
    """
    rounded: list[str] = []
    for dtype in dtypes:
        if dtype in rounded or (dtype == "float32" and (rounded or compute_dtype != "float64")):
            continue
        rounded = [dtype] if (rounded, dtype) == (["float32"], "bfloat16") else [*rounded, dtype]
    return tuple(rounded[:-1] if rounded[-1:] == [dtypes[-1]] else rounded)


_EXTENDED = ("longdouble", "float96", "float128")  # NumPy's names for what C has beyond float64
_WIDER = {
    "float64": _EXTENDED,
    "float32": ("float64", *_EXTENDED),
    "float16": ("float32", "float64", *_EXTENDED),
    "bfloat16": ("float32", "float64", *_EXTENDED),
}


def holds(given: str, compute_dtype: str) -> bool:
    """Return whether every number of ``compute_dtype`` is one of ``given``, a dtype's name; of unknown ones, never."""
    return given == compute_dtype or given in _WIDER[compute_dtype]
