"""One segment: its name, where its arrays lie, and the checks that let the rest of the core trust both."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Extent, SegmentFormat
from actcache.errors import FormatError
from actcache.key import KEY_BYTES
from actcache.ragged import VALUES, check_offsets

#: Ragged array -> (dtype, trailing shape), as a space stores them.
Columns = Mapping[str, tuple[str, tuple[int, ...]]]

_FIXED: dict[str, tuple[str, tuple[int, ...]]] = {
    "offsets": ("<i8", ()),
    "keys": ("|u1", (KEY_BYTES,)),
    "checksums": ("<u8", ()),
    "extra_checksums": ("<u8", ()),
}
_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}")
_LAST_SEQUENCE = (1 << 48) - 1


def new_name(sequence: int) -> str:
    """Return a unique segment name. Names sort by their sequence number, and of two copies of a key the later one is
    served: a sequence number above all that the writer saw works without synchronized clocks.

    Raises:
        FormatError: there is no higher number; only a file that is not ours can have brought us there.
    """
    if sequence > _LAST_SEQUENCE:
        raise FormatError(f"a file is named as if it came after all others ({_LAST_SEQUENCE:012x}-...): move it away")
    return f"{sequence:012x}-{secrets.token_hex(8)}"


def sequence_of(name: str) -> int:
    return int(name.partition("-")[0], 16)


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Segment:
    """A segment that is known to fit its space: arrays present, of the right dtypes and shapes, inside their files."""

    path: Path
    extents: Mapping[str, Extent]
    nbytes: int = field(compare=False)

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def entries(self) -> int:
        return self.extents["keys"].shape[0]

    @property
    def tokens(self) -> int:
        return self.extents[VALUES].shape[0]

    def columns(self) -> frozenset[str]:
        """Return the names of the ragged arrays."""
        return frozenset(self.extents) - frozenset(_FIXED)

    def file(self, array: str) -> Path:
        relative = self.extents[array].path
        return self.path / relative if relative else self.path

    def read(self, array: str) -> NDArray[Any]:
        """Return one whole array, in memory. Meant for the small ones.

        Raises:
            FormatError: the file is shorter than it was.
            FileNotFoundError: the segment is gone.
        """
        extent = self.extents[array]
        count = extent.nbytes // np.dtype(extent.dtype).itemsize
        data = np.fromfile(self.file(array), extent.dtype, count, offset=extent.offset)
        if len(data) != count:
            raise FormatError(f"{self.path} is truncated")
        return data.reshape(extent.shape)

    def offsets(self) -> NDArray[np.int64]:
        """Return the entries' offsets, checked against the rows."""
        offsets = self.read("offsets")
        check_offsets(offsets, self.entries, self.tokens, str(self.path))
        return offsets

    def to_json(self) -> dict[str, Any]:
        """Return what the index needs to find the arrays without opening the segment."""
        extents = {name: [e.path, e.offset, e.dtype, list(e.shape)] for name, e in self.extents.items()}
        return {"name": self.path.name, "nbytes": self.nbytes, "extents": extents}

    @classmethod
    def from_json(cls, folder: Path, value: Any, columns: Columns) -> Segment:
        """Rebuild a segment from the index.

        Raises:
            FormatError: the value does not describe a segment of this space.
        """
        try:
            extents = {
                str(name): Extent(str(path), int(offset), str(dtype), tuple(int(size) for size in shape))
                for name, (path, offset, dtype, shape) in value["extents"].items()
            }
            name, nbytes = str(value["name"]), int(value["nbytes"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"the index of {folder} describes a segment wrongly: {error}") from None
        _check(folder / name, extents, columns)
        return cls(folder / name, extents, nbytes)

    @classmethod
    def open(cls, format: SegmentFormat, path: Path, columns: Columns) -> Segment:
        """Describe the segment at ``path``.

        Raises:
            FormatError: it is truncated, foreign, or of another hidden size or dtype than the space.
            FileNotFoundError: there is none.
        """
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise FormatError(f"{path} is neither a file nor a folder; this is no segment")
        extents = format.layout(path)
        _check(path, extents, columns)
        return cls(path, extents, cls(path, extents, 0).measure())

    def measure(self) -> int:
        """Return the bytes that the segment takes up.

        Raises:
            FormatError: a file is missing, or shorter than what should lie in it.
            FileNotFoundError: the segment is gone.
            PermissionError: a file may not be read.
        """
        ends: dict[str, int] = {}
        for extent in self.extents.values():
            ends[extent.path] = max(ends.get(extent.path, 0), extent.offset + extent.nbytes)
        nbytes = 0
        for relative, end in ends.items():
            file = self.path / relative if relative else self.path
            try:
                size = os.path.getsize(file)
            except FileNotFoundError:
                if relative and self.path.is_dir():  # a part is lost; the segment is not gone
                    raise FormatError(f"{file} is missing; the segment is damaged") from None
                raise
            if not os.access(file, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            nbytes += size
            if end > size:
                raise FormatError(f"{file} is truncated: it has {size} bytes and should have {end} or more")
        return nbytes


def _check(path: Path, extents: Mapping[str, Extent], columns: Columns) -> None:
    """Refuse arrays that a segment of this space cannot have."""
    known = {**_FIXED, **columns}
    missing = {"offsets", "keys", "checksums", VALUES} - extents.keys()
    if missing:
        raise FormatError(f"{path} is no segment: it has no {', '.join(sorted(missing))}")
    entries, tokens = extents["keys"].shape[:1], extents[VALUES].shape[:1]
    for name, extent in extents.items():
        if name not in known:
            raise FormatError(f"{path} has an array {name!r} that this release does not know")
        dtype, trailing = known[name]
        length = {"offsets": (entries[0] + 1,) if entries else ()}.get(name, entries if name in _FIXED else tokens)
        if extent.dtype != dtype or extent.shape != (*length, *trailing) or len(length) != 1:
            raise FormatError(
                f"{path} does not fit its space: {name} is {extent.dtype} {list(extent.shape)}, "
                f"not {dtype} {[*length, *trailing]}"
            )
        parts = Path(extent.path).parts
        if extent.offset < 0 or min(extent.shape) < 0 or Path(extent.path).is_absolute() or ".." in parts:
            raise FormatError(f"{path} says that {name} lies outside of it")


def dumps(segments: list[Segment]) -> str:
    """Return the index's description of segments."""
    return json.dumps([segment.to_json() for segment in segments], separators=(",", ":"))
