"""What the machine itself can do with the same rows: the limits that storage is held against.

Warm: a native gather (compiled: a copy of each document from a mapping), one ``torch.index_select`` from a mapping,
``memcpy`` of each document by NumPy, ``preadv``, NumPy ``take``, each at one and more threads, into the same reused
buffer, packed or padded with zeros; and passes of xxh3 over it, by Python and natively. Cold: direct reads of the same
extents, 8 and 16 at a time by Python, 16 and 32 natively.

Without torch, ``index_select`` is left out; ``take`` is the same in NumPy. Where the compiled loops cannot be used, the
native ways are left out.
"""

from __future__ import annotations

import importlib
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import StorageIOError
from actcache.format.ragged import offsets_of, row_indices
from actcache.io import loops
from actcache.io.loops import Column, Digests

_PAGE = 4096
_PIECE = 1 << 20  # of a coalesced direct read

Positions = NDArray[np.int64]
Rows = NDArray[np.float16]
Read = Callable[[Positions], None]


class FlatFile:
    """All rows in one file, and the ways to read a batch of documents from it.

    Args:
        path: raw rows, and a last one of zeros, which belongs to no document.
        outs: ``[rows, hidden]`` each, the reused buffers, which take turns batch by batch.
        threads: of the ways that use more than one.

    Attributes:
        sums: ``[n]`` the digests of the last native pass: of as many bytes as each document has, side by side.
    """

    sums: NDArray[np.uint64]

    def __init__(self, path: Path, lengths: Positions, hidden: int, outs: list[Rows], threads: int) -> None:
        self._torch: Any = importlib.import_module("torch") if find_spec("torch") else None
        self._starts = offsets_of(lengths)
        self._lengths = lengths
        self._row_bytes = hidden * 2
        self._outs = [(out, self._tensor_of(out)) for out in outs]
        self._turn()
        self._threads = threads
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        self._direct = -1
        self._rows = np.memmap(path, np.float16, "c").reshape(-1, hidden)
        self._tensor = self._tensor_of(self._rows)
        self._pool = ThreadPoolExecutor(16)
        self._aligned = threading.local()  # one buffer a thread for direct reads, which is used again

    def close(self) -> None:
        self._pool.shutdown()
        os.close(self._descriptor)
        if self._direct >= 0:
            os.close(self._direct)
        del self._tensor, self._rows

    def _tensor_of(self, rows: Rows) -> Any:
        return None if self._torch is None else self._torch.from_numpy(rows)

    def _turn(self) -> None:
        """Have the next batch go into the next buffer."""
        self._outs.append(self._outs.pop(0))
        self._out, self._out_tensor = self._outs[0]

    @property
    def filled(self) -> Rows:
        """The buffer that the last batch went into."""
        return self._out

    def smear(self) -> None:
        """Fill all buffers with what no document has."""
        for out, _ in self._outs:
            out[:] = np.nan

    def document(self, position: int) -> Rows:
        """Return a document's rows."""
        return self._rows[self._starts[position] :][: self._lengths[position]]

    def warm(self, *, padded: bool = False) -> dict[str, Read]:
        """Return the contestants; each reads the documents of a batch, given by position.

        Padded, each document takes up the rows of the longest of its batch, zeros behind its own.
        """
        ways: dict[str, Read] = {}
        if self._torch is not None:
            ways["index_select"] = self._spread(self._index_select, 1, padded)
        for threads in sorted({1, self._threads}):
            if not loops.missing:
                ways[f"native x{threads}"] = self._native(threads, padded)
            for name, part in (("memcpy", self._memcpy), ("preadv", self._preadv), ("take", self._take)):
                ways[f"{name} x{threads}"] = self._spread(part, threads, padded)
        return ways

    def cold(self) -> dict[str, Read]:
        """Return the contestants; each reads any number of documents without a pause in between.

        A ``StorageIOError`` says that the file system takes no direct reads.
        """
        self._open_direct()
        native = {} if loops.missing else {f"native direct x{n}": self._native_reads(n, self._direct) for n in (16, 32)}
        return {f"direct x{depth}": self._stream(depth) for depth in (8, 16)} | native

    def by_page_cache(self) -> dict[str, Read]:
        """Return the same reads by way of the page cache: what it costs that the next epoch finds all in memory."""
        if loops.missing:
            return {}
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return {"native x32, by the page cache": self._native_reads(32, self._descriptor)}

    def coalesced_warm(self) -> dict[str, Read]:
        """Return the ways to read as many bytes as a batch has, from one place."""
        ways: dict[str, Read] = {}
        for threads in sorted({1, self._threads}):
            ways[f"one memcpy x{threads}"] = self._together(self._copy_stretch, threads)
            ways[f"one preadv x{threads}"] = self._together(self._read_stretch, threads)
        return ways

    def coalesced_cold(self) -> dict[str, Read]:
        """Return the ways to read as many bytes as a batch has by direct reads of one place; raises as ``cold``."""
        self._open_direct()
        return {f"one direct x{depth}": self._together(self._direct_stretch, depth) for depth in (8, 16)}

    def _open_direct(self) -> None:
        if self._direct >= 0:
            return
        try:
            self._direct = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        except (AttributeError, OSError) as error:
            raise StorageIOError(
                f"{self._path.parent} takes no direct reads ({error}), which are the limit of a cold read: "
                "take a folder on a local disk, or measure warm"
            ) from None

    def digests(self) -> dict[str, Read]:
        """Return xxh3 passes over as many bytes of the buffer as a batch has: by Python, on one thread and shared by
        all; and a digest for each document's length, natively."""

        def data_of(which: Positions) -> memoryview:
            self._turn()
            return self._out.reshape(-1).view(np.uint8).data[: int(self._lengths[which].sum()) * self._row_bytes]

        def one(which: Positions) -> None:
            xxhash.xxh3_64_intdigest(data_of(which))

        def shared(which: Positions) -> None:
            data = data_of(which)
            cuts = [len(data) * i // self._threads for i in range(self._threads + 1)]
            list(self._pool.map(lambda i: xxhash.xxh3_64_intdigest(data[cuts[i] : cuts[i + 1]]), range(self._threads)))

        native = {} if loops.missing else {f"xxh3 native x{n}": self._digest(n) for n in sorted({1, self._threads})}
        return {"xxh3 one": one, "xxh3 shared": shared, **native}

    def _digest(self, threads: int) -> Read:
        def read(which: Positions) -> None:
            self._turn()
            self.sums = np.empty(len(which), np.uint64)
            lengths = self._lengths[which]
            bounds = offsets_of(lengths)
            column = Column(self._row_bytes, memory=self._out, begins=bounds[:-1] * self._row_bytes)
            digests = Digests(1, seeds=np.zeros(len(which), np.uint64), sums=self.sums)
            if len(loops.gather([column], lengths, bounds, digests, threads=threads)):
                raise RuntimeError("the native digests did not reach all documents of the buffer")

        return read

    def _native(self, threads: int, padded: bool) -> Read:
        """Have the compiled loop copy each document to its place; it shares the work among threads by itself."""

        def read(which: Positions) -> None:
            self._turn()
            lengths, begins = self._lengths[which], self._starts[which] * self._row_bytes
            bounds = offsets_of(np.full(len(which), lengths.max()) if padded else lengths)
            column = Column(self._row_bytes, self._out, self._rows, begins)
            if len(loops.gather([column], lengths, bounds, threads=threads)):
                raise RuntimeError("the native gather did not bring all documents")

        return read

    def _spread(self, part: Callable[[Positions, Positions], None], threads: int, padded: bool) -> Read:
        """Have each thread bring its part of a batch: ``part(documents, bounds of the rows of each in the buffer)``."""

        def read(which: Positions) -> None:
            self._turn()
            lengths = self._lengths[which]
            bounds = offsets_of(np.full(len(which), lengths.max()) if padded else lengths)
            cuts = [(len(which) * i // threads, len(which) * (i + 1) // threads) for i in range(threads)]
            if threads == 1:
                part(which, bounds)
            else:
                list(self._pool.map(lambda cut: part(which[slice(*cut)], bounds[cut[0] : cut[1] + 1]), cuts))

        return read

    def _stream(self, depth: int) -> Read:
        """Have ``depth`` threads read, each the next few documents when it is done with some."""

        def read(which: Positions) -> None:
            few = max(1, int(_PIECE / (self._lengths[which].mean() * self._row_bytes)))
            parts = deque(which[i : i + few] for i in range(0, len(which), few))

            def work() -> None:
                while True:
                    try:
                        some = parts.popleft()
                    except IndexError:
                        return
                    for start, length in zip(self._starts[some].tolist(), self._lengths[some].tolist(), strict=True):
                        self._direct_read(start * self._row_bytes, (start + length) * self._row_bytes)

            for future in [self._pool.submit(work) for _ in range(depth)]:
                future.result()

        return read

    def _native_reads(self, depth: int, descriptor: int) -> Read:
        """Have the compiled loop read, ``depth`` documents at a time, into the buffer, over and over."""

        def read(which: Positions) -> None:
            self._turn()
            lengths, places = self._lengths[which], self._starts[which] * self._row_bytes
            files = np.full(len(which), descriptor, np.int32)
            starts = offsets_of(lengths)[:-1] % max(1, len(self._out) - int(lengths.max()))
            column = Column(self._row_bytes, self._out, files=files, places=places)
            bounds = np.stack([starts, starts + lengths])
            if len(loops.gather([column], lengths, bounds, threads=depth, direct=descriptor == self._direct)):
                raise RuntimeError("the native reads did not bring all documents")

        return read

    def _together(self, part: Callable[[int, int, int], None], threads: int) -> Read:
        """Have each thread read its part of one stretch: ``part(first, last, at)``, rows."""

        def read(which: Positions) -> None:
            count = int(self._lengths[which].sum())
            first = min(int(self._starts[which[0]]), len(self._rows) - count)
            cuts = [count * i // threads for i in range(threads + 1)]
            if threads == 1:
                part(first, first + count, 0)
            else:
                list(self._pool.map(lambda at, end: part(first + at, first + end, at), cuts[:-1], cuts[1:]))

        return read

    def _copy_stretch(self, first: int, last: int, at: int) -> None:
        self._out[at : at + last - first] = self._rows[first:last]

    def _read_stretch(self, first: int, last: int, at: int) -> None:
        view = self._out.reshape(-1).view(np.uint8).data[at * self._row_bytes : (at + last - first) * self._row_bytes]
        os.preadv(self._descriptor, [view], first * self._row_bytes)

    def _direct_stretch(self, first: int, last: int, at: int) -> None:
        begin, end = first * self._row_bytes // _PAGE * _PAGE, last * self._row_bytes
        for offset in range(begin, end, _PIECE):
            self._direct_read(offset, min(offset + _PIECE, end))

    def _direct_read(self, begin: int, end: int) -> None:
        """Read the pages of some bytes into memory of this thread."""
        begin, end = begin // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE
        buffer = getattr(self._aligned, "buffer", None)
        if buffer is None or len(buffer) < end - begin:
            self._aligned.buffer = buffer = memoryview(mmap.mmap(-1, max(2 * _PIECE, end - begin)))
        os.preadv(self._direct, [buffer[: end - begin]], begin)

    def _index_select(self, which: Positions, bounds: Positions) -> None:
        rows = self._source_rows(which, bounds)
        self._torch.index_select(self._tensor, 0, self._torch.from_numpy(rows), out=self._out_tensor[: len(rows)])

    def _take(self, which: Positions, bounds: Positions) -> None:
        rows = self._source_rows(which, bounds)
        np.take(self._rows, rows, axis=0, out=self._out[bounds[0] : bounds[-1]], mode="clip")

    def _source_rows(self, which: Positions, bounds: Positions) -> Positions:
        """Return the row of the file for each row of the buffer."""
        starts, lengths = self._starts[which], self._lengths[which]
        if int(bounds[-1] - bounds[0]) == int(lengths.sum()):
            return row_indices(starts, lengths, None)
        column = np.arange(bounds[1] - bounds[0])
        return np.where(column < lengths[:, None], starts[:, None] + column, len(self._rows) - 1).reshape(-1)

    def _extents(self, which: Positions, bounds: Positions) -> Iterator[tuple[int, int, int, int]]:
        starts, lengths, begins = self._starts[which].tolist(), self._lengths[which].tolist(), bounds.tolist()
        return zip(starts, lengths, begins[:-1], begins[1:], strict=True)

    def _memcpy(self, which: Positions, bounds: Positions) -> None:
        for start, length, begin, end in self._extents(which, bounds):
            self._out[begin : begin + length] = self._rows[start : start + length]
            if begin + length < end:
                self._out[begin + length : end] = 0

    def _preadv(self, which: Positions, bounds: Positions) -> None:
        data = self._out.reshape(-1).view(np.uint8).data
        size = self._row_bytes
        for start, length, begin, end in self._extents(which, bounds):
            os.preadv(self._descriptor, [data[begin * size : (begin + length) * size]], start * size)
            if begin + length < end:
                self._out[begin + length : end] = 0
