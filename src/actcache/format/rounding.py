"""What rows were rounded to before they came to be stored as they are.

Rows that were float16 once are float16's in any dtype: the digits that were lost do not come back. So a recipe names,
beside the dtype that its rows are stored in, those that they passed through and that left a trace. Only these: what the
rows of one recipe are stored as again is often, bit for bit, what another recipe would have stored at once.
"""

from __future__ import annotations

from collections.abc import Sequence


def traces(dtypes: Sequence[str], compute_dtype: str) -> tuple[str, ...]:
    """Return which dtypes on the way of rows show in what is stored at its end; none where they were stored at once.

    Two ways give the same numbers exactly when they have the same traces and the same end
    (tests/format/test_rounding.py tries all ways of four steps). A number that does not fit a dtype is refused on the
    way, so it is at no end. That follows from three facts:

    * float32 holds every number of a smaller dtype, and every one that was computed in a smaller one.
    * Rows that were rounded to a dtype before are not changed by it: those of float16 that were rounded to bfloat16, or
      the other way round, have few enough digits for both, and are in the range of both.
    * bfloat16 is made of float64 by way of float32.

    Args:
        dtypes: names of codecs, in the order in which the rows are stored as them; the last is what they are stored as.
        compute_dtype: what the rows were computed in.
    """
    rounded: list[str] = []
    for dtype in dtypes:
        if dtype in rounded or (dtype == "float32" and (rounded or compute_dtype != "float64")):
            continue
        if (rounded, dtype) == (["float32"], "bfloat16"):
            rounded = []
        rounded.append(dtype)
    return tuple(rounded[:-1] if rounded[-1:] == [dtypes[-1]] else rounded)


def holds(given: str, compute_dtype: str) -> bool:
    """Return whether every number of ``compute_dtype`` is one of ``given``, a dtype's name; of unknown ones, never.

    Only what is known to hold them does: a dtype of fewer digits that somebody will come up with is unknown here.
    """
    return given == compute_dtype or given in _WIDER[compute_dtype]


_EXTENDED = ("longdouble", "float96", "float128")  # NumPy's names for what C has beyond float64
_WIDER = {
    "float64": _EXTENDED,
    "float32": ("float64", *_EXTENDED),
    "float16": ("float32", "float64", *_EXTENDED),
    "bfloat16": ("float32", "float64", *_EXTENDED),
}
