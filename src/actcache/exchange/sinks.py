"""Files of named arrays whose rows come piece by piece, those of all arrays in turn."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from actcache import tensorheader
from actcache.errors import DataError
from actcache.ragged import VALUES
from actcache.tensorheader import Described


class Sink(ABC):
    """A file of arrays whose shapes are known before their rows. A context manager; whole when that has ended well.

    Args:
        path: of a new file.
        described: the arrays.
        metadata: texts that go with them.
    """

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
    def _close(self) -> None:
        """Release everything."""

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
    """A safetensors file, each row written to its place. The widest items come first, so that all arrays are aligned:
    torch refuses others."""

    def __init__(self, path: Path, described: Sequence[Described], metadata: Mapping[str, str]) -> None:
        ordered = sorted(described, key=lambda one: -one[1].itemsize)
        header = tensorheader.dumps(ordered, metadata, align=8)
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
