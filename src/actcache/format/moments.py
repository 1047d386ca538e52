"""Statistics of rows that can be joined: those of a whole are known from its parts', without a look at the rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.format import codec
from actcache.io import loops

_PIECE = 1024  # rows that are decoded at once, where the compiled loop cannot


def row_norms(stored: NDArray[np.generic], dtype: str) -> NDArray[np.float32]:
    """Return the Euclidean norms of rows in the stored form of a recipe's ``dtype``: of ``[n, ..., hidden]`` those
    ``[n, ...]``."""
    decode = codec.get(dtype).decode
    norms = []
    for begin in range(0, len(stored), _PIECE):
        rows = np.asarray(decode(stored[begin : begin + _PIECE]), np.float32)
        norms.append(np.sqrt(np.einsum("...i,...i->...", rows, rows)))
    return np.concatenate(norms) if norms else np.empty(stored.shape[:-1], np.float32)


@dataclass(frozen=True)
class Moments:
    """What some rows are on the whole; all by dimension, ``[hidden]`` float64, but for the norms."""

    count: int  # rows
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]  # sums of squared distances from the mean
    maximum: NDArray[np.float64]  # -infinity where there are no rows
    norms: float  # the sum of the rows' Euclidean norms

    @property
    def variance(self) -> NDArray[np.float64]:
        """Of the rows that there are: with ``count`` below the fraction."""
        return self.squares / max(self.count, 1)

    @property
    def std(self) -> NDArray[np.float64]:
        return np.sqrt(self.variance)

    @property
    def mean_norm(self) -> float:
        """The mean of the rows' Euclidean norms; 0 where there are no rows."""
        return self.norms / max(self.count, 1)

    def to_json(self) -> dict[str, Any]:
        """Return what people ask for; ``maximum`` is null where there are no rows."""
        return {
            "rows": self.count,
            "mean_norm": self.mean_norm,
            "mean": self.mean.tolist(),
            "variance": self.variance.tolist(),
            "maximum": self.maximum.tolist() if self.count else None,
        }

    @classmethod
    def none(cls, hidden: int) -> Moments:
        return cls(0, np.zeros(hidden), np.zeros(hidden), np.full(hidden, -np.inf), 0.0)

    @classmethod
    def of(cls, stored: NDArray[np.generic], dtype: str, hidden: int) -> Moments:
        """Look at rows in the stored form of a recipe's ``dtype``, ``[n, ...]``."""
        if not len(stored):
            return cls.none(hidden)
        kind = codec.get(dtype)
        decode = kind.decode
        pivot = np.ascontiguousarray(decode(stored[:1])[0], np.float32)
        sums, squares, norms = np.zeros(hidden), np.zeros(hidden), np.zeros(1)
        most = np.full(hidden, -np.inf, np.float32)
        if not loops.moments(stored, kind.form, pivot, sums, squares, most, norms):
            for begin in range(0, len(stored), _PIECE):
                rows = np.ascontiguousarray(decode(stored[begin : begin + _PIECE]), np.float32)
                if loops.moments(rows, "float32", pivot, sums, squares, most, norms):
                    continue
                wide = rows.astype(np.float64)
                norms += np.sqrt((wide * wide).sum(axis=1)).sum()
                np.maximum(most, rows.max(axis=0), out=most)
                wide -= pivot
                sums += wide.sum(axis=0)
                squares += (wide * wide).sum(axis=0)
        beside = sums / len(stored)
        return cls(
            len(stored),
            pivot + beside,
            np.maximum(squares - beside * sums, 0.0),
            most.astype(np.float64),
            float(norms[0]),
        )

    def __add__(self, other: Moments) -> Moments:
        """Return what both parts are together (Chan, Golub and LeVeque, 1979)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        beside = other.mean - self.mean
        mean = self.mean + beside * (other.count / count)
        squares = self.squares + other.squares + beside**2 * (self.count * (other.count / count))
        return Moments(count, mean, squares, np.maximum(self.maximum, other.maximum), self.norms + other.norms)

    @classmethod
    def joined(cls, parts: Iterable[Moments], hidden: int) -> Moments:
        return sum(parts, cls.none(hidden))
