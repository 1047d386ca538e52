"""Reading an npz where it lies: its members are mapped, none is unpacked, and nothing in it is executed.

NumPy's own reader unpacks members into memory by what their headers say, and checks little before; here each header has
one strict form, and its array has to fill its member exactly.
"""

from __future__ import annotations

import math
import os
import re
import struct
import zipfile
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.errors import FormatError

_MEMBERS = 64  # in a file, at most
_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf]\d{1,2})', 'fortran_order': False, 'shape': \(((?:\d{1,18},? ?)*)\), \} *\n"
)
_MAGIC = {b"\x93NUMPY\x01\x00": "<H", b"\x93NUMPY\x02\x00": "<I"}
_MAX_HEADER = 4096
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_ENCRYPTED = 1


def mapped(file: BinaryIO, where: str) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an uncompressed npz by name, read-only, mapped in place; they may be unaligned.

    Args:
        file: a regular file.
        where: how an error names it.

    Raises:
        FormatError: it is none, or is compressed.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if len(members) > _MEMBERS or len({member.filename for member in members}) != len(members):
            raise ValueError(f"it has {len(members)} members, or two of one name")
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
        return {member.filename.removesuffix(".npy"): _array(whole, member, size) for member in members}
    except (
        ValueError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
        NotImplementedError,
        OverflowError,
        EOFError,
    ) as error:
        raise FormatError(f"{where} is no npz that can be read in place: {error}") from None


def _array(whole: NDArray[np.uint8], member: zipfile.ZipInfo, size: int) -> NDArray[np.generic]:
    name = member.filename[:60]
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
        raise ValueError(f"{name!r} is compressed or encrypted; write it with numpy.savez, not savez_compressed")
    begin = member.header_offset
    if not 0 <= begin <= size - _LOCAL.size:
        raise ValueError(f"{name!r} lies outside of the file")
    signature, name_bytes, extra_bytes = _LOCAL.unpack(whole[begin : begin + _LOCAL.size].tobytes())
    begin += _LOCAL.size + name_bytes + extra_bytes
    if signature != b"PK\x03\x04" or member.file_size != member.compress_size or begin + member.file_size > size:
        raise ValueError(f"{name!r} lies outside of the file, or its sizes differ")
    data = whole[begin : begin + member.file_size]
    head = data[: _MAX_HEADER + 12].tobytes()
    length = _MAGIC.get(head[:8])
    if length is None or len(head) < 12:
        raise ValueError(f"{name!r} is no array")
    start = 8 + struct.calcsize(length)
    (declared,) = struct.unpack(length, head[8:start])
    match = _HEADER.fullmatch(head[start : start + declared]) if declared <= _MAX_HEADER else None
    if match is None:
        raise ValueError(f"the header of {name!r} is not that of an array of numbers in the order of C")
    dtype = np.dtype(match[1].decode())
    shape = tuple(int(number) for number in re.findall(rb"\d+", match[2]))
    rows = data[start + declared :]
    if dtype.itemsize * math.prod(shape) != len(rows):
        raise ValueError(f"{name!r} does not fill its place")
    return rows.view(dtype).reshape(shape)
