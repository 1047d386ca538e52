"""Codecs by their names, and what rows were rounded to on the way to how they are stored.

A codec (``codecs/interface.py``) turns one document's ``[tokens, hidden]`` rows into rows of the stored dtype, and
back. Other packages bring theirs by an entry point of the group ``actcache.codecs``: its name is the codec's, and it
names a ``Codec``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import RecipeError
from actcache.format.codecs import floats, scaled
from actcache.format.codecs.interface import Codec as Codec
from actcache.format.codecs.interface import Wrapped

GROUP = "actcache.codecs"
FLOATS = ("float16", "float32", "bfloat16")  #: what numbers are delivered as

_CODECS: dict[str, Codec] = {
    one.name: one for one in (floats.FLOAT16, floats.FLOAT32, floats.BFLOAT16, scaled.INT8, scaled.FLOAT8_E4M3)
}


COMPRESSED = "+zstd"  #: what follows the name of a codec whose stored rows are compressed


@dataclass(frozen=True)
class _ByWayOf(Wrapped):
    """A codec whose rows are rounded to others' dtypes first, so that they are like those that were stored so once."""

    before: tuple[Codec, ...]

    def encode(self, rows: NDArray[np.generic], out: NDArray[np.generic], *, what: str = "the document") -> None:
        self.base.encode(self._rounded(rows, what), out, what=what)

    def stored_rows(self, rows: NDArray[np.generic], *, what: str = "the document") -> NDArray[np.generic]:
        return self.base.stored_rows(self._rounded(rows, what), what=what)

    def _rounded(self, rows: NDArray[np.generic], what: str) -> NDArray[np.generic]:
        for codec in self.before:
            rows = codec.decode(codec.stored_rows(rows, what=what))
        return rows


class _Compressed(Wrapped):
    """A codec whose stored rows lie in the files of a space as frames of zstd; see docs/format.md."""

    compressed = True


def names() -> list[str]:
    """Return the names of the codecs that come with this package, and of those that others have brought. Each can be
    followed by ``COMPRESSED``."""
    return [*_CODECS, *_plugged_in()]


@cache
def _plugged_in() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in _CODECS}


def base(name: str) -> str:
    """Return the name of a codec without what says that its rows are compressed."""
    return name.removesuffix(COMPRESSED)


def is_name(name: object) -> bool:
    """Return whether there is a codec of that name."""
    return isinstance(name, str) and base(name) in names()


def get(name: str, via: Sequence[str] = ()) -> Codec:
    """Return the codec of that name; rows are rounded to the dtypes of those in ``via`` first, one after the other.

    ``RecipeError``: there is none, or what a package names as one is none.
    """
    if via:
        end = get(name)
        return _ByWayOf(end.name, end.stored, end.delivered, end, tuple(get(one) for one in via))
    if name.endswith(COMPRESSED):
        rows = get(base(name))
        return _Compressed(name, rows.stored, rows.delivered, rows)
    if (found := _CODECS.get(name)) is not None:
        return found
    if (point := _plugged_in().get(name)) is None:
        raise RecipeError(f"there is no codec {name!r}; there are {', '.join(names())}, each with {COMPRESSED} or not")
    made = point.load()
    if not isinstance(made, Codec) or made.name != name:
        raise RecipeError(f"{point.value} is no codec of the name {name!r}, as which a package brings it")
    return made


def decode_as(codec: Codec, stored: NDArray[Any], dtype: str, out: NDArray[Any]) -> None:
    """Write the numbers of stored rows, ``[..., width]``, into ``out``, ``[..., hidden]``, as another float dtype:
    one of ``FLOATS`` (bfloat16: its bits, uint16).

    ``CodecOverflowError``: one is too large for it.
    """
    if codec.decode_into(stored, out, dtype):
        return
    rows = codec.decode(stored)
    get(dtype).encode(rows.reshape(-1, rows.shape[-1]), out.reshape(-1, out.shape[-1]), what="an entry")


def relative_bound(codec: Codec, rows: NDArray[Any]) -> float:
    """Return the largest relative error (L2) that storing ``[tokens, hidden]`` rows so can make: of all of them
    together, or of the median row, whichever is larger."""
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    bounds = codec.bound(codec.stored_rows(rows))
    of_rows = bounds / np.where(norms > 0, norms, 1.0)
    return max(float(np.linalg.norm(bounds) / (np.linalg.norm(norms) or 1.0)), float(np.median(of_rows)))


# --- what rows were rounded to before they came to be stored as they are ----------------------------------------------
#
# Digits that were lost do not come back. So a recipe names, beside the dtype that its rows are stored in, those that
# they passed through and that left a trace; only these, as the others give what is stored at once, bit for bit.


def traces(dtypes: Sequence[str], compute_dtype: str) -> tuple[str, ...]:
    """Return which dtypes on the way of rows show in what is stored at its end; none where they were stored at once.

    Two ways give the same numbers exactly when they have the same traces and the same end
    (tests/format/test_rounding.py tries all ways of four steps; a number that does not fit a dtype is refused on the
    way). That follows from four facts:

    * float32 holds every number of a smaller dtype, and every one that was computed in a smaller one.
    * Rows that were rounded to a dtype before are not changed by it: those of float16 that were rounded to bfloat16, or
      the other way round, have few enough digits for both, and are in the range of both.
    * bfloat16 is made of float64 by way of float32.
    * A codec that scales rows as a whole leaves a trace each time, and none of what was before it goes without one.

    ``dtypes`` are names of codecs (compressed or not) in the order in which the rows are stored as them, the end last.
    """
    kept: list[str] = []
    first = 0  # of those that a number was rounded to alone since rows were scaled
    for dtype in map(base, dtypes):
        if not get(dtype).rounds_alone:
            kept.append(dtype)
            first = len(kept)
        elif dtype in kept[first:] or (dtype == "float32" and (kept or compute_dtype != "float64")):
            continue
        else:
            kept = [dtype] if (kept, dtype) == (["float32"], "bfloat16") else [*kept, dtype]
    return tuple(kept[:-1] if kept[-1:] == [base(dtypes[-1])] else kept)


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
