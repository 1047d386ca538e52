"""Copies of many entries' rows from the mapped file into one buffer, in few native calls that free the GIL."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from actcache.backend import offsets_of

_SLICE_BYTES = 64 << 10  # longer entries are copied one by one, shorter ones in one native call a chunk
_LEAST_UNIT = 64  # bytes that such a call moves at a time
_MOST_NUMBERS = 1 << 22


def copier(
    memory: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.generic],
    width: int | None,
) -> Callable[[int, int], None]:
    """Return a function that copies the rows of entries first..last-1; several threads may call it.

    Args:
        begins: ``[n]`` where each entry's rows begin in ``memory``.
        lengths: ``[n]`` rows of each.
        out: rows of the whole batch; packed, or padded with zeros to ``width`` rows an entry.
    """
    row_bytes = out.strides[0]
    target = out.reshape(-1).view(np.uint8)
    starts = offsets_of(lengths if width is None else np.full(len(lengths), width))
    unit = math.gcd(4096, row_bytes)
    mean = int(lengths.sum()) * row_bytes // max(1, len(lengths))
    if unit < _LEAST_UNIT:
        unit = row_bytes
    if width is None and mean < _SLICE_BYTES and (unit >= _LEAST_UNIT or row_bytes in (1, 4, 8)):
        present = begins[lengths > 0]
        if not ((present - present[0]) % unit).any():
            return _taker(memory, begins, lengths * (row_bytes // unit), target, unit, int(present[0] % unit))
    bounds = (starts * row_bytes).tolist()
    sources, sizes = begins.tolist(), (lengths * row_bytes).tolist()

    def copy(first: int, last: int) -> None:
        for i in range(first, last):
            begin, size = bounds[i], sizes[i]
            source, end = sources[i], begin + size
            target[begin:end] = memory[source : source + size]
            if end < bounds[i + 1]:
                target[end : bounds[i + 1]] = 0

    return copy


_numbers = np.arange(1 << 16)


def _ascending(count: int) -> NDArray[np.int64]:
    """Return an array that begins with 0 .. count - 1; made once, as making it costs as much as a third of a copy."""
    global _numbers
    numbers = _numbers
    if len(numbers) < count:
        numbers = np.arange(2 * count)
        if count <= _MOST_NUMBERS:
            _numbers = numbers
    return numbers


def _taker(
    memory: NDArray[np.uint8],
    begins: NDArray[np.int64],
    counts: NDArray[np.int64],
    target: NDArray[np.uint8],
    unit: int,
    shift: int,
) -> Callable[[int, int], None]:
    """Copy by one ``take`` a chunk: for short entries, a loop is what would cost.

    Args:
        counts: ``[n]`` units of each entry.
        shift: how far all ``begins`` are off a multiple of ``unit``.
    """
    kind = np.dtype((np.void, unit)) if unit > 8 else np.dtype(f"u{unit}")
    units = memory[shift : shift + (len(memory) - shift) // unit * unit].view(kind)
    bounds = offsets_of(counts)
    ascending = _ascending(int(bounds[-1]))
    starts = (begins - shift) // unit - bounds[:-1]
    whole = target[: int(bounds[-1]) * unit].view(kind)

    def copy(first: int, last: int) -> None:
        begin, end = int(bounds[first]), int(bounds[last])
        index = np.repeat(starts[first:last], counts[first:last])
        index += ascending[begin:end]
        np.take(units, index, axis=0, out=whole[begin:end], mode="clip")

    return copy
