"""Ragged blocks: the rows of many entries, one after another, where each begins, and where the arrays lie in files.

The one schema that every backend stores (docs/format.md). All arrays of ``columns`` have T rows; entry i is rows
``offsets[i]:offsets[i + 1]`` of each of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.errors import FormatError
from actcache.io import loops
from actcache.io.loops import Placing, Pooled

T = TypeVar("T")

VALUES = "values"
TOKEN_IDS = "token_ids"
OWN = "columns"  # the caller's own, as records of bytes (``format.columns``)
PAYLOAD = "payload"  # what a segment has instead of values where they are compressed: the entries' frames
PAYLOAD_OFFSETS = "payload_offsets"
_DTYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}
CHUNK_BYTES = 1 << 20  # of rows that are read, then checked (docs/decisions/0002)

#: The optional ragged arrays: name -> (dtype, trailing shape). Labels cannot be aligned without them.
EXTRAS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "spans": ("<i4", (2,)),  # character span of each token in its text, [start, end)
    "word_ids": ("<i4", ()),  # number of the word each token belongs to, -1 for special tokens
    "type_ids": ("|i1", ()),  # token type ids, 1 for the second text of a pair
}


@dataclass(frozen=True)
class Pieces:
    """A column that is made while it is written, so that a block of any size fits into little memory."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], Iterator[NDArray[np.generic]]]  # C-contiguous pieces along the first axis, in order

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


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


Column = NDArray[np.generic] | Pieces


def pieces(column: Column) -> Iterator[memoryview]:
    """Yield the bytes of a column, piece by piece."""
    for array in column.make() if isinstance(column, Pieces) else (column,):
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@dataclass(frozen=True)
class Origins:
    """Where the entries of a compacted block come from: the segment each was first written to, and its number there.

    That never changes, however often it is copied: deletions name it, and of two copies the later origin's is served.
    """

    segments: tuple[str, ...]  # their names
    segment: NDArray[np.uint32]  # [n] position in ``segments``
    entries: NDArray[np.uint32]  # [n] number of the entry in that segment
    sources: tuple[str, ...]  # names of the segments that the block replaces

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return the arrays by their stored names."""
        return {
            "origins": names_to_array(self.segments),
            "origin": self.segment,
            "origin_entries": self.entries,
            "sources": names_to_array(self.sources),
            "origins_checksum": np.array([self.checksum()], np.uint64),
        }

    def checksum(self) -> int:
        """Return the XXH3-64 of the arrays: with a wrong origin, an entry that was deleted would be served again."""
        digest = xxhash.xxh3_64(names_to_array(self.segments).tobytes())
        for array in (self.segment, self.entries, names_to_array(self.sources)):
            digest.update(array.tobytes())
        return digest.intdigest()


def names_to_array(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return names of segments as ``[n, 14]`` bytes, which their hexadecimal digits stand for."""
    return np.frombuffer(bytes.fromhex("".join(names).replace("-", "")), np.uint8).reshape(len(names), 14)


def names_from_array(array: NDArray[np.uint8]) -> tuple[str, ...]:
    """Return the names of segments from ``[n, 14]`` bytes."""
    return tuple(f"{digits[:12]}-{digits[12:]}" for digits in (row.tobytes().hex() for row in array))


@dataclass(frozen=True)
class Block:
    """Entries in stored form.

    ``checksums`` binds values, token ids and key (``actcache.format.checksum``); ``extra_checksums`` the optional
    arrays, and is None where there are none. Only the first column may be ``Pieces``: ``values``, or ``payload`` where
    they are compressed (``actcache.format.frames``), as they are in the files of a space whose columns have one.
    """

    keys: NDArray[np.uint8]  # [n, 32]
    offsets: NDArray[np.int64]  # [n + 1]
    checksums: NDArray[np.uint64]  # [n]
    columns: Mapping[str, Column]  # always with ``values`` [T, width] in the stored dtype, or ``payload`` [P]
    extra_checksums: NDArray[np.uint64] | None = None
    origins: Origins | None = None  # None where the entries are written for the first time
    payload_offsets: NDArray[np.int64] | None = None  # [n + 1] where each entry's frame begins in ``payload``

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def arrays(self) -> dict[str, Column]:
        """Return all arrays by their stored names, ``values`` (or ``payload``) first."""
        first = VALUES if self.payload_offsets is None else PAYLOAD
        arrays: dict[str, Column] = {
            first: self.columns[first],
            "offsets": self.offsets,
            "keys": self.keys,
            "checksums": self.checksums,
        }
        if self.origins is not None:
            arrays |= self.origins.arrays()
        if self.extra_checksums is not None:
            arrays["extra_checksums"] = self.extra_checksums
        if self.payload_offsets is not None:
            arrays[PAYLOAD_OFFSETS] = self.payload_offsets
        return arrays | {name: column for name, column in self.columns.items() if name != first}


def offsets_of(lengths: NDArray[np.integer[Any]], width: int | None = None) -> NDArray[np.int64]:
    """Return ``[n + 1]`` offsets from ``[n]`` lengths; with ``width``, of entries that are padded to so many."""
    if width is not None:
        return np.arange(len(lengths) + 1, dtype=np.int64) * width
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def placed(
    out: Mapping[str, NDArray[np.generic]],
    placing: Mapping[str, Placing],
    lengths: NDArray[np.int64],
    read: Callable[[Mapping[str, NDArray[np.generic]]], T],
) -> T:
    """Have the rows of entries read into packed buffers, then brought from there to where they belong in ``out``.

    Args:
        placing: of those arrays that are not packed in ``out``, by their names.
        lengths: ``[n]`` rows of each entry.
    """
    offsets = offsets_of(lengths)
    packed = dict(out)
    for name, of in placing.items():
        dtype = _DTYPES[of.form] if isinstance(of, Pooled) and of.how != "at" else out[name].dtype
        packed[name] = np.empty((int(offsets[-1]), *out[name].shape[1:]), dtype)
    result = read(packed)
    for name, of in placing.items():
        row_bytes = loops.stored_row(out[name], of)[0]
        column = loops.Column(row_bytes, out[name], packed[name], offsets[:-1] * row_bytes, placing=of)
        loops.gather([column], np.ascontiguousarray(lengths, np.int64), offsets)
    return result


def runs(sizes: NDArray[np.integer[Any]], most: int) -> Iterator[slice]:
    """Return runs of neighbouring items whose sizes (``[n]``) add up to about ``most``; together they are all.

    A run ends with the item that reaches the next multiple of ``most``: work is cut into parts of like size by it.
    """
    starts = offsets_of(sizes)
    inner = np.searchsorted(starts, np.arange(most, starts[-1], most)).tolist()
    return itertools.starmap(slice, itertools.pairwise(dict.fromkeys([0, *inner, len(sizes)])))


def chunks(lengths: NDArray[np.int64], width: int | None, out: Mapping[str, NDArray[np.generic]]) -> Iterator[slice]:
    """Cut a batch into runs of entries whose rows are still in the processor's cache when they are checked (see
    ``row_indices``)."""
    row_bytes, count = max(buffer.strides[0] for buffer in out.values()), len(lengths)
    if (int(lengths.sum()) if width is None else count * width) * row_bytes <= CHUNK_BYTES:
        return iter([slice(0, count)])  # a small batch is not planned longer than it is read
    return runs((lengths if width is None else np.full(count, width)) * row_bytes, CHUNK_BYTES)


def check_offsets(offsets: NDArray[np.int64], entries: int, tokens: int, where: str) -> None:
    """Refuse offsets that do not cut ``tokens`` rows into ``entries`` entries of one row or more: a ``FormatError``,
    naming ``where``."""
    ends = [*offsets[:1], *offsets[-1:]]
    if len(offsets) != entries + 1 or ends != [0, tokens] or not (np.diff(offsets) > 0).all():
        raise FormatError(f"{where}: its offsets do not cut {tokens} rows into {entries} entries")


def row_indices(starts: NDArray[np.int64], lengths: NDArray[np.int64], width: int | None) -> NDArray[np.int64]:
    """Return the source row of every row of a batch; row 0 stands for padding.

    Args:
        starts, lengths: ``[n]`` first source row of each entry, and how many it has.
        width: None for packed rows, ``[sum(lengths)]``; else each entry is padded to ``width``, ``[n * width]``.
    """
    if width is None:
        offsets = offsets_of(lengths)
        return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    column = np.arange(width)
    return np.where(column < lengths[:, None], starts[:, None] + column, 0).reshape(-1)
