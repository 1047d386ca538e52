"""The header of safetensors files: a length, then JSON that says where each array lies.

Read and written here, and not by the safetensors library, because files are mapped in place or read over a network,
and because their header is checked before any memory is allocated by what it says. Any safetensors reader opens them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LENGTH_BYTES = 8  # of the header's length, which stands before it

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
_METADATA = "__metadata__"

#: Name, dtype and shape of an array.
Described = tuple[str, np.dtype[Any], tuple[int, ...]]


@dataclass(frozen=True)
class Span:
    """Where an array lies in a file."""

    offset: int  # bytes from the start of the file
    dtype: str
    shape: tuple[int, ...]


def dumps(arrays: Sequence[Described], metadata: Mapping[str, str], *, align: int, lead: int = 0) -> bytes:
    """Return what stands before the arrays, which follow one another in this order.

    Args:
        align, lead: the byte ``lead`` bytes behind the header falls on a multiple of ``align``.
    """
    header: dict[str, object] = {_METADATA: dict(metadata)}
    end = 0
    for name, dtype, shape in arrays:
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + LENGTH_BYTES + lead) % align)
    return struct.pack("<Q", len(text)) + text


def length(head: bytes, size: int, most: int) -> int:
    """Return the bytes of the header of a file of ``size`` bytes.

    Raises:
        ValueError: ``head``, its first bytes, are no length of a header of ``most`` bytes or less.
    """
    declared = int(struct.unpack("<Q", head[:LENGTH_BYTES])[0]) if len(head) >= LENGTH_BYTES else 0
    if not 0 < declared <= min(size - LENGTH_BYTES, most):
        raise ValueError(f"a header of {declared} bytes in a file of {size}")
    return declared


def loads(text: bytes, size: int) -> tuple[dict[str, str], dict[str, Span]]:
    """Return a file's metadata and where its arrays lie.

    Args:
        text: the header, without its length.
        size: bytes of the file, all of which have to belong to the header or to one array.

    Raises:
        ValueError: it is no header of such a file.
    """
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        metadata = header.pop(_METADATA, {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        spans, parts = {}, []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype, shape = _NAMES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
                raise ValueError(f"{name[:100]!r} has sizes that are no sizes")
            if end - begin != np.dtype(dtype).itemsize * math.prod(shape):
                raise ValueError(f"{name[:100]!r} does not fill its place")
            spans[name] = Span(LENGTH_BYTES + len(text) + begin, dtype, shape)
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
    return metadata, spans


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found
