"""Numbers and truth values of callers, as Python's own: NumPy's are taken, what only looks like one is not."""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from actcache.errors import UsageError


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number, Python's or NumPy's; truth values and durations are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.timedelta64)


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number as Python's own, which prints, and goes into JSON and digests, in one way.

    Args:
        name: how an error calls it.

    Raises:
        UsageError: it is no whole number, or below ``least``.
    """
    if not is_whole(value) or value < least:
        raise UsageError(f"{name} is a whole number of {least} or more, not {value!r:.80}")
    return int(value)


def whole_numbers(name: str, values: Any) -> NDArray[np.int64]:
    """Return whole numbers, of any container, as an array, ``[n]``; where NumPy alone would cut off fractions.

    Raises:
        UsageError: they are none, or truth values.
    """
    try:
        given = values if hasattr(values, "__array__") else list(values)
        array = np.asarray(given)
    except (ValueError, TypeError):
        given, array = [], np.empty((), object)
    mixed = isinstance(given, list) and any(map(is_truth, given))  # of which NumPy makes numbers beside numbers
    if array.ndim != 1 or mixed or (array.size and array.dtype.kind not in "iu"):
        raise UsageError(f"{name} are whole numbers, not {values!r:.80}")
    return array.astype(np.int64)


def is_truth(value: object) -> bool:
    """Return whether a value is a truth value, Python's or NumPy's; 0 and 1 are none."""
    return isinstance(value, bool | np.bool_)


def truth(name: str, value: Any) -> bool:
    """Return a truth value as Python's own.

    Raises:
        UsageError: it is none.
    """
    if not is_truth(value):
        raise UsageError(f"{name} is True or False, not {value!r:.80}")
    return bool(value)
