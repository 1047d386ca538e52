"""Small files of named arrays in the safetensors format: the index and collections.

Written and read here, and not by the safetensors library, because the index is mapped in place and its header is
checked before any memory is allocated by what it says. Any safetensors reader opens the files.
"""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Extent
from actcache.errors import FormatError

_ALIGN = 64
_MAX_HEADER = 256 << 20
_NAMES = {
    "U8": "|u1",
    "I8": "|i1",
    "F16": "<f2",
    "U16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
}
_DTYPES = {np.dtype(dtype): name for name, dtype in _NAMES.items()}


Arrays = Mapping[str, NDArray[np.generic]]


def write(path: Path, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    """Write arrays and metadata to a new file. Arrays with the widest items come first, so all of them are aligned."""
    with open(path, "xb") as file:
        for part in _parts(arrays, metadata):
            file.write(part)


def dumps(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """Return what ``write`` writes."""
    return b"".join(_parts(arrays, metadata))


def _parts(arrays: Arrays, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    yield _header(ordered, metadata)
    for _, array in ordered:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _header(arrays: list[tuple[str, NDArray[np.generic]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays:
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return struct.pack("<Q", len(text)) + text


def _layout(file: BinaryIO, where: str) -> tuple[dict[str, str], dict[str, Extent]]:
    """Return a file's metadata and where its arrays lie, all checked against the size of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= min(size - 8, _MAX_HEADER):
        raise FormatError(f"{where} is truncated or no file of this store")
    text = file.read(length)
    try:
        header = json.loads(text)
        metadata = {str(name): str(value) for name, value in header.pop("__metadata__", {}).items()}
        extents = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            extent = Extent("", 8 + length + begin, _NAMES[entry["dtype"]], tuple(entry["shape"]))
            sizes = (begin, end, *extent.shape)
            if not all(type(number) is int and number >= 0 for number in sizes):
                raise ValueError(f"{name} has sizes that are no sizes")
            if extent.nbytes != end - begin or extent.offset + extent.nbytes > size:
                raise ValueError(f"{name} does not fit the file")
            extents[name] = extent
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} is truncated or no file of this store: {error}") from None
    return metadata, extents


def mapped(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return a file's metadata and its arrays, read-only, mapped in place.

    Raises:
        FormatError: the file is truncated or foreign.
        FileNotFoundError: there is none.
    """
    with open(path, "rb") as file:
        metadata, extents = _layout(file, str(path))
        # One mapping for all: each of Python's keeps a file descriptor for as long as it lives.
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
    return metadata, {
        name: whole[extent.offset : extent.offset + extent.nbytes].view(extent.dtype).reshape(extent.shape)
        for name, extent in extents.items()
    }


def loads(data: bytes, where: str) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return the metadata and arrays, read-only views, of what ``dumps`` returned.

    Args:
        where: how an error names the data.

    Raises:
        FormatError: the data are truncated or foreign.
    """
    metadata, extents = _layout(io.BytesIO(data), where)
    return metadata, {
        name: np.frombuffer(data, np.uint8, extent.nbytes, extent.offset).view(extent.dtype).reshape(extent.shape)
        for name, extent in extents.items()
    }
