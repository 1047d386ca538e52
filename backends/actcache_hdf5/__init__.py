"""The hdf5 backend: one HDF5 file a segment, ``values`` contiguous, so that an entry is one extent of the file.

h5py lays the file out and writes the small arrays. The rows, nearly all of the bytes, are written at ``values``' offset
with ``pwrite``: errors of the disk then arrive as they are, and no second copy is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from numpy.typing import NDArray

from actcache.backend import VALUES, Block, Extent, FormatError, SegmentFormat

_ALIGN = 4096
_SHOWN = 200  # characters of an h5py message in ours


class HDF5Format(SegmentFormat):
    """See ``SegmentFormat``; docs/format.md describes the file."""

    name = "hdf5"
    suffix = ".h5"

    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        arrays = block.arrays()
        # locking=False: files are written before they have a name and never again, and network file systems lock badly.
        with h5py.File(
            path, "x", libver="v110", locking=False, alignment_threshold=1, alignment_interval=_ALIGN
        ) as file:
            offsets = {name: _allocate(file, name, array) for name, array in arrays.items()}
            for name, array in arrays.items():
                if name != VALUES:
                    file[name][...] = array
            for name, text in metadata.items():
                file.attrs[name] = text
        _write_at(path, offsets[VALUES], arrays[VALUES])

    def layout(self, path: Path) -> dict[str, Extent]:
        try:
            with h5py.File(path, "r", locking=False) as file:
                return {name: _extent(path, file, name) for name in file}
        except FileNotFoundError:
            raise
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise FormatError(f"{path} is truncated or no HDF5 file: {str(error)[:_SHOWN]}") from None


def _allocate(file: h5py.File, name: str, array: NDArray[np.generic]) -> int:
    """Create a dataset with its space in the file, not filled; return its offset."""
    properties = h5p.create(h5p.DATASET_CREATE)
    properties.set_layout(h5d.CONTIGUOUS)
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    space = h5s.create_simple(array.shape)
    return int(h5d.create(file.id, name.encode(), h5t.py_create(array.dtype), space, dcpl=properties).get_offset())


def _write_at(path: Path, offset: int, array: NDArray[np.generic]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
    finally:
        os.close(descriptor)


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
