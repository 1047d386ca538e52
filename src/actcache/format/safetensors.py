"""Files of named arrays in the safetensors format: a length, JSON that says where each array lies, the arrays.

Read and written here, and not by the safetensors library, because files are mapped in place or read over a network,
and because their header is checked before any memory is allocated by what it says. Any safetensors reader opens them.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError
from actcache.format.ragged import Extent

LENGTH_BYTES = 8  # of the header's length, which stands before it
_ALIGN = 64
_MAX_HEADER = 64 << 20  # JSON takes ten times as much memory as text
_METADATA = "__metadata__"

_NAMES = {"U8": "|u1", "I8": "|i1", "F16": "<f2", "U16": "<u2", "F32": "<f4", "I32": "<i4", "U32": "<u4"}
_NAMES |= {"I64": "<i8", "U64": "<u8", "F64": "<f8", "I16": "<i2"}
_DTYPES = {np.dtype(dtype): name for name, dtype in _NAMES.items()}

#: Name, dtype and shape of an array.
Described = tuple[str, np.dtype[Any], tuple[int, ...]]
Arrays = Mapping[str, NDArray[np.generic]]


def header(arrays: Sequence[Described], metadata: Mapping[str, str], *, align: int, lead: int = 0) -> bytes:
    """Return what stands before the arrays, which follow one another in this order; the byte ``lead`` bytes behind the
    header falls on a multiple of ``align``."""
    described: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in arrays:
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        described[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES + lead) % align)
    return struct.pack("<Q", len(text)) + text


def header_length(head: bytes, size: int, most: int) -> int:
    """Return the bytes of the header of a file of ``size`` bytes; ``ValueError`` where ``head``, its first bytes, are
    no length of a header of ``most`` bytes or less."""
    declared = int(struct.unpack("<Q", head[:LENGTH_BYTES])[0]) if len(head) >= LENGTH_BYTES else 0
    if not 0 < declared <= min(size - LENGTH_BYTES, most):
        raise ValueError(f"a header of {declared} bytes in a file of {size}")
    return declared


def parse_header(text: bytes, size: int) -> tuple[dict[str, str], dict[str, Extent]]:
    """Return a file's metadata and where its arrays lie; ``ValueError`` where ``text`` is no header of such a file.

    Args:
        text: the header, without its length.
        size: bytes of the file, all of which have to belong to the header or to one array.
    """
    try:
        described = json.loads(text, object_pairs_hook=_unique)
        metadata = described.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        extents, parts = {}, []
        for name, entry in described.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _NAMES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
                raise ValueError(f"{name[:100]!r} has sizes that are no sizes")
            if end - begin != np.dtype(dtype).itemsize * math.prod(shape):
                raise ValueError(f"{name[:100]!r} does not fill its place")
            extents[name] = Extent("", LENGTH_BYTES + len(text) + begin, dtype, shape)
            parts.append((begin, end))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{error!r:.200}") from None
    expected = 0
    for begin, end in sorted(parts):
        if begin != expected:
            raise ValueError("its arrays overlap, or leave holes")
        expected = end
    if LENGTH_BYTES + len(text) + expected != size:
        raise ValueError(f"it has {size} bytes and should have {LENGTH_BYTES + len(text) + expected}")
    return metadata, extents


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def write(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write arrays and metadata to a new file. Arrays with the widest items come first, so all of them are aligned."""
    with open(path, "xb") as file:
        file.writelines(_parts(arrays, metadata))


def dumps(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """Return what ``write`` writes."""
    return b"".join(_parts(arrays, metadata))


def _parts(arrays: Arrays, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    yield header([(name, a.dtype, a.shape) for name, a in ordered], metadata, align=_ALIGN)
    for _, array in ordered:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _layout(file: BinaryIO, where: str) -> tuple[dict[str, str], dict[str, Extent]]:
    """Return a file's metadata and where its arrays lie, all checked against the size of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        text = file.read(header_length(file.read(LENGTH_BYTES), size, _MAX_HEADER))
        return parse_header(text, size)
    except ValueError as error:
        raise FormatError(f"{where} is truncated or no file of this store: {error}") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to be mapped; a pipe would block, and a device has no end. ``FormatError``: it is no regular file, or
    cannot be read; ``FileNotFoundError``: there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EACCES):
            raise FormatError(f"{path} cannot be read: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{path} is no file")
    return open(descriptor, "rb")


def mapped(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return a file's metadata and its arrays, read-only, mapped in place. Raises as ``open_regular``; ``FormatError``
    also where it is truncated or foreign."""
    with open_regular(path) as file:
        metadata, extents = _layout(file, str(path))
        # One mapping for all: each of Python's keeps a file descriptor for as long as it lives.
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    return metadata, _views(whole, extents)


def loads(data: bytes, where: str) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return the metadata and arrays, read-only views, of what ``dumps`` returned; ``FormatError``, naming ``where``,
    where the data are truncated or foreign."""
    metadata, extents = _layout(io.BytesIO(data), where)
    return metadata, _views(np.frombuffer(data, np.uint8), extents)


def _views(data: NDArray[np.uint8], extents: Mapping[str, Extent]) -> dict[str, NDArray[np.generic]]:
    return {
        name: data[extent.offset : extent.offset + extent.nbytes].view(extent.dtype).reshape(extent.shape)
        for name, extent in extents.items()
    }
