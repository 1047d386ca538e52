"""Compressed files, decompressed as they are read: all of it, or an error.

gzip, bzip2 and xz come with Python. zstd comes with pyarrow, which the extra ``corpora`` brings anyway.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from actcache.errors import DocumentError, requires_extra

#: What is raised while damaged data is read, an OSError apart.
DAMAGED = (EOFError, zlib.error, lzma.LZMAError)

_PIECE = 1 << 16


def decompressed(file: io.BufferedReader, compression: str) -> io.BufferedReader:
    """Return a file's content; what is cut off, damaged, or no such file raises ``OSError`` or DAMAGED when it is read.

    Args:
        compression: a value of ``files.COMPRESSIONS``.
    """
    if not file.peek(1):
        raise DocumentError(f"the file is empty, which no {compression} file is: it was not written to its end")
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if compression == "zstd":
        with requires_extra("corpora", ".zst files need pyarrow"):
            import pyarrow
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    make: Callable[[], Any] = bz2.BZ2Decompressor if compression == "bzip2" else lzma.LZMADecompressor
    return io.BufferedReader(_Streams(file, make))


class _Streams(io.RawIOBase):
    """Streams of bzip2 or xz, one after another, as parallel compressors write them.

    Python's own ``BZ2File`` and ``LZMAFile`` end in silence where a stream's first bytes are damaged.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make = file, make
        self._stream, self._rest = make(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._stream.eof:
                self._rest = self._stream.unused_data or self._file.read(_PIECE)
                self._rest = self._rest.lstrip(b"\0")  # xz pads streams with them; no stream begins so
                if not self._rest and not self._file.peek(1):  # type: ignore[attr-defined]
                    return 0
                if not self._rest:
                    continue
                self._stream = self._make()
            elif self._stream.needs_input and not self._rest:
                self._rest = self._file.read(_PIECE)
                if not self._rest:
                    raise EOFError("it ends in the middle")
            data, self._rest = self._stream.decompress(self._rest, len(view)), b""
            if data:
                view[: len(data)] = data
                return len(data)
