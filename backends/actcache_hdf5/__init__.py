"""The hdf5 backend: one HDF5 file a segment, ``values`` contiguous, so that an entry is one extent of the file.

h5py lays the file out and writes the small arrays. The rows, nearly all of the bytes, are written at ``values``' offset
with ``pwrite``, so that no second copy is made. h5py gets a file object of ours to write to: when a disk fills up under
the HDF5 library itself, it leaves the file open for ever and raises something else than the operating system said.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
from h5py import h5d, h5p, h5s, h5t

from actcache.backend import Block, Extent, Layout, SegmentFiles, SegmentFormat
from actcache.errors import FormatError
from actcache.format.ragged import Column, pieces
from actcache.io.files import write_flowing

_ALIGN = 4096
# locking=False: files are written before they have a name and never again, and network file systems lock badly.
_LAYOUT = {"libver": "v110", "locking": False, "alignment_threshold": 1, "alignment_interval": _ALIGN}
_MOST_ATTRIBUTES = 16
_MOST_ARRAYS = 64
_MOST_TEXT = 1 << 12  # bytes of an attribute
_SHOWN = 200  # characters of an h5py message in ours


class HDF5Format(SegmentFormat):
    """Segments as HDF5 files, which docs/format.md describes."""

    name = "hdf5"
    suffix = ".h5"

    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        arrays = block.arrays()
        first = next(iter(arrays))  # by far the largest
        with _Output(path) as output:
            with output.failures_kept(), h5py.File(output, "w", **_LAYOUT) as file:
                offsets = {name: _allocate(file, name, array) for name, array in arrays.items()}
                for name, array in arrays.items():
                    if name != first:
                        file[name][...] = array
                for name, text in metadata.items():
                    file.attrs.create(name, text.encode(), dtype=h5py.string_dtype(length=max(1, len(text.encode()))))
            output.seek(offsets[first])
            write_flowing(output.fileno(), pieces(arrays[first]))

    def layout(self, files: SegmentFiles) -> Layout:
        path = files.path
        if path is None:
            raise FormatError(f"{files.where}: HDF5 is read from a file system; on an object store use s3: or zarr:")
        files.size("")  # neither a folder nor a pipe
        try:
            with h5py.File(path, "r", locking=False) as file:
                if len(file.attrs) > _MOST_ATTRIBUTES:
                    raise FormatError(f"{path} has more attributes than a segment; this is none")
                metadata = {name: _text(path, file, name) for name in file.attrs}
                names = list(islice(file, _MOST_ARRAYS + 1))
                if len(names) > _MOST_ARRAYS:
                    raise FormatError(f"{path} holds more than the arrays of a segment; this is none")
                return Layout({name: _extent(path, file, name) for name in names}, metadata)
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FormatError(f"{path} is truncated or no HDF5 file: {str(error)[:_SHOWN]}") from None


def _text(path: Path, file: h5py.File, name: str) -> str:
    attribute = file.attrs.get_id(name)
    kind = attribute.get_type()
    # Texts of variable length lie in a heap of their own, in which a damaged file makes the library loop for ever.
    fixed = isinstance(kind, h5t.TypeStringID) and not kind.is_variable_str()
    if not fixed or attribute.shape != () or attribute.get_storage_size() > _MOST_TEXT:
        raise FormatError(f"{path}: its attribute {name!r:.60} is no short text of fixed length; this is no segment")
    return bytes(file.attrs[name]).decode()


def _allocate(file: h5py.File, name: str, array: Column) -> int:
    """Create a dataset with its space in the file, not filled; return its offset."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    space = h5s.create_simple(array.shape)
    return int(h5d.create(file.id, name.encode(), h5t.py_create(array.dtype), space, dcpl=properties).get_offset())


class _Output(io.FileIO):
    """A new file. While failures are kept, writing pretends to succeed, and the failure is raised in the end."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x+")
        self._keeping = False
        self._failure: OSError | None = None

    @contextmanager
    def failures_kept(self) -> Iterator[None]:
        self._keeping = True
        try:
            yield
        except Exception:
            if self._failure is None:
                raise
        finally:
            self._keeping = False
        if self._failure is not None:
            raise self._failure

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._keeping:
                raise
            self._failure = self._failure or error

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        length = len(view)
        with self._kept():
            while view:
                view = view[super().write(view) :]
        self.seek(len(view), os.SEEK_CUR)
        return length

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        with self._kept():
            super().truncate(size)
        return size


def _extent(path: Path, file: h5py.File, name: str) -> Extent:
    # A soft or external link would read another file; a filter or virtual dataset would run code of a plug-in.
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise FormatError(f"{path}: {name} is a link to another place; this is no segment")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise FormatError(f"{path}: {name} is no dataset; this is no segment")
    properties = dataset.id.get_create_plist()
    offset = dataset.id.get_offset()
    if properties.get_layout() != h5d.CONTIGUOUS or properties.get_external_count() or offset is None:
        raise FormatError(f"{path}: {name} is not contiguous in the file; this is no segment")
    return Extent("", int(offset), dataset.dtype.str, tuple(int(size) for size in dataset.shape))


backend = HDF5Format()
