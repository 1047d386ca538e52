"""The environments of this process: each file is opened once, by whoever comes first, and shared.

A second open in one process would drop the first one's locks, and an environment must not be used across a fork: a
child closes what it inherits, without touching what is the parent's, and opens anew.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from actcache.errors import StoreError
from actcache_lmdb.environment import MAP_LOCK, Environment
from actcache_lmdb.failures import translated

logger = logging.getLogger(__name__)

_FORK_SECONDS = 30.0  # that a fork waits for transactions of other threads

_Key = tuple[int, int]  # device and inode of data.mdb
_OPEN: dict[_Key, Environment] = {}
_USERS: dict[Environment, int] = {}
_LOCK = threading.RLock()  # of both; reentrant, since the garbage collector may release in between


def acquire(folder: Path, map_size: int | None, *, writable: bool) -> Environment:
    """Return the process's environment of a folder, for one more user. ``FileNotFoundError``: the folder is gone."""
    status = os.stat(folder / "data.mdb")
    key = (status.st_dev, status.st_ino)
    with _LOCK:
        if key in _OPEN and (_OPEN[key].wanted or not writable):
            return retain(_OPEN[key])
    # Alone: opening must not run beside a fork, either. MAP_LOCK first: who shares it may need the other.
    with MAP_LOCK.exclusive(), _LOCK:
        try:
            with translated(f"cannot open {folder}"):
                if key not in _OPEN:
                    _OPEN[key] = Environment(folder, map_size, writable=writable)
                elif writable and not _OPEN[key].wanted:
                    _OPEN[key].upgrade()
        except StoreError as error:
            if not folder.exists():  # a generation that was retired just now
                raise FileNotFoundError(folder) from error
            raise
        return retain(_OPEN[key])


def retain(environment: Environment) -> Environment:
    """Count one more user."""
    with _LOCK:
        _USERS[environment] = _USERS.get(environment, 0) + 1
    return environment


def release(environment: Environment) -> None:
    """Give back what ``acquire`` or ``retain`` gave; the last one closes, outside of all transactions."""
    with _LOCK:
        if environment not in _USERS:
            return  # of a fork's parent
        _USERS[environment] -= 1
        if not _USERS[environment]:
            del _USERS[environment]
            for key in [key for key, other in _OPEN.items() if other is environment]:
                del _OPEN[key]
            environment.close()


_fork_is_safe = False


def _before_fork() -> None:
    global _fork_is_safe
    _fork_is_safe = MAP_LOCK.acquire_exclusive(_FORK_SECONDS)
    _LOCK.acquire()
    if not _fork_is_safe:
        logger.warning("a fork while LMDB transactions run: the child cannot use these stores; use spawn instead")


def _after_in_parent() -> None:
    _LOCK.release()
    if _fork_is_safe:
        MAP_LOCK.release_exclusive()


def _after_in_child() -> None:
    global _LOCK
    MAP_LOCK.__init__()  # type: ignore[misc]
    _LOCK = threading.RLock()
    inherited = list(_OPEN.values())
    _OPEN.clear()
    _USERS.clear()
    for environment in inherited:
        if _fork_is_safe:
            environment.close()  # no transaction is alive, so this frees the child's copies and nothing of the parent's
        else:
            environment.abandon()


os.register_at_fork(before=_before_fork, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
