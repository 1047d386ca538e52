"""The index of a space: tables of entries sorted by key, searched for a whole batch in one native call.

A table covers some segments. On disk it is a safetensors file that is mapped, not read: ten million entries open in
milliseconds and cost no memory of their own. It can be rebuilt from the segments at any time, so it is never trusted: a
wrong row or length is out of bounds or fails the entry's checksum, and a wrong key is a miss. The numbers of entries,
by which tombstones name them, have a checksum of their own: a wrong one would bring back what was deleted.

One file covers everything, or several do together, each of which says which ones it stands in for (``IndexFiles``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.backend import Columns
from actcache.errors import FormatError, FormatVersionError, SegmentGoneError
from actcache.format import safetensors
from actcache.format.keys import split_keys
from actcache.format.ragged import row_indices
from actcache.io.loops import LookupTable
from actcache.io.workers import ProcessLock
from actcache.segments.segment import Access, Segment, is_name

VERSION = "1"

_ARRAYS = {
    "prefix": ("<u8", ()),  # first 8 bytes of the key, as a big-endian number
    "row": ("<i8", ()),  # first row of the entry in its segment
    "checksum": ("<u8", ()),
    "rest": ("|u1", (24,)),  # the other bytes of the key
    "segment": ("<u4", ()),  # position in ``segments``
    "origin": ("<u4", ()),  # position in ``origins`` of the segment of its origin
    "entry": ("<u4", ()),  # number of the entry in that segment
    "tokens": ("<u4", ()),
}


@dataclass(frozen=True)
class Table:
    """Entries of some segments, sorted by key prefix; among equal prefixes, those of later origin first. Immutable.

    In compacted segments, where an entry lies (``segment``, ``row``) is not what its origin is (``origin``, ``entry``).
    """

    segments: tuple[Segment, ...]
    origins: tuple[str, ...]  # names of segments, each once
    prefix: NDArray[np.uint64]
    rest: NDArray[np.uint8]
    segment: NDArray[np.uint32]
    origin: NDArray[np.uint32]
    entry: NDArray[np.uint32]
    row: NDArray[np.int64]
    tokens: NDArray[np.uint32]
    checksum: NDArray[np.uint64]
    #: Names of the index files that this one makes unnecessary, and when that was, in seconds since 1970 by the clock
    #: of its writer; None for one that covers all that there was, and makes all older ones unnecessary.
    replaces: Mapping[str, float] | None = None

    def __len__(self) -> int:
        return len(self.prefix)

    def bring(self) -> None:
        """Have the arrays here. Raises ``SegmentGoneError`` where they cannot be had any more: look anew."""

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return {name: getattr(self, name) for name in _ARRAYS}

    def searchable(
        self, alive: NDArray[np.bool_] | None, numbers: NDArray[np.int64], ranks: NDArray[np.int64]
    ) -> LookupTable:
        """Return what finds keys in this table: which entries are served (None: all), the number of each segment in the
        space, and the rank of each origin."""
        arrays = (self.prefix, self.rest, self.segment, self.origin, self.tokens, self.row, self.checksum)
        return LookupTable(*arrays, alive, numbers, ranks)

    def copies(self, prefix: NDArray[np.uint64], rest: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the positions of all copies of the keys, served or not."""
        first: NDArray[np.int64] = np.searchsorted(self.prefix, prefix, "left")
        count = np.searchsorted(self.prefix, prefix, "right") - first
        position = row_indices(first, count, None)
        same = (self.rest[position] == np.repeat(rest, count, axis=0)).all(axis=1)
        copies: NDArray[np.int64] = position[same]
        return copies

    @classmethod
    def of_segments(cls, segments: Sequence[Segment]) -> Table:
        """Read the keys of segments; raise ``FormatError`` where one is truncated or contradicts itself."""
        parts = []
        for number, segment in enumerate(segments):
            offsets, origins = segment.offsets(), segment.origins()
            prefix, rest = split_keys(segment.read("keys"))
            parts.append(
                cls(
                    (segment,),
                    origins.segments,
                    prefix,
                    rest,
                    np.full(len(prefix), number, np.uint32),
                    origins.segment,
                    origins.entries,
                    offsets[:-1],
                    np.diff(offsets).astype(np.uint32),
                    segment.read("checksums"),
                )
            )
        return cls._sorted(tuple(segments), parts)

    @classmethod
    def merged(cls, tables: Sequence[Table], keep: frozenset[str]) -> Table:
        """Join tables, leaving out segments whose names are not in ``keep``; what stands in several is taken once."""
        segments: list[Segment] = []
        wanted = set(keep)
        parts = []
        for table in tables:
            kept = np.array([segment.name in wanted for segment in table.segments], bool)
            which = kept[table.segment] if not kept.all() else slice(None)
            arrays = {name: array[which] for name, array in table._arrays().items()}
            arrays["segment"] = (len(segments) + np.cumsum(kept) - 1).astype(np.uint32)[arrays["segment"]]
            parts.append(cls(table.segments, table.origins, **arrays))  # type: ignore[arg-type]
            segments += [segment for segment in table.segments if segment.name in wanted]
            wanted.difference_update(segment.name for segment in table.segments)
        return cls._sorted(tuple(segments), parts)

    @classmethod
    def _sorted(cls, segments: tuple[Segment, ...], parts: Sequence[Table]) -> Table:
        """Join parts whose ``segment`` counts in ``segments``. Names sort by their sequence, so do those of origins."""
        named = [np.unique(part.origin).tolist() for part in parts]
        origins = sorted({part.origins[n] for part, some in zip(parts, named, strict=True) for n in some})
        numbers = {origin: number for number, origin in enumerate(origins)}

        def joined(name: str) -> NDArray[np.generic]:
            dtype, trailing = _ARRAYS[name]
            return np.concatenate([np.empty((0, *trailing), dtype), *(getattr(part, name) for part in parts)])

        arrays = {name: joined(name) for name in _ARRAYS if name != "origin"}
        renumbered = [np.array([numbers.get(o, 0) for o in part.origins], np.uint32)[part.origin] for part in parts]
        arrays["origin"] = np.concatenate([np.empty(0, np.uint32), *renumbered])
        # Later origins first, and of equal ones the segment of the last name.
        ranks = np.empty(len(segments), np.int64)
        ranks[sorted(range(len(segments)), key=lambda n: segments[n].name)] = np.arange(len(segments))
        order = np.lexsort((-ranks[arrays["segment"].astype(np.int64)], -arrays["origin"].astype(np.int64)))
        order = order[np.argsort(arrays["prefix"][order], kind="stable")]
        return cls(segments, tuple(origins), **{name: array[order] for name, array in arrays.items()})  # type: ignore[arg-type]

    def write(self, path: Path) -> None:
        """Write the table as an index file of format version 1."""
        arrays = self._arrays()
        described = {"segments": [segment.to_json() for segment in self.segments], "origins": self.origins}
        texts = {name: json.dumps(value, separators=(",", ":")) for name, value in described.items()}
        if self.replaces is not None:
            texts["replaces"] = json.dumps(dict(self.replaces), separators=(",", ":"))
        sums = {"checksum": _checksum(texts, arrays), "texts_checksum": _checksum_of_texts(texts)}
        safetensors.write(path, arrays, {"actcache_index": VERSION, **texts, **sums})

    @classmethod
    def open(cls, path: Path, access: Access, columns: Columns) -> Table:
        """Map an index file of a space with these ragged arrays.

        Raises ``FileNotFoundError`` where another process has replaced it, ``FormatVersionError`` for one of a newer
        release, ``FormatError`` where it is truncated or foreign: it can go, the segments have all that it says.
        """
        return cls._of_file(*safetensors.mapped(path), str(path), access, columns)

    @classmethod
    def loads(cls, data: bytes, where: str, access: Access, columns: Columns) -> Table:
        """Return the table of an index file's bytes. Raises as ``open``."""
        return cls._of_file(*safetensors.loads(data, where), where, access, columns)

    @classmethod
    def _of_file(
        cls, metadata: Mapping[str, str], arrays: safetensors.Arrays, where: str, access: Access, columns: Columns
    ) -> Table:
        described = _described(metadata, where, access, columns)
        return cls(*described[:2], **_checked(metadata, arrays, described, where), replaces=described[2])  # type: ignore[arg-type]


class RemoteTable(Table):
    """A table that has the descriptions of its segments, and fetches its arrays when it is asked for one of them.

    Thread-safe. What asks for them is told by ``SegmentGoneError`` that the file is gone meanwhile, or ``damaged``: it
    has to look anew at what there is.

    Args:
        metadata, shapes: what the header of the file says, and what shapes its arrays have.
        fetch: maps the whole file. Raises ``FileNotFoundError``, ``FormatError``, ``StoreError``.

    Raises ``FormatError`` as ``Table.open``.
    """

    damaged: bool

    def __init__(
        self,
        metadata: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        where: str,
        access: Access,
        columns: Columns,
        fetch: Callable[[], Path],
    ) -> None:
        described = _described(metadata, where, access, columns)
        known = {"segments": described[0], "origins": described[1], "replaces": described[2], "damaged": False}
        own = {"_metadata": metadata, "_described": described, "_where": where, "_fetch": fetch, "_lock": ProcessLock()}
        for name, value in (known | own | {"_count": shapes.get("entry", (0,))[0]}).items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return int(self.__dict__["_count"])

    def __repr__(self) -> str:
        return f"<{len(self)} entries of {self.__dict__['_where']}>"

    def bring(self) -> None:
        getattr(self, "prefix")  # noqa: B009

    def __getattr__(self, name: str) -> Any:
        if name not in _ARRAYS:
            raise AttributeError(name)
        own = self.__dict__
        with own["_lock"]:
            if name not in own:
                own.update(self._arrays_of_file())
            return own[name]

    def _arrays_of_file(self) -> dict[str, NDArray[Any]]:
        own = self.__dict__
        try:
            metadata, arrays = safetensors.mapped(own["_fetch"]())
            if metadata != own["_metadata"]:
                raise FormatError(f"{own['_where']} is another file than it was")
            return _checked(metadata, arrays, own["_described"], own["_where"])
        except FileNotFoundError:
            raise SegmentGoneError(f"{own['_where']} was replaced; refresh the space") from None
        except FormatError as error:
            own["damaged"] = True
            raise SegmentGoneError(f"{error}; refresh the space") from None


Described = tuple[tuple[Segment, ...], tuple[str, ...], dict[str, float] | None]


def _described(metadata: Mapping[str, str], where: str, access: Access, columns: Columns) -> Described:
    """Return which segments, origins and replaced files an index file names, checked."""
    version = metadata.get("actcache_index", "")
    if version != VERSION:
        newer = version.isdigit() and int(version) > int(VERSION)
        raise (FormatVersionError if newer else FormatError)(f"{where} is an index of version {version!r}")
    try:
        if metadata.get("texts_checksum", "") != _checksum_of_texts(metadata) and not is_of_before(metadata):
            raise ValueError("what it says of the segments fails its checksum")
        segments = tuple(Segment.from_json(access, value, columns) for value in json.loads(metadata["segments"]))
        origins = tuple(json.loads(metadata["origins"]))
        if not all(isinstance(origin, str) and is_name(origin) for origin in origins):
            raise ValueError("origins that are no segments")
        return segments, origins, _replaced(metadata)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {error}") from None


def is_of_before(metadata: Mapping[str, str]) -> bool:
    """Return whether an index file has one checksum over all of it, as those of before have."""
    return "texts_checksum" not in metadata and "replaces" not in metadata


def _checked(
    metadata: Mapping[str, str], arrays: safetensors.Arrays, described: Described, where: str
) -> dict[str, NDArray[Any]]:
    """Return the arrays of an index file, checked against what it describes."""
    segments, origins, _ = described
    try:
        if metadata["checksum"] != _checksum(metadata, arrays):
            raise ValueError("what it says of the segments fails its checksum")
        count = arrays["entry"].size
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{where} is damaged: {error}") from None
    for name, (dtype, trailing) in _ARRAYS.items():
        array = arrays.get(name)
        if array is None or array.dtype != np.dtype(dtype) or array.shape != (count, *trailing):
            raise FormatError(f"{where} is damaged: {name} is missing or of another shape")
    for name, known in (("segment", len(segments)), ("origin", len(origins))):
        if count and int(arrays[name].max()) >= known:
            raise FormatError(f"{where} is damaged: it counts more segments than it describes")
    return {name: arrays[name] for name in _ARRAYS}


def _replaced(metadata: Mapping[str, str]) -> dict[str, float] | None:
    """Return which index files another one says that it replaces, None where it says nothing of that."""
    if "replaces" not in metadata:
        return None
    replaces = {str(name): float(when) for name, when in json.loads(metadata["replaces"]).items()}
    if not all(map(is_name, replaces)):
        raise ValueError("it replaces files that are no index")
    return replaces


def _checksum_of_texts(texts: Mapping[str, str]) -> str:
    """Return the XXH3-64 of what an index file says of segments, origins and other files."""
    digest = xxhash.xxh3_64(texts["segments"].encode())
    digest.update(texts["origins"].encode())
    digest.update(texts.get("replaces", "").encode())
    return digest.hexdigest()


def _checksum(texts: Mapping[str, str], arrays: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the XXH3-64 of the description of the segments and of where each entry lies and comes from."""
    digest = xxhash.xxh3_64(texts["segments"].encode())
    digest.update(texts["origins"].encode())
    for name in ("segment", "origin", "entry"):
        digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
