"""What the machine itself can do with the same rows: the limits that storage is held against.

Warm: one ``torch.index_select`` from a mapping, ``memcpy`` of each document, ``preadv``, NumPy ``take``, each at one
and more threads, into the same reused buffer. Cold: direct reads of the same extents, 8 and 16 at a time.

One coalesced read is what the same number of bytes costs that lie side by side: warm, one copy of the stretch; cold,
direct reads of it in large pieces.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xxhash

from actcache.ragged import offsets_of, row_indices

_PAGE = 4096
_PIECE = 1 << 20  # of a coalesced direct read


class FlatFile:
    """All rows in one file, and the ways to read a batch of documents from it.

    Args:
        path: raw rows.
        lengths: of the documents, in the order of the file.
        hidden: columns, float16.
        out: ``[rows, hidden]``, the reused buffer.
    """

    def __init__(self, path: Path, lengths: np.ndarray, hidden: int, out: np.ndarray, threads: int) -> None:
        self._starts = offsets_of(lengths)
        self._lengths = lengths
        self._row_bytes = hidden * 2
        self._out = out
        self._threads = threads
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._rows = np.memmap(path, np.float16, "c").reshape(-1, hidden)
        self._tensor, self._out_tensor = torch.from_numpy(self._rows), torch.from_numpy(out)
        self._pool = ThreadPoolExecutor(16)

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)
        os.close(self._direct)
        del self._tensor, self._rows

    def warm(self) -> dict[str, Callable[[np.ndarray], None]]:
        """Return the contestants; each reads the documents of a batch, given by position."""
        ways: dict[str, Callable[[np.ndarray], None]] = {"index_select": self._index_select}
        for threads in sorted({1, self._threads}):
            ways[f"memcpy x{threads}"] = self._spread(self._memcpy, threads)
            ways[f"preadv x{threads}"] = self._spread(self._preadv, threads)
            ways[f"take x{threads}"] = self._spread(self._take, threads)
        return ways

    def cold(self) -> dict[str, Callable[[np.ndarray], None]]:
        return {f"direct x{depth}": self._spread(self._direct_reads, depth) for depth in (8, 16)}

    def coalesced_warm(self) -> dict[str, Callable[[np.ndarray], None]]:
        """Return the ways to read as many bytes as a batch has, from one place."""
        ways: dict[str, Callable[[np.ndarray], None]] = {}
        for threads in sorted({1, self._threads}):
            ways[f"one memcpy x{threads}"] = self._together(self._copy_stretch, threads)
            ways[f"one preadv x{threads}"] = self._together(self._read_stretch, threads)
        return ways

    def coalesced_cold(self) -> dict[str, Callable[[np.ndarray], None]]:
        return {f"one direct x{depth}": self._together(self._direct_stretch, depth) for depth in (8, 16)}

    def hash_passes(self, which: np.ndarray) -> dict[str, Callable[[], None]]:
        """Return one xxh3 pass over the bytes of a batch, on one thread and shared by all."""
        nbytes = int(self._lengths[which].sum()) * self._row_bytes
        data = self._out.reshape(-1).view(np.uint8).data[:nbytes]

        def shared() -> None:
            cuts = [nbytes * i // self._threads for i in range(self._threads + 1)]
            list(self._pool.map(lambda i: xxhash.xxh3_64_intdigest(data[cuts[i] : cuts[i + 1]]), range(self._threads)))

        return {"one": lambda: (xxhash.xxh3_64_intdigest(data), None)[1], "shared": shared}

    def _spread(self, part: Callable[[np.ndarray, int], None], threads: int) -> Callable[[np.ndarray], None]:
        def read(which: np.ndarray) -> None:
            offsets = offsets_of(self._lengths[which])
            cuts = [len(which) * i // threads for i in range(threads + 1)]
            if threads == 1:
                part(which, 0)
            else:
                jobs = range(threads)
                list(self._pool.map(lambda i: part(which[cuts[i] : cuts[i + 1]], int(offsets[cuts[i]])), jobs))

        return read

    def _together(self, part: Callable[[int, int, int], None], threads: int) -> Callable[[np.ndarray], None]:
        """Have each thread read its part of one stretch: ``part(first, last, at)``, rows."""

        def read(which: np.ndarray) -> None:
            count = int(self._lengths[which].sum())
            first = min(int(self._starts[which[0]]), len(self._rows) - count)
            cuts = [count * i // threads for i in range(threads + 1)]
            if threads == 1:
                part(first, first + count, 0)
            else:
                jobs = range(threads)
                list(self._pool.map(lambda i: part(first + cuts[i], first + cuts[i + 1], cuts[i]), jobs))

        return read

    def _copy_stretch(self, first: int, last: int, at: int) -> None:
        self._out[at : at + last - first] = self._rows[first:last]

    def _read_stretch(self, first: int, last: int, at: int) -> None:
        view = self._out.reshape(-1).view(np.uint8).data[at * self._row_bytes : (at + last - first) * self._row_bytes]
        os.preadv(self._descriptor, [view], first * self._row_bytes)

    def _direct_stretch(self, first: int, last: int, at: int) -> None:
        begin, end = first * self._row_bytes // _PAGE * _PAGE, last * self._row_bytes
        with _aligned(_PIECE) as buffer:
            for offset in range(begin, end, _PIECE):
                os.preadv(self._direct, [buffer[: -(-min(_PIECE, end - offset) // _PAGE) * _PAGE]], offset)

    def _index_select(self, which: np.ndarray) -> None:
        rows = torch.from_numpy(row_indices(self._starts[which], self._lengths[which], None))
        torch.index_select(self._tensor, 0, rows, out=self._out_tensor[: len(rows)])

    def _take(self, which: np.ndarray, at: int) -> None:
        rows = row_indices(self._starts[which], self._lengths[which], None)
        np.take(self._rows, rows, axis=0, out=self._out[at : at + len(rows)], mode="clip")

    def _extents(self, which: np.ndarray, at: int) -> Iterator[tuple[int, int, int]]:
        for start, length in zip(self._starts[which].tolist(), self._lengths[which].tolist(), strict=True):
            yield start, length, at
            at += length

    def _memcpy(self, which: np.ndarray, at: int) -> None:
        for start, length, begin in self._extents(which, at):
            self._out[begin : begin + length] = self._rows[start : start + length]

    def _preadv(self, which: np.ndarray, at: int) -> None:
        data = self._out.reshape(-1).view(np.uint8).data
        size = self._row_bytes
        for start, length, begin in self._extents(which, at):
            os.preadv(self._descriptor, [data[begin * size : (begin + length) * size]], start * size)

    def _direct_reads(self, which: np.ndarray, at: int) -> None:
        longest = int(self._lengths.max()) * self._row_bytes + 2 * _PAGE
        with _aligned(longest) as buffer:
            for start, length, _ in self._extents(which, at):
                begin, end = start * self._row_bytes, (start + length) * self._row_bytes
                first = begin // _PAGE * _PAGE
                os.preadv(self._direct, [buffer[: -(-(end - first) // _PAGE) * _PAGE]], first)


@contextmanager
def _aligned(nbytes: int) -> Iterator[memoryview]:
    with mmap.mmap(-1, nbytes) as area, memoryview(area) as view:
        yield view
