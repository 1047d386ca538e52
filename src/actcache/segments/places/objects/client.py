"""The seam between a place in an object store and the library that talks to it.

Every exception that fsspec, botocore, aiohttp or obstore raises is translated behind this seam: into one of the three
below, or into an exception of ``actcache.errors``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from actcache.errors import StorageIOError

#: Bytes that are only read.
Data: TypeAlias = bytes | memoryview


class ObjectNotFoundError(Exception):
    """There is no such object, or no such upload."""


class ObjectExistsError(Exception):
    """An object that must not be replaced stands already."""


class TransientError(StorageIOError):
    """The same request may succeed a moment later. Nobody knows whether this one was carried out."""


class UnsupportedError(StorageIOError):
    """The store has no such operation, or nobody may use it."""


@dataclass(frozen=True)
class Body:
    """A range of an object."""

    data: Data
    size: int  # bytes of the whole object


@dataclass(frozen=True)
class Head:
    """What a store tells about an object."""

    size: int
    age: float  # seconds since it was written, by the server's clock
    token: str | None = None  # what ``put`` or ``begin`` was given; None where the store keeps or lists none


@dataclass(frozen=True)
class Listing:
    files: Mapping[str, Head]  # by key
    folders: frozenset[str]  # keys with a slash at the end


@dataclass(frozen=True)
class Upload:
    """An unfinished multipart upload."""

    key: str
    id: str
    age: float  # seconds since it was begun, by the server's clock


class Client(ABC):
    """Objects below one root, by keys relative to it. Thread-safe; each call is one attempt and blocks.

    Raises (every method):
        TransientError: the request may be repeated.
        ObjectNotFoundError: there is no such object; listing never raises it.
        StoreNotFoundError: there is no such bucket.
        ReadOnlyError, OutOfSpaceError, StorageIOError: repeating it does not help; the message says what does.
    """

    where: str  # the root, for messages
    multipart: bool  # whether large files are uploaded by ``begin``, ``part`` and ``complete``; else by ``put_file``

    def check_bucket(self) -> None:  # noqa: B027 (where every request tells, there is nothing to ask)
        """Raise ``StoreNotFoundError`` where there is no such bucket."""

    @abstractmethod
    def get(self, key: str, offset: int, nbytes: int, size: int | None = None) -> Body:
        """Return a range of an object: exactly ``nbytes`` bytes, or as many as the object has from ``offset`` on.

        ``size``: the bytes of an object that never changes, where they are known; some libraries cost a request to tell
        them. One that has others by now is looked at all the same.
        """

    @abstractmethod
    def head(self, key: str) -> Head: ...

    @abstractmethod
    def listing(self, prefix: str, *, recursive: bool) -> Listing:
        """Return all objects whose key begins with ``prefix``; those behind a further slash as their folder unless
        ``recursive``."""

    @abstractmethod
    def put(self, key: str, data: Data, token: str, *, create: bool) -> None:
        """Write an object, all or nothing; where it stands, ``create`` raises ``ObjectExistsError``. What the store
        says that it holds, its size or checksum, is compared.

        ``token`` is kept with the object, so that after a lost response ``head`` tells whose it is.
        """

    def put_file(self, key: str, path: Path) -> None:
        """Write an object from a file of any size, all or nothing; where uploads are not in parts."""
        raise NotImplementedError

    # Uploads in parts, where there are such.

    def begin(self, key: str, token: str) -> str:
        """Begin a multipart upload; return its id."""
        raise NotImplementedError

    def part(self, key: str, upload: str, number: int, data: Data) -> str:
        """Upload a part, numbered from 1; return its etag."""
        raise NotImplementedError

    def complete(self, key: str, upload: str, etags: Sequence[str], token: str, *, create: bool) -> None:
        """Make an object of the parts, all or nothing; ``token`` is what ``begin`` was given."""
        raise NotImplementedError

    def abort(self, key: str, upload: str) -> None:
        raise NotImplementedError

    def uploads(self) -> list[Upload]:
        """Return the unfinished uploads below the root. Raises ``UnsupportedError`` where nobody can tell."""
        return []

    @abstractmethod
    def copy(self, key: str, target: str) -> None:
        """Copy an object on the server."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove an object; it need not be there."""

    @abstractmethod
    def abandon(self) -> None:
        """Called in the child of a fork: its connections are the parent's, and may not even be closed here."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections within a few seconds. Does nothing the second time."""
