"""The small arrays of segments: read in blocks, a bounded number of which stays in memory.

One request brings the head of an object, and with it the header and mostly all of the small arrays of a segment.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from actcache.backend import SegmentFiles
from actcache.errors import FormatError
from actcache.io.workers import ProcessLock
from actcache.segments.places.objects.client import ObjectNotFoundError
from actcache.segments.places.objects.session import Session

BLOCK = 256 << 10
CACHE_BYTES = 128 << 20
_AHEAD = 4 * BLOCK  # what is read at least behind the head of an object: small arrays lie one after another
_LARGEST = 4 << 20  # what is larger is read by itself and not kept
_MOST_FILES = 256  # of one segment


class CachedBlocks:
    """Blocks of objects that never change. Thread-safe; usable after a fork."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._held = 0  # bytes
        self._sizes: dict[str, int] = {}
        self._lost: set[str] = set()  # segments that were not there when something of them was read
        self._lock = ProcessLock()

    def learn(self, sizes: Mapping[str, int]) -> None:
        """Take the sizes of objects from a listing."""
        with self._lock:
            self._sizes.update(sizes)

    def listed_size(self, key: str) -> int | None:
        """Return the bytes of an object, where a listing has told them."""
        return self._sizes.get(key)

    def forget(self, key: str) -> None:
        """Drop what is known of an object or of all below a folder, given with its slash."""

        def within(known: str) -> bool:
            return known.startswith(key) if key.endswith("/") else known == key

        with self._lock:
            for known in filter(within, list(self._sizes)):
                del self._sizes[known]
            for block in [block for block in self._kept if within(block[0])]:
                self._held -= len(self._kept.pop(block))

    def note_lost(self, segment: str) -> None:
        with self._lock:
            self._lost.add(segment)

    def take_lost(self, folder: str) -> set[str]:
        """Return the segments of a folder, given with its slash, that were found gone since somebody asked."""
        with self._lock:
            lost = {segment for segment in self._lost if segment.startswith(folder)}
            self._lost -= lost
        return lost

    def size(self, key: str) -> int:
        """Return the bytes of an object. Raises ``ObjectNotFoundError``, and what a client raises."""
        size = self._sizes.get(key)
        if size is None:
            self._load(key, 0, 1)
            size = self._sizes[key]
        return size

    def read(self, key: str, offset: int, nbytes: int, *, ahead: bool = False) -> bytes:
        """Return a range of an object, as much of it as there is. Raises ``ObjectNotFoundError``, and as a client."""
        if nbytes <= 0:
            return b""
        if nbytes > _LARGEST:
            return bytes(self._session.client().get(key, offset, nbytes, self._sizes.get(key)).data)
        first, last = offset // BLOCK, (offset + nbytes - 1) // BLOCK + 1
        blocks = self._peek(key, first, last)
        missing = [number for number in range(first, last) if number not in blocks]
        if missing:
            end = missing[-1] + 1
            if ahead and missing[0]:
                end = max(end, missing[0] + _AHEAD // BLOCK)
            blocks |= self._load(key, missing[0], end)
        data = b"".join(blocks.get(number, b"") for number in range(first, last))
        return data[offset - first * BLOCK :][:nbytes]

    def peek(self, key: str, offset: int, nbytes: int) -> bytes | None:
        """Return a range that is all in memory, else None."""
        first, last = offset // BLOCK, (offset + nbytes - 1) // BLOCK + 1
        blocks = self._peek(key, first, last)
        if len(blocks) < last - first:
            return None
        data = b"".join(blocks[number] for number in range(first, last))[offset - first * BLOCK :][:nbytes]
        return data if len(data) == nbytes else None

    def _peek(self, key: str, first: int, last: int) -> dict[int, bytes]:
        found = {}
        with self._lock:
            for number in range(first, last):
                block = self._kept.get((key, number))
                if block is not None:
                    self._kept.move_to_end((key, number))
                    found[number] = block
        return found

    def _load(self, key: str, first: int, last: int) -> dict[int, bytes]:
        """Read the blocks first..last-1 with one request."""
        body = self._session.client().get(key, first * BLOCK, (last - first) * BLOCK, self._sizes.get(key))
        data = memoryview(body.data)
        found = {first + i: bytes(data[i * BLOCK : (i + 1) * BLOCK]) for i in range(-(-len(data) // BLOCK))}
        with self._lock:
            self._sizes[key] = body.size
            for number, block in found.items():
                self._held += len(block) - len(self._kept.pop((key, number), b""))
                self._kept[key, number] = block
            while self._held > CACHE_BYTES:
                self._held -= len(self._kept.popitem(last=False)[1])
        return found


class ObjectSegment(SegmentFiles):
    """The object, or the objects below a prefix, of one segment. Thread-safe.

    Without the file ``commit`` a segment of several files is not there; it is empty where it is one object.
    """

    path = None

    def __init__(self, session: Session, blocks: CachedBlocks, name: str, commit: str) -> None:
        self.where = f"{session.where}/{name}"
        self._session, self._blocks, self._name, self._commit = session, blocks, name, commit

    def names(self) -> list[str]:
        if not self._commit:
            self.size("")
            return [""]
        found = self._session.client().listing(f"{self._name}/", recursive=True).files
        names = {key.removeprefix(f"{self._name}/"): listed.size for key, listed in found.items()}
        if self._commit not in names:
            raise self._gone()
        if len(names) > _MOST_FILES:
            raise FormatError(f"{self.where} holds more objects than a segment; this is none")
        self._blocks.learn({f"{self._name}/{name}": size for name, size in names.items()})
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def size(self, name: str) -> int:
        with self._key(name) as key:
            return self._blocks.size(key)

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        with self._key(name) as key:
            return self._blocks.read(key, offset, nbytes, ahead=True)

    @contextmanager
    def _key(self, name: str) -> Iterator[str]:
        """Yield the key of a file; that there is no such object means the segment is gone, or that it is damaged."""
        if bool(name) != bool(self._commit):
            kind = "several objects" if self._commit else "one object"
            raise FormatError(f"{self.where} is {kind}: no {name!r:.100} there")
        if ".." in name.split("/") or "" in name.split("/")[1:]:
            raise FormatError(f"{self.where} has no file {name!r:.100}")
        try:
            yield f"{self._name}/{name}" if name else self._name
        except ObjectNotFoundError:
            self._blocks.note_lost(self._name)
            if name and name != self._commit:
                with suppress(ObjectNotFoundError):
                    self._session.client().head(f"{self._name}/{self._commit}")
                    raise FormatError(f"{self.where} is damaged: {name} is missing") from None
            raise self._gone() from None

    def _gone(self) -> FileNotFoundError:
        self._blocks.forget(f"{self._name}/" if self._commit else self._name)
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where)
