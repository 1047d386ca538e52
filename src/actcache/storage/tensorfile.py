"""Small files of named arrays in the safetensors format: the index and collections.

Any safetensors reader opens them.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache import tensorheader
from actcache.backend import Extent
from actcache.errors import FormatError

_ALIGN = 64
_MAX_HEADER = 64 << 20  # JSON takes ten times as much memory as text

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
    yield tensorheader.dumps([(name, a.dtype, a.shape) for name, a in ordered], metadata, align=_ALIGN)
    for _, array in ordered:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _layout(file: BinaryIO, where: str) -> tuple[dict[str, str], dict[str, Extent]]:
    """Return a file's metadata and where its arrays lie, all checked against the size of the file."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        text = file.read(tensorheader.length(file.read(tensorheader.LENGTH_BYTES), size, _MAX_HEADER))
        metadata, spans = tensorheader.loads(text, size)
    except ValueError as error:
        raise FormatError(f"{where} is truncated or no file of this store: {error}") from None
    return metadata, {name: Extent("", span.offset, span.dtype, span.shape) for name, span in spans.items()}


def mapped(path: Path) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return a file's metadata and its arrays, read-only, mapped in place.

    Raises:
        FormatError: the file is truncated or foreign.
        FileNotFoundError: there is none.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EACCES):
            raise FormatError(f"{path} cannot be read: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # a pipe would block, and a device has no end
        os.close(descriptor)
        raise FormatError(f"{path} is no file")
    with open(descriptor, "rb") as file:
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
