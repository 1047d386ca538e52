"""Files in an object store that are no part of a store: found by name, folder or pattern, and read as streams.

The same clients, options, credentials, repetitions and messages as a store's.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from actcache.errors import BackendError, StorageIOError
from actcache.segments.places.objects import options as opt
from actcache.segments.places.objects.client import ObjectNotFoundError
from actcache.segments.places.objects.session import Session

_WILD = "*["  # a question mark begins a URL's options
_LEAST, _MOST = 1 << 20, 1 << 24  # bytes of a request; reading on, each is twice as large as the one before


class Bucket:
    """A bucket to read from. Thread-safe; usable after a fork."""

    def __init__(self, target: opt.Target) -> None:
        self.where = f"{target.protocol}://{target.bucket}"
        whole = dataclasses.replace(target, url=self.where, prefix="")
        self._session = Session(self.where, whole.connect, whole.retry_seconds)

    def open(self, key: str) -> io.BufferedReader:
        """Open an object to read; its bytes come by ranges, as they are read.

        Raises ``FileNotFoundError``; ``StoreError`` also while it is read, and where it was replaced meanwhile.
        """
        return io.BufferedReader(_Object(self._session, key), 1 << 17)

    def holds(self, key: str) -> bool:
        with suppress(ObjectNotFoundError):
            self._session.client().head(key)
            return True
        return False

    def keys(self, prefix: str, *, recursive: bool) -> list[str]:
        """Return the keys that begin with a prefix, sorted; those that stand for a folder left out."""
        found = self._session.client().listing(prefix, recursive=recursive).files
        return sorted(key for key in found if key and not key.endswith("/"))

    def close(self) -> None:
        self._session.close()


class _Object(io.RawIOBase):
    """An object's bytes. Not thread-safe."""

    def __init__(self, session: Session, key: str) -> None:
        self._session, self._key, self._position = session, key, 0
        self._start, self._held, self._next = 0, memoryview(b""), _LEAST
        self._size: int | None = None
        self._size = self._fetch(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= (self._size or 0) or not view:
            return 0
        end = self._start + len(self._held)
        if not self._start <= self._position < end:
            self._next = min(_MOST, 2 * self._next) if self._position == end else _LEAST
            self._fetch(self._position)
        begin = self._position - self._start
        data = self._held[begin : begin + len(view)]
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, start: int) -> int:
        """Hold what stands from there on; return the size of the object."""
        client = self._session.client()
        try:
            body = client.get(self._key, start, self._next)
        except ObjectNotFoundError:
            raise FileNotFoundError(2, "there is no such object", f"{client.where}/{self._key}") from None
        if self._size not in (None, body.size):
            raise StorageIOError(f"{client.where}/{self._key} was replaced while it was read; do the same again")
        self._start, self._held = start, memoryview(body.data)
        return body.size


@dataclass(frozen=True)
class Found:
    """What a URL names: one object, those below ``root``, or those that a pattern ``chosen``."""

    bucket: Bucket
    root: str
    keys: list[str]
    single: bool = False
    chosen: bool = False


@contextmanager
def objects(url: str) -> Iterator[Found]:
    """Find the objects that a URL names, in the order of their keys: one, a folder's, or a pattern's.

    In a pattern ``*`` and ``[...]`` stand for parts of a name, ``**`` for any folders; options may stand in the URL's
    query, as of a store's.

    Raises ``BackendError`` where it names no bucket or an option is not known, ``MissingExtraError``, ``StoreError``.
    """
    target = opt.target(url, {})
    if any(character in target.bucket for character in _WILD):
        raise BackendError(f"{target.url}: name the bucket; a pattern may stand behind it")
    with closing(Bucket(target)) as bucket:
        yield _found(bucket, target, folder=url.partition("?")[0].endswith("/"))


def _found(bucket: Bucket, target: opt.Target, *, folder: bool) -> Found:
    key = target.prefix.rstrip("/")
    if any(character in key for character in _WILD):
        parts = key.split("/")
        fixed = next(place for place, part in enumerate(parts) if any(character in part for character in _WILD))
        prefix = "".join(f"{part}/" for part in parts[:fixed])
        keys = bucket.keys(prefix, recursive=fixed + 1 < len(parts) or "**" in parts[-1])
        return Found(bucket, key, [one for one in keys if one == key or _matches(one.split("/"), parts)], chosen=True)
    if key and not folder and bucket.holds(key):
        return Found(bucket, key, [key], single=True)
    return Found(bucket, key, bucket.keys(f"{key}/" if key else "", recursive=True))


def _matches(names: list[str], parts: list[str]) -> bool:
    """Return whether a path matches a pattern; hidden names only where the pattern says the dot, as in a shell."""
    if not parts:
        return not names
    if parts[0] == "**":
        some = range(len(names) + 1) if len(parts) > 1 else range(len(names), len(names) + 1)
        hidden = next((place for place, name in enumerate(names) if name.startswith(".")), len(names))
        return any(_matches(names[count:], parts[1:]) for count in some if count <= hidden)
    if not names or (names[0].startswith(".") and not parts[0].startswith(".")):
        return False
    return fnmatchcase(names[0], parts[0]) and _matches(names[1:], parts[1:])
