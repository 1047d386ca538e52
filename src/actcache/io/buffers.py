"""Host buffers that are used again and again, once nobody looks into them any more.

A fresh buffer of a hundred megabytes costs as much in page faults as filling it. A user may keep a batch for as long as
he likes, though: a buffer is free when nothing but this pool refers to its memory, which its reference count says.
"""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

SMALL = 64 << 10  # bytes: half of what glibc maps anew for each allocation
_LINE = 64  # bytes of a line of the processor's cache: rows that fill whole ones are written without reading them


class BufferPool:
    """A few buffers of bytes, ``most`` of which are kept; where all are in use, more are made and left to the
    collector. Arrays of fewer than ``least`` bytes are fresh ones: the allocator keeps so much at hand itself.
    Thread-safe."""

    def __init__(self, most: int, least: int = 0) -> None:
        self._most, self._least = most, least
        self._buffers: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return an array whose contents are anything, and that is nobody else's while it or a view of it lives.

        Views (slices, ``torch.from_numpy``, ...) refer to the array that owns the memory, so that its reference count
        tells; this holds for CPython with a global lock, and elsewhere a buffer is simply not used again.
        """
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if nbytes < self._least:
            return np.empty(shape, dtype)
        with self._lock:
            buffer = self._free(nbytes)
            first = -buffer.ctypes.data % _LINE
            # The view is made under the lock: from now on the buffer counts as used.
            array: NDArray[Any] = buffer[first : first + nbytes].view(dtype).reshape(shape)
            return array

    def give_back(self, array: NDArray[Any], copied: Any) -> None:
        """Do nothing: the reference count tells."""

    def _free(self, nbytes: int) -> NDArray[np.uint8]:
        smallest = None
        for i in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[i]) == _UNUSED:
                if self._buffers[i].nbytes >= nbytes + _LINE:
                    return self._buffers[i]
                smallest = i
        buffer = np.empty(nbytes + nbytes // 8 + _LINE, np.uint8)  # a little more: the next batch may be longer
        if smallest is not None:
            self._buffers[smallest] = buffer
        elif len(self._buffers) < self._most:
            self._buffers.append(buffer)
        return buffer


def _references_to_an_element() -> int:
    """Return what ``sys.getrefcount(some_list[0])`` says of an array that nothing but the list refers to."""
    some_list = [np.empty(1, np.uint8)]
    return sys.getrefcount(some_list[0])


_UNUSED = _references_to_an_element()
