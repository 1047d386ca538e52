"""Segment formats: how a library lays one immutable block out in files. Part of the plug-in surface."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from actcache.ragged import Block


@dataclass(frozen=True)
class Extent:
    """Where one array of a segment lies: bytes that can be read without the storage library.

    ``path`` is relative to the segment and empty for the segment's own file; the array is C-contiguous, little-endian.
    """

    path: str
    offset: int  # bytes from the start of the file
    dtype: str  # NumPy dtype string
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What a segment says about itself."""

    extents: Mapping[str, Extent]  # by the names of ``Block.arrays``
    metadata: Mapping[str, str]  # what ``SegmentFormat.write`` was given


class SegmentFiles(ABC):
    """The files of one segment, for reading, wherever it lies. Thread-safe.

    Attributes:
        where: how an error names the segment.
        path: its path, None on an object store.
    """

    where: str
    path: Path | None

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of its files relative to the segment, sorted; ``[""]`` where it is one file.

        Raises:
            FormatError: it holds links or pipes, or more files than a segment has.
            FileNotFoundError: the segment is gone.
        """

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the bytes of a file.

        Raises:
            FormatError: the segment has no such file, or it is a link or pipe.
            FileNotFoundError: the segment is gone.
        """

    @abstractmethod
    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` bytes of a file, fewer where it ends before. Raises as ``size`` does."""


class SegmentFormat(ABC):
    """Writes and describes one kind of segment. Stateless and thread-safe."""

    name: str  # the backend's name, recorded in the store
    suffix: str  # of segment names, with the dot
    commit: str = ""  # where a segment is several files: the one that an object store is given last

    @abstractmethod
    def write(self, path: Path, block: Block, metadata: Mapping[str, str]) -> None:
        """Write a block and its metadata to ``path``, which does not exist yet.

        The core has the files synced and the name published afterwards; a crash in between leaves nothing visible.
        Where the arrays of a segment are files of their own, ``path`` becomes a directory.

        Raises:
            OSError: as the operating system reports it (ENOSPC, EROFS, ...).
        """

    @abstractmethod
    def layout(self, files: SegmentFiles) -> Layout:
        """Return where each array of a segment lies, and its metadata.

        Trusts nothing it reads: no memory is allocated by a size that the file declares. The core checks the extents
        against the size of the file.

        Raises:
            FormatError: this is no segment of this format, or it is damaged.
            FileNotFoundError: the segment is gone.
        """
