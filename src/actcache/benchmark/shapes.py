"""The document shapes of the design, and synthetic entries of them.

Storage does not look at the numbers, so they are pseudo-random; lengths are uniform in the shape's range.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shape:
    name: str
    shortest: int
    longest: int
    hidden: int
    batch: int  # documents

    @property
    def row_bytes(self) -> int:
        return self.hidden * 2

    def lengths(self, nbytes: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the lengths of documents that fill ``nbytes`` as float16."""
        mean = (self.shortest + self.longest) / 2
        count = max(self.batch, int(nbytes / (mean * self.row_bytes)))
        return np.random.default_rng(seed).integers(self.shortest, self.longest + 1, count)

    def rows(self, lengths: NDArray[np.int64], seed: int = 1) -> NDArray[np.float16]:
        """Return all documents' rows, ``[sum(lengths), hidden]`` float16, finite."""
        rng = np.random.default_rng(seed)
        block = rng.standard_normal((1 << 14, self.hidden), np.float32).astype(np.float16)
        rows = np.empty((int(lengths.sum()), self.hidden), np.float16)
        for start in range(0, len(rows), len(block)):
            part = rows[start : start + len(block)]
            part[:] = np.roll(block, start // len(block), axis=1)[: len(part)]
        return rows


SHAPES = {shape.name: shape for shape in (Shape("paper", 60, 512, 768, 128), Shape("short", 8, 48, 384, 1024))}
