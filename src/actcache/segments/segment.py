"""One segment: its name, where its arrays lie, and the checks that let the rest of the core trust both."""

from __future__ import annotations

import functools
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.backend import Columns, Extent, SegmentFiles, SegmentFormat
from actcache.errors import FormatError, FormatVersionError
from actcache.format import frames
from actcache.format.keys import KEY_BYTES
from actcache.format.ragged import OWN, PAYLOAD, PAYLOAD_OFFSETS, VALUES, Origins, check_offsets, names_from_array

VERSION = 1

#: From the name of a segment to its files.
Access = Callable[[str], SegmentFiles]

_FIXED: Columns = {
    "offsets": ("<i8", ()),
    "keys": ("|u1", (KEY_BYTES,)),
    "checksums": ("<u8", ()),
    "extra_checksums": ("<u8", ()),
    "origins": ("|u1", (14,)),
    "origin": ("<u4", ()),
    "origin_entries": ("<u4", ()),
    "sources": ("|u1", (14,)),
    "origins_checksum": ("<u8", ()),
    PAYLOAD_OFFSETS: ("<i8", ()),
}
_ORIGINS = frozenset({"origins", "origin", "origin_entries", "sources", "origins_checksum"})
_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}")
_MOST_EXPANSION = 15  # a block of zstd makes 128 KiB of four bytes, at most: a power of two
_LAST_SEQUENCE = (1 << 48) - 1


def next_name(names: Iterable[str]) -> str:
    """Return a unique name that sorts behind all of these. Of two copies of a key the one of the later name is served:
    a sequence number above all that the writer saw works without synchronized clocks.

    Raises:
        FormatError: there is no higher number; only a file that is not ours can have brought us there.
    """
    sequence = 1 + max((int(name.partition("-")[0], 16) for name in names), default=0)
    if sequence > _LAST_SEQUENCE:
        raise FormatError(f"a file is named as if it came after all others ({_LAST_SEQUENCE:012x}-...): move it away")
    return f"{sequence:012x}-{secrets.token_hex(8)}"


def is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Segment:
    """A segment that is known to fit its space: arrays present, of the right dtypes and shapes, inside their files."""

    files: SegmentFiles = field(compare=False)
    name: str
    extents: Mapping[str, Extent]
    nbytes: int = field(compare=False)
    sources: tuple[str, ...] = ()  # names of the segments that it replaces
    tokens: int = 0

    @property
    def compressed(self) -> bool:
        return PAYLOAD in self.extents

    @property
    def entries(self) -> int:
        return self.extents["keys"].shape[0]

    @property
    def rows_name(self) -> str:
        """The array that has the entries' rows, or their frames."""
        return PAYLOAD if self.compressed else VALUES

    @property
    def rows(self) -> Extent:
        """Where that lies."""
        return self.extents[self.rows_name]

    def columns(self) -> frozenset[str]:
        """Return the names of the ragged arrays that its entries have."""
        names = frozenset(self.extents) - frozenset(_FIXED)
        return (names - {PAYLOAD}) | {VALUES} if self.compressed else names

    def file(self, array: str) -> Path:
        """Return the local file that has an array."""
        relative, path = self.extents[array].path, self.files.path
        if path is None:
            raise FormatError(f"{self.files.where} is no local file")
        return path / relative if relative else path

    def read(self, array: str) -> NDArray[Any]:
        """Return one whole array, in memory; meant for the small ones.

        Raises ``FormatError`` where the file is shorter than it was, ``FileNotFoundError`` where the segment is gone.
        """
        extent = self.extents[array]
        data = self.files.read(extent.path, extent.offset, extent.nbytes)
        if len(data) != extent.nbytes:
            raise FormatError(f"{self.files.where} is truncated")
        return np.frombuffer(data, extent.dtype).reshape(extent.shape)

    def offsets(self) -> NDArray[np.int64]:
        """Return the entries' offsets, checked against the rows."""
        offsets = self.read("offsets")
        check_offsets(offsets, self.entries, self.tokens, self.files.where)
        return offsets

    def payload_offsets(self) -> NDArray[np.int64]:
        """Return where the frames of a compressed segment begin, and the end, checked against what there is."""
        offsets = self.read(PAYLOAD_OFFSETS)
        frames.check_offsets(offsets, self.entries, self.extents[PAYLOAD].shape[0], self.files.where)
        return offsets

    def origins(self) -> Origins:
        """Return where the entries come from: from here, unless this is a compacted segment."""
        if "origins" not in self.extents:
            entries = np.arange(self.entries, dtype=np.uint32)
            return Origins((self.name,), np.zeros(self.entries, np.uint32), entries, ())
        segments, segment = names_from_array(self.read("origins")), self.read("origin")
        if len(segment) and int(segment.max()) >= len(segments):
            raise FormatError(f"{self.files.where} is damaged: entries come from segments that it does not name")
        origins = Origins(segments, segment, self.read("origin_entries"), self.sources)
        if self.read("origins_checksum").tolist() != [origins.checksum()]:
            raise FormatError(f"{self.files.where} is damaged: what it says of its entries' origins fails its checksum")
        return origins

    def to_json(self) -> dict[str, Any]:
        """Return what the index needs to find the arrays without opening the segment."""
        extents = {name: [e.path, e.offset, e.dtype, list(e.shape)] for name, e in self.extents.items()}
        described = {"name": self.name, "nbytes": self.nbytes, "extents": extents}
        if self.compressed:
            described["tokens"] = self.tokens
        return described | ({"sources": list(self.sources)} if self.sources else {})

    @classmethod
    def from_json(cls, access: Access, value: Any, columns: Columns) -> Segment:
        """Rebuild a segment from the index; raise ``FormatError`` where the value is none of this space."""
        try:
            extents = {
                str(name): Extent(str(path), int(offset), str(dtype), tuple(int(size) for size in shape))
                for name, (path, offset, dtype, shape) in value["extents"].items()
            }
            name, nbytes, sources = str(value["name"]), int(value["nbytes"]), tuple(value.get("sources", ()))
            tokens = (
                int(value["tokens"]) if PAYLOAD in extents else extents[VALUES].shape[0] if VALUES in extents else 0
            )
            if not all(isinstance(known, str) and is_name(known) for known in (name, *sources)):
                raise ValueError("names that are none")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(f"the index describes a segment wrongly: {error}") from None
        files = access(name)
        _check(files.where, extents, columns, tokens)
        return cls(files, name, extents, nbytes, sources, tokens)

    @classmethod
    def open(cls, format: SegmentFormat, files: SegmentFiles, name: str, space: str, columns: Columns) -> Segment:
        """Describe a segment, which has to confirm its own name and its space's.

        Raises:
            FormatError: it is truncated, foreign, in another's place, or does not fit the space.
            FormatVersionError: a newer release wrote it.
            FileNotFoundError: there is none.
        """
        layout = format.layout(files)
        _check_metadata(files.where, layout.metadata, name, space)
        tokens = _tokens(files, layout.extents)
        _check(files.where, layout.extents, columns, tokens)
        segment = cls(files, name, layout.extents, 0, (), tokens)
        segment = replace(segment, nbytes=segment.measure())
        if "sources" in layout.extents:
            segment = replace(segment, sources=names_from_array(segment.read("sources")))
        return segment

    def measure(self) -> int:
        """Return the bytes that the segment takes up.

        Raises ``FormatError`` where a file is missing or too short, ``FileNotFoundError`` where the segment is gone,
        ``PermissionError`` where a file may not be read.
        """
        ends: dict[str, int] = {}
        for extent in self.extents.values():
            ends[extent.path] = max(ends.get(extent.path, 0), extent.offset + extent.nbytes)
        nbytes = 0
        for name, end in ends.items():
            size = self.files.size(name)
            nbytes += size
            if end > size:
                where = f"{self.files.where}/{name}" if name else self.files.where
                raise FormatError(f"{where} is truncated: it has {size} bytes and should have {end} or more")
        return nbytes


def metadata(name: str, space: str) -> dict[str, str]:
    """Return what a segment says about itself beside its arrays."""
    return {"actcache_segment": str(VERSION), "space": space, "segment": name}


def _check_metadata(where: str, found: Mapping[str, str], name: str, space: str) -> None:
    version = found.get("actcache_segment", "")
    if version.isdigit() and len(version) < 9 and int(version) > VERSION:
        raise FormatVersionError(f"{where} was written by a newer release (version {version}): upgrade actcache")
    for field_name, expected in metadata(name, space).items():
        if found.get(field_name) != expected:
            # Tombstones name segments: one under another's name would bring back what was deleted, and lose others.
            raise FormatError(
                f"{where} says {field_name} {found.get(field_name)!r:.60} and should say {expected!r}: "
                "it is not where it was written"
            )


def _tokens(files: SegmentFiles, extents: Mapping[str, Extent]) -> int:
    """Return the rows of a segment's entries: of a compressed one, what its last offset says."""
    if VALUES in extents:
        return extents[VALUES].shape[0] if extents[VALUES].shape else 0
    offsets = extents.get("offsets")
    if offsets is None or offsets.dtype != "<i8" or len(offsets.shape) != 1 or not offsets.shape[0]:
        return 0  # which is refused
    last = files.read(offsets.path, offsets.offset + offsets.nbytes - 8, 8)
    return int.from_bytes(last, "little", signed=True)


def _row_bytes(columns: Columns) -> int:
    dtype, trailing = columns[VALUES]
    return np.dtype(dtype).itemsize * math.prod(trailing)


def _check(where: str, extents: Mapping[str, Extent], columns: Columns, rows: int) -> None:
    """Refuse arrays that a segment of this space cannot have."""
    known = {**_FIXED, **columns}
    if compressed := PAYLOAD in columns:
        del known[VALUES]
    else:
        del known[PAYLOAD_OFFSETS]
    missing = {"offsets", "keys", "checksums", *((PAYLOAD, PAYLOAD_OFFSETS) if compressed else (VALUES,))}
    missing -= extents.keys()
    if not _ORIGINS.isdisjoint(extents):
        missing |= _ORIGINS - extents.keys()
    if missing:
        raise FormatError(f"{where} is no segment: it has no {', '.join(sorted(missing))}")
    entries, tokens = extents["keys"].shape[:1], (rows,)
    if OWN in extents and OWN not in known:  # the width is known to whoever declared it, meanwhile
        known[OWN] = ("|u1", extents[OWN].shape[1:2])
    if compressed and rows * _row_bytes(columns) > extents[PAYLOAD].nbytes << _MOST_EXPANSION:
        raise FormatError(f"{where} says that it has {rows} rows, more than its frames can make")
    for name, extent in extents.items():
        if name not in known:
            raise FormatError(f"{where} has an array {name!r} that this release does not know")
        dtype, trailing = known[name]
        length = entries if name in _FIXED else tokens
        if name in ("offsets", PAYLOAD_OFFSETS):
            length = (entries[0] + 1,) if entries else ()
        elif name == PAYLOAD:
            length = extent.shape[:1]
        elif name in ("origins", "sources", "origins_checksum"):
            length = (1,) if name == "origins_checksum" else extent.shape[:1]
        if extent.dtype != dtype or extent.shape != (*length, *trailing) or len(length) != 1:
            raise FormatError(
                f"{where} does not fit its space: {name} is {extent.dtype} {list(extent.shape)}, "
                f"not {dtype} {[*length, *trailing]}"
            )
        if extent.offset < 0 or rows < 0 or min(extent.shape) < 0 or _leads_outside(extent.path):
            raise FormatError(f"{where} says that {name} lies outside of it")


@functools.lru_cache(maxsize=1024)
def _leads_outside(path: str) -> bool:
    """Return whether a file's path leads out of its segment. All segments of a format have the same few paths."""
    return Path(path).is_absolute() or ".." in Path(path).parts
