"""Extents: where an array lies in a file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Extent:
    """Where one array of a segment lies: bytes that can be read without the storage library.

    ``path`` is relative to the segment and empty for the segment's own file; the array is C-contiguous, little-endian.
    """

    path: str
    offset: int  # bytes from the start of the file
    dtype: str  # NumPy dtype string
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)
