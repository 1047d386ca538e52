"""A file of the user's own, beside any store: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from actcache.errors import UsageError
from actcache.io.files import FileOperations, claim, translated


def check_new(path: Path) -> None:
    """Refuse a path where something stands, before much work is done for it.

    Raises:
        UsageError: saying so.
    """
    if os.path.lexists(path):
        raise UsageError(f"{path} stands already; remove it, or write another file")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; what is written there gets its name at the end, durably.

    Raises:
        UsageError: something has that name by then; it is left as it is.
        OutOfSpaceError, ReadOnlyError, StorageIOError: it cannot be written; nothing became visible.
    """
    try:
        with _written(path, claim) as temporary:  # never over another's
            yield temporary
    except FileExistsError:
        raise UsageError(f"{path} was made meanwhile; write another file") from None


def replaced_file(path: Path) -> AbstractContextManager[Path]:
    """The same for a file that takes the place of what has its name.

    Raises:
        OutOfSpaceError, ReadOnlyError, StorageIOError: it cannot be written; what stood there still does.
    """
    return _written(path, FileOperations.rename)


@contextmanager
def _written(path: Path, name: Callable[[FileOperations, Path, Path], None]) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with translated(f"cannot write {path}"):
        try:
            yield temporary
            disk = FileOperations()
            disk.sync_file(temporary)
            name(disk, temporary, path)
            disk.sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
