"""The in-memory backend, ``ram:name``: dictionaries, nothing else. The oracle that other backends are held against.

Stores live as long as the process and are shared by name. Nothing here is shared with the segmented backends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from actcache.backend import (
    VALUES,
    Backend,
    Block,
    Buffers,
    Columns,
    EntryLocations,
    Expected,
    Snapshot,
    SpaceDriver,
    StoredFile,
    StoreDriver,
    Usage,
)
from actcache.errors import BackendError, ReadOnlyError, StoreNotFoundError


@dataclass(frozen=True)
class _Entry:
    checksum: int
    extra_checksum: int
    rows: Mapping[str, NDArray[np.generic]]


@dataclass
class _Contents:
    blobs: dict[str, bytes] = field(default_factory=dict)
    spaces: dict[str, dict[bytes, _Entry]] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)  # when, by the name of a blob or space
    lock: threading.Lock = field(default_factory=threading.Lock)


_STORES: dict[str, _Contents] = {}


class MemoryBackend(Backend):
    """See ``Backend``. It has no options."""

    name = "ram"

    def open(self, location: str, *, mode: str, options: Mapping[str, Any]) -> StoreDriver:
        if options:
            raise BackendError(f"a ram store has no option {sorted(options)[0]!r}")
        if location not in _STORES:
            if mode == "r":
                raise StoreNotFoundError(f"there is no store ram:{location} in this process")
            _STORES[location] = _Contents()
        return _MemoryStore(_STORES[location], writable=mode == "a")

    def forget(self, location: str) -> None:
        """Drop a store and its memory."""
        _STORES.pop(location, None)


class _MemoryStore(StoreDriver):
    def __init__(self, contents: _Contents, *, writable: bool) -> None:
        self._contents = contents
        self._writable = writable

    def read_blob(self, name: str) -> bytes | None:
        return self._contents.blobs.get(name)

    def write_blob(self, name: str, data: bytes, *, replace: bool) -> bool:
        _check(self._writable)
        with self._contents.lock:
            if name in self._contents.blobs and not replace:
                return False
            self._contents.blobs[name] = bytes(data)
            self._contents.written[name] = time.monotonic()
            return True

    def delete_blob(self, name: str) -> bool:
        _check(self._writable)
        with self._contents.lock:
            return self._contents.blobs.pop(name, None) is not None

    def blobs(self, prefix: str) -> list[str]:
        return sorted(name for name in self._contents.blobs if name.rpartition("/")[0] == prefix)

    def spaces(self) -> list[str]:
        parts = (name.split("/") for name in self._contents.blobs)
        return sorted({part[1] for part in parts if part[0] == "spaces"})

    def space(self, fingerprint: str, columns: Columns) -> SpaceDriver:
        return _MemorySpace(self._contents, fingerprint, writable=self._writable)

    def delete_space(self, fingerprint: str) -> bool:
        _check(self._writable)
        with self._contents.lock:
            blobs = [name for name in self._contents.blobs if name.startswith(f"spaces/{fingerprint}/")]
            for name in blobs:
                del self._contents.blobs[name]
            return self._contents.spaces.pop(fingerprint, None) is not None or bool(blobs)

    def listing(self) -> dict[str, StoredFile]:
        with self._contents.lock:
            sizes = {name: len(data) for name, data in self._contents.blobs.items()}
            for fingerprint, entries in self._contents.spaces.items():
                rows = (array for entry in entries.values() for array in entry.rows.values())
                sizes[f"spaces/{fingerprint}/entries"] = sum(array.nbytes for array in rows)
            now, written = time.monotonic(), self._contents.written
            return {name: StoredFile(nbytes, now - written.get(name, now)) for name, nbytes in sizes.items()}

    def close(self) -> None:
        pass


class _MemorySpace(SpaceDriver):
    def __init__(self, contents: _Contents, fingerprint: str, *, writable: bool) -> None:
        self._contents = contents
        self._fingerprint = fingerprint
        self._lock = contents.lock
        self._writable = writable
        with self._lock:
            self._entries()

    def _entries(self) -> dict[bytes, _Entry]:
        return self._contents.spaces.setdefault(self._fingerprint, {})

    def append(self, block: Block) -> None:
        _check(self._writable)
        fresh = {}
        columns = cast(Mapping[str, NDArray[np.generic]], block.columns)  # only compaction makes others
        for i, key in enumerate(block.keys):
            begin, end = int(block.offsets[i]), int(block.offsets[i + 1])
            rows = {name: column[begin:end].copy() for name, column in columns.items()}
            extra = 0 if block.extra_checksums is None else int(block.extra_checksums[i])
            fresh[key.tobytes()] = _Entry(int(block.checksums[i]), extra, rows)
        with self._lock:
            self._entries().update(fresh)
            self._contents.written[f"spaces/{self._fingerprint}/entries"] = time.monotonic()

    def delete(self, keys: NDArray[np.uint8]) -> int:
        _check(self._writable)
        with self._lock:
            return sum(self._entries().pop(key, None) is not None for key in {key.tobytes() for key in keys})

    def snapshot(self) -> Snapshot:
        with self._lock:
            return _MemorySnapshot(dict(self._entries()))

    def close(self) -> None:
        pass


class _MemorySnapshot(Snapshot):
    """``EntryLocations.row`` is the position of the key among the snapshot's entries."""

    def __init__(self, entries: dict[bytes, _Entry]) -> None:
        self._keys = list(entries)
        self._positions = {key: i for i, key in enumerate(self._keys)}
        self._entries = list(entries.values())

    def locate(self, keys: NDArray[np.uint8]) -> EntryLocations:
        rows = [self._positions.get(key.tobytes(), -1) for key in keys]
        found = [self._entries[row] if row >= 0 else None for row in rows]
        return EntryLocations(
            np.array([len(entry.rows[VALUES]) if entry else 0 for entry in found], np.int64),
            np.array([entry.checksum if entry else 0 for entry in found], np.uint64),
            np.zeros(len(rows), np.int64),
            np.array(rows, np.int64),
        )

    def has(self, column: str, located: EntryLocations) -> NDArray[np.bool_]:
        return np.array([row >= 0 and column in self._entries[row].rows for row in located.row.tolist()], bool)

    def extra_checksums(self, located: EntryLocations) -> NDArray[np.uint64]:
        return np.array([self._entries[row].extra_checksum if row >= 0 else 0 for row in located.row], np.uint64)

    def gather(
        self, located: EntryLocations, out: Buffers, width: int | None, expected: Expected | None
    ) -> NDArray[np.int64]:
        for name, buffer in out.items():
            position = 0
            for row, tokens in zip(located.row.tolist(), located.tokens.tolist(), strict=True):
                end = position + tokens
                if tokens:
                    buffer[position:end] = self._entries[row].rows[name]
                position = end if width is None else position + width
                buffer[end:position] = 0
        if expected is None:
            return np.empty(0, np.int64)
        return expected.wrong(out, located.tokens, width)

    def read_ahead(self, located: EntryLocations) -> bool:
        """Do nothing: all is in memory."""
        return False

    def keys(self) -> NDArray[np.uint8]:
        return np.frombuffer(b"".join(sorted(self._keys)), np.uint8).reshape(-1, 32)

    def usage(self) -> Usage:
        nbytes = sum(rows.nbytes for entry in self._entries for rows in entry.rows.values())
        tokens = sum(len(entry.rows[VALUES]) for entry in self._entries)
        return Usage(len(self._entries), tokens, nbytes, len(self._entries))

    def damaged(self) -> dict[str, str]:
        return {}


def _check(writable: bool) -> None:
    if not writable:
        raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to write")


backend = MemoryBackend()
