"""Leases: who uses which segments of a local cache, told in files that do not outlast their owners.

A lease is a file of segment names that its owner keeps locked. When the owner is gone, however that came about, the
kernel has dropped the lock, and the lease counts no more.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from actcache.storage.segment import is_name

_SUFFIX = ".lease"
_UNFINISHED_SECONDS = 60.0  # a lease that is that old and has no name yet was left by somebody killed


class Lease:
    """Names of segments that are in use until ``release``, or until the process ends. Thread-safe.

    Raises:
        OSError: the folder cannot be written, or its file system has no locks.
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
        """Take more segments into use; return those that were not yet.

        Raises:
            OSError: the disk is full, ...
        """
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
    """Return the names in all leases whose owners live, and remove the others.

    Raises:
        OSError: the folder cannot be read.
    """
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
