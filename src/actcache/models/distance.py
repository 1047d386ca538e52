"""How far apart two computations of the same rows are."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Columns that are small beside others carry more of the rounding; *measured*, in bfloat16, up to 1.2 times as much in
#: models without large columns.
_SMALL_COLUMNS = 4.0


def relative_error(
    expected: NDArray[np.generic], found: NDArray[np.generic], columns: NDArray[np.float64] | None = None
) -> float:
    """Return the relative error of a document's rows ``[tokens, hidden]``, infinite where something is no number.

    It is the largest of that of all numbers together (L2) and of the median row, each row by its own norm: one row with
    a large norm, as decoders have at the first token, would hide what happens to all others.

    Args:
        columns: ``[hidden]`` the root mean square of each column over many documents; where it is given, a quarter of
            the median row's error with columns brought to one size counts, too: a column that is large everywhere
            would hide the others.
    """
    there = expected.astype(np.float64)
    difference = found.astype(np.float64) - there
    error = max(
        float(np.linalg.norm(difference)) / (float(np.linalg.norm(there)) or 1.0),
        _median_row(difference, there),
        0.0 if columns is None else _median_row(difference / columns, there / columns) / _SMALL_COLUMNS,
        key=lambda value: math.inf if math.isnan(value) else value,
    )
    return math.inf if math.isnan(error) else error


def column_sizes(rows: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return the root mean square of each column of ``[rows, hidden]``; 1 where that is 0."""
    sizes: NDArray[np.float64] = np.sqrt(np.mean(np.square(rows.astype(np.float64)), axis=0))
    sizes[sizes == 0] = 1.0
    return sizes


def _median_row(difference: NDArray[np.float64], there: NDArray[np.float64]) -> float:
    norms = np.linalg.norm(there, axis=1)
    norms[norms == 0] = 1.0
    return float(np.median(np.linalg.norm(difference, axis=1) / norms)) if len(norms) else 0.0
