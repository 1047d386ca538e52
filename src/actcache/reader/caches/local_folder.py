"""The folder of a local cache: what marks it as one, who may change it now, and how it stays within its bytes.

    actcache-cache.json          the marker; a folder that has it is no store, and a store never becomes a cache
    lock                         locked by whoever changes something
    leases/                      segments that somebody reads
    spaces/<fingerprint>/...     segments and an index, as in a store (docs/format.md)
    tmp/                         what is being written

What is in it are copies. The least recently used segments that nobody has a lease on are evicted to make room.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from actcache.backend import SegmentFormat
from actcache.errors import FormatVersionError, NotAStoreError, StoreGoneError, UsageError
from actcache.format.recipe import is_fingerprint
from actcache.io.files import translated
from actcache.segments import registry
from actcache.segments.places import marker
from actcache.segments.places.local_place import LocalPlace, local_path
from actcache.segments.segment import is_name

MARKER = "actcache-cache.json"
VERSION = 1

_LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.01
_SUFFIX = ".lease"
_UNFINISHED_SECONDS = 60.0  # a lease that is that old and has no name yet was left by somebody killed


class Lease:
    """Names of segments that are in use until ``release``, or until the process ends. Thread-safe.

    It is a file that its owner keeps locked. When the owner is gone, however that came about, the kernel has dropped
    the lock, and the lease counts no more. Raises ``OSError`` where the folder cannot be written, or has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()
        unfinished = folder / f"{os.getpid()}-{secrets.token_hex(8)}.new"
        self._path = unfinished.with_suffix(_SUFFIX)
        self._descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody looks at it before it has its name
            os.rename(unfinished, self._path)
        except BaseException:
            os.close(self._descriptor)
            unfinished.unlink(missing_ok=True)
            raise

    def add(self, names: Iterable[str]) -> list[str]:
        """Take more segments into use; return those that were not yet. Raises ``OSError`` (the disk is full, ...)."""
        with self._lock:
            fresh = [name for name in names if name not in self._names]
            if fresh and self._descriptor >= 0:
                data = "".join(f"{name}\n" for name in fresh).encode()
                if os.write(self._descriptor, data) < len(data):
                    raise OSError(f"{self._path} could be written only in part")
                self._names.update(fresh)
            return fresh

    def release(self) -> None:
        """End the lease. Does nothing the second time."""
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            self._path.unlink(missing_ok=True)
            os.close(descriptor)

    def forget(self) -> None:
        """Let go of the parent's lease in a fork's child: it ends with the parent."""
        self._lock = threading.Lock()  # a thread that the child does not have may have held it
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def in_use(folder: Path) -> set[str]:
    """Return the names in all leases whose owners live, and remove the others."""
    names: set[str] = set()
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.suffix == _SUFFIX:
                names |= _names_of(path)
            elif path.suffix == ".new" and time.time() - path.stat().st_mtime > _UNFINISHED_SECONDS:
                path.unlink()
    return names


def _names_of(path: Path) -> set[str]:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return {name for name in file.read().decode("ascii", "replace").splitlines() if is_name(name)}
        path.unlink()  # its owner is gone
        return set()


class CacheFolder:
    """One process's view of a local cache. Thread-safe; made where it is absent.

    ``nbytes`` is what it may take up on the disk, everything counted (as ``du`` does).

    Raises:
        UsageError, NotAStoreError: it is a store, or holds other things.
        FormatVersionError: a newer release made it.
        OutOfSpaceError, ReadOnlyError, StorageIOError: it cannot be made or locked.
    """

    def __init__(self, path: str | os.PathLike[str], nbytes: int) -> None:
        self.root = local_path(os.fspath(path))
        self.nbytes = nbytes
        self.place = LocalPlace(self.root)
        self.leases = self.root / "leases"
        self._claimed = False
        plugin = registry.load(backend := self._claim())
        if not isinstance(plugin, SegmentFormat):
            raise UsageError(f"a local cache keeps segments, which the {backend} backend does not have")
        self.format = plugin
        self._claimed = True
        self.place.files.make_folders(self.leases)

    def _claim(self) -> str:
        """Make sure that the folder is a cache; return the name of its format."""
        if self.root.exists() and not self.root.is_dir():
            raise NotAStoreError(f"{self.root} is a file; a local cache is a folder")
        names = self.place.names("")
        if marker.NAME in names:
            raise UsageError(f"{self.root} is a store, and a cache evicts; give local_cache a folder of its own")
        if MARKER not in names:
            strangers = [name for name in names if name not in ("lock", "tmp")]
            if strangers:
                raise NotAStoreError(f"{self.root} holds other files ({strangers[0]}, ...): give local_cache its own")
            plugin = registry.load(registry.DEFAULT)
            value = {"format": "actcache local cache", "format_version": VERSION, "backend": plugin.name}
            self.place.make()
            with self.changing():
                self.place.publish_bytes(MARKER, json.dumps(value).encode() + b"\n", replace=False)
        try:
            value = json.loads(self.place.read(MARKER) or b"")
            version, backend = int(value["format_version"]), str(value["backend"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            damaged = f"{self.root / MARKER} is damaged ({error}); remove the folder, it holds copies"
            raise NotAStoreError(damaged) from None
        if version > VERSION:
            raise FormatVersionError(f"{self.root} is a local cache of a newer release (version {version}); upgrade")
        return backend

    @contextmanager
    def changing(self) -> Iterator[bool]:
        """Wait until nobody else changes the folder, and keep others out; yields False where that takes too long.

        What killed writers left behind is gone then. Raises ``StoreError`` where the folder is gone or another's now.
        """
        if self._claimed and self.place.read(MARKER) is None:
            raise StoreGoneError(f"{self.root} is no local cache any more: it was moved, or its {MARKER} removed")
        with translated(f"cannot lock {self.root}"):
            descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = _lock(descriptor)
            if locked:
                # Whoever writes below tmp holds the lock: the rest was left there.
                with translated(f"cannot sweep {self.root}"):
                    self.place.files.sweep(0.0)
            yield locked
        finally:
            # Closing alone would leave the lock to a child that was forked meanwhile.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def make_room(self, nbytes: int, own: str) -> bool:
        """Evict segments until so many bytes more fit; return whether they do. To be called while ``changing``.

        ``own`` is the fingerprint of the space that asks: its index is its own business.
        """
        with translated(f"cannot look through {self.root}"):
            excess = _used(self.root) + nbytes - self.nbytes
            if excess <= 0:
                return True
            used = in_use(self.leases)
            free = sorted(found for found in self._segments() if found[3] not in used)
            if sum(size for _, size, _, _ in free) < excess:
                return False
            others: set[str] = set()
            for _, size, path, _ in free:
                if excess <= 0:
                    break
                self.place.files.remove(path)
                excess -= size
                others.add(path.parent.parent.name)
            for fingerprint in others - {own}:  # an index of segments that are gone only takes up room
                for path in (self.root / "spaces" / fingerprint / "index").glob("*.index"):
                    self.place.files.remove(path)
        return True

    def _segments(self) -> Iterator[tuple[float, int, Path, str]]:
        """Yield (last use, bytes, path, name) of every segment."""
        for folder in (self.root / "spaces").glob("*/segments"):
            if is_fingerprint(folder.parent.name):
                for path in folder.iterdir():
                    name = path.name.partition(".")[0]
                    with suppress(FileNotFoundError):
                        if is_name(name):
                            yield path.stat().st_mtime, _used(path), path, name


def _lock(descriptor: int) -> bool:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOCK_POLL_SECONDS)


def _used(path: Path) -> int:
    """Return the bytes that a file or folder takes up on the disk."""
    total = path.lstat().st_blocks * 512
    if path.is_dir():
        with os.scandir(path) as scan:
            for entry in scan:
                with suppress(FileNotFoundError):
                    total += _used(Path(entry.path))
    return total
