"""The files of an export: named arrays and texts, as safetensors or npz. docs/format.md says which arrays."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import struct
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from actcache.errors import DataError, FormatError
from actcache.format import safetensors
from actcache.format.ragged import EXTRAS, OWN, TOKEN_IDS, VALUES
from actcache.format.safetensors import Described

VERSIONS = ("1", "2")  # see ``Recipe.format_version``
VERSION_NAME, RECIPE_NAME = "actcache_export", "recipe"
SCHEMA_NAME = "schema"  # of the caller's own columns, where there are any

PARQUET = ".parquet"  # how the names of files end that hold no activations
PART_BYTES = 16 << 20  # of rows that are read at a time

#: The ragged arrays besides ``values``.
OPTIONAL = (TOKEN_IDS, *sorted((*EXTRAS, OWN)))


# --- writing, piece by piece, rows of all arrays in turn --------------------------------------------------------------


class Sink(ABC):
    """A new file of arrays of known shapes; a context manager, and whole when that has ended well."""

    @abstractmethod
    def __init__(self, path: Path, described: Sequence[Described], metadata: Mapping[str, str]) -> None: ...

    def write(self, name: str, rows: NDArray[Any]) -> None:
        """Append rows to an array."""
        self._left[name] -= rows.nbytes
        if self._left[name] >= 0:
            self._append(name, np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def _expect(self, described: Sequence[Described]) -> None:
        self._left = {name: dtype.itemsize * math.prod(shape) for name, dtype, shape in described}

    @abstractmethod
    def _append(self, name: str, data: memoryview) -> None: ...

    @abstractmethod
    def _finish(self) -> None:
        """Write what is to be written when all rows are there."""

    @abstractmethod
    def _close(self) -> None: ...

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                if any(self._left.values()):
                    raise DataError("entries changed while they were read: run it again")
                self._finish()
        finally:
            self._close()


class TensorsSink(Sink):
    """A safetensors file, each row written to its place; the widest items first, for torch refuses unaligned arrays."""

    def __init__(self, path: Path, described: Sequence[Described], metadata: Mapping[str, str]) -> None:
        ordered = sorted(described, key=lambda one: -one[1].itemsize)
        header = safetensors.header(ordered, metadata, align=8)
        self._expect(ordered)
        starts = np.cumsum([len(header), *self._left.values()]).tolist()
        self._at = dict(zip(self._left, starts[:-1], strict=True))
        self._file = open(path, "xb")  # noqa: SIM115
        self._file.write(header)

    def _append(self, name: str, data: memoryview) -> None:
        self._file.seek(self._at[name])
        self._at[name] += self._file.write(data)

    def _finish(self) -> None:
        self._file.flush()

    def _close(self) -> None:
        self._file.close()


class NpzSink(Sink):
    """An uncompressed npz, whose metadata are arrays of bytes. A member is written in one go, so all arrays but
    ``values``, which are small beside it, wait in unnamed files beside the target."""

    def __init__(self, path: Path, described: Sequence[Described], metadata: Mapping[str, str]) -> None:
        self._expect(described)
        self._described = {name: (dtype, shape) for name, dtype, shape in described}
        with contextlib.ExitStack() as stack:
            self._archive = stack.enter_context(zipfile.ZipFile(path, "x", zipfile.ZIP_STORED))
            for name, text in metadata.items():
                data = text.encode()
                with self._member(name, np.dtype(np.uint8), (len(data),)) as member:
                    member.write(data)
            self._waiting: dict[str, IO[bytes]] = {
                name: stack.enter_context(tempfile.TemporaryFile(dir=path.parent))
                for name in self._described
                if name != VALUES
            }
            self._values = stack.enter_context(self._member(VALUES, *self._described[VALUES]))
            self._stack = stack.pop_all()

    def _member(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
        member = self._archive.open(f"{name}.npy", "w", force_zip64=True)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        return member

    def _append(self, name: str, data: memoryview) -> None:
        (self._values if name == VALUES else self._waiting[name]).write(data)

    def _finish(self) -> None:
        self._values.close()
        for name, file in self._waiting.items():
            file.seek(0)
            with self._member(name, *self._described[name]) as member:
                shutil.copyfileobj(file, member, 1 << 20)

    def _close(self) -> None:
        self._stack.close()


#: What a file is written by, by how its name ends.
SINKS: Mapping[str, type[Sink]] = {".safetensors": TensorsSink, ".npz": NpzSink}


# --- reading an npz where it lies: its members are mapped, none is unpacked, and nothing in it is executed ------------
#
# NumPy's own reader unpacks members into memory by what their headers say, and checks little before; here each header
# has one strict form, and its array has to fill its member exactly.

_MEMBERS = 64  # in a file, at most
_HEADER = re.compile(
    rb"\{'descr': '([<|][biuf]\d{1,2})', 'fortran_order': False, 'shape': \(((?:\d{1,18},? ?)*)\), \} *\n"
)
_MAGIC = {b"\x93NUMPY\x01\x00": "<H", b"\x93NUMPY\x02\x00": "<I"}
_MAX_HEADER = 4096
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field
_UNREADABLE = (ValueError, TypeError, struct.error, zipfile.BadZipFile, NotImplementedError, OverflowError, EOFError)


def mapped(file: BinaryIO, where: str) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of an uncompressed npz by name, read-only, mapped in place; they may be unaligned.

    Raises:
        FormatError: it is none, or is compressed; ``where`` names it.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        if len(members) > _MEMBERS or len({member.filename for member in members}) != len(members):
            raise ValueError(f"it has {len(members)} members, or two of one name")
        whole = np.memmap(file, np.uint8, "r").view(np.ndarray)
        return {member.filename.removesuffix(".npy"): _array(whole, member, size) for member in members}
    except _UNREADABLE as error:
        raise FormatError(f"{where} is no npz that can be read in place: {error}") from None


def _array(whole: NDArray[np.uint8], member: zipfile.ZipInfo, size: int) -> NDArray[np.generic]:
    name = member.filename[:60]
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:  # bit 0: encrypted
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
