"""LMDB's exceptions, turned into those of actcache at this edge only."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lmdb

from actcache.errors import ActcacheError, FormatError, StorageIOError, StoreError
from actcache.io.files import NO_SPACE, failure

_DAMAGE = (
    *(lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.VersionMismatchError, lmdb.BadDbiError),
    *(lmdb.IncompatibleError, lmdb.BadValsizeError, lmdb.NotFoundError, lmdb.CursorFullError, lmdb.PageFullError),
)
_PROBE = 1 << 20


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn the failures of LMDB and the operating system into exceptions that say what to do."""
    try:
        yield
    except ActcacheError:
        raise
    except lmdb.Error as error:
        raise _translate(what, error) from error
    except OSError as error:
        raise _of_code(what, error.errno or 0, error) from error


def is_full(folder: Path) -> bool:
    """Return whether not even a small file can be written there."""
    probe = folder / f"probe-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        return error.errno in NO_SPACE
    try:
        data = bytes(_PROBE)
        return os.write(descriptor, data) < len(data)
    except OSError as error:
        return error.errno in NO_SPACE
    finally:
        os.close(descriptor)
        probe.unlink(missing_ok=True)


def _translate(what: str, error: lmdb.Error) -> ActcacheError:
    if isinstance(error, _DAMAGE):
        return FormatError(f"{what}: the LMDB file is damaged ({error}); remove the space and fill again")
    if isinstance(error, lmdb.MemoryError):
        return StorageIOError(f"{what}: too little memory or address space (ulimit -v); see the option map_size")
    if isinstance(error, lmdb.ReadersFullError):
        return StoreError(f"{what}: too many readers at once on one space; close some processes, then try again")
    if isinstance(error, lmdb.ReadonlyError):
        return _of_code(what, errno.EACCES, error)
    return _of_code(what, int(getattr(error, "code", 0) or 0), error)


def _of_code(what: str, code: int, error: BaseException) -> StoreError:
    return failure(what, errno.ENOSPC if "No space left" in str(error) else code, str(error))
