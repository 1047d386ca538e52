"""A place in a folder of a local or shared file system."""

from __future__ import annotations

import errno
import functools
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actcache.backend import SegmentFiles, StoredFile
from actcache.errors import BackendError, FormatError, StorageIOError
from actcache.io.files import Files, is_local, translated
from actcache.segments.places.place import Place
from actcache.segments.rows import MappedRows, ReadRows, RowSource
from actcache.segments.segment import Segment

_MOST_FILES = 256  # of one segment
_DEEPEST = 4  # folders in a segment


def local_path(location: str) -> Path:
    """Return the folder that a location names, absolute; links and ``..`` are left as they are.

    Raises ``BackendError`` where it begins with the home of an unknown user, or the working directory is gone.
    """
    try:
        path = Path(location).expanduser().absolute()
    except RuntimeError as error:
        raise BackendError(f"{location}: {error} Write ./~name for a folder of that name") from None
    except FileNotFoundError:
        raise BackendError(f"{location}: the working directory was removed; give an absolute path") from None
    return Path("/", *path.parts[1:])  # pathlib keeps two slashes at the beginning


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file. Others raise ``StorageIOError``: a pipe would block, a device has no end."""
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        kind = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise StorageIOError(f"{path} is a pipe, socket or device and no file of a store: remove it")
        return file.read()


@functools.cache
def _user(number: int) -> str:
    """Return the name of a user of this machine, or the number where there is none."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


class LocalPlace(Place):
    """A place in a folder, whose path is absolute, or it changes with the working directory.

    ``mapped`` says whether rows are gathered from mappings; None decides by the file system.
    """

    def __init__(self, root: Path, *, mapped: bool | None = None) -> None:
        self.where, self.root, self.files, self._mapped = str(root), root, Files(root), mapped

    def make(self) -> None:
        self.files.make_root()

    def names(self, folder: str) -> list[str]:
        with translated(f"cannot list {self.root / folder}"):
            try:
                return sorted(os.listdir(self.root / folder))
            except FileNotFoundError:
                return []

    def read(self, name: str) -> bytes | None:
        with translated(f"cannot read {self.root / name}"):
            try:
                return read_file(self.root / name)
            except FileNotFoundError:
                return None

    def publish(self, name: str, write: Callable[[Path], object], *, replace: bool = False) -> bool:
        return self.files.publish(self.root / name, write, replace=replace)

    def publish_bytes(self, name: str, data: bytes, *, replace: bool) -> bool:
        return self.files.publish_bytes(self.root / name, data, replace=replace)

    def remove(self, name: str) -> bool:
        return self.files.remove(self.root / name)

    def move(self, name: str, target: str) -> bool:
        return self.files.move(self.root / name, self.root / target)

    def sync_names(self, folder: str) -> None:
        with translated(f"cannot sync {self.root / folder}"):
            self.files.disk.sync_folder(self.root / folder)

    def age(self, name: str) -> float | None:
        with translated(f"cannot look at {self.root / name}"):
            try:
                # The time at which it got its name, by the clock of the machine that has the disk.
                return self.files.now() - os.lstat(self.root / name).st_ctime
            except FileNotFoundError:
                return None

    def segment(self, name: str) -> SegmentFiles:
        return LocalSegment(self.root / name)

    def local_copy(self, name: str) -> Path:
        return self.root / name

    def rows(self, segments: list[Segment]) -> RowSource:
        mapped = is_local(self.root) if self._mapped is None else self._mapped
        return MappedRows(segments) if mapped else ReadRows(segments)

    def remove_folder(self, folder: str) -> bool:
        with translated(f"cannot look at {self.root / folder}"):
            if not (self.root / folder).is_dir():
                return False
        return self.files.remove(self.root / folder)

    def listing(self, *, exact: bool) -> dict[str, StoredFile]:
        found: dict[str, StoredFile] = {}
        with translated(f"cannot list {self.root}"):
            now = self.files.now() if exact else time.time()
            for folder, _, names in os.walk(self.root):
                for name in names:
                    path = Path(folder, name)
                    try:
                        status = os.lstat(path)
                    except FileNotFoundError:  # a temporary file, or a segment that was replaced
                        continue
                    stored = StoredFile(status.st_size, max(0.0, now - status.st_mtime), _user(status.st_uid))
                    found[path.relative_to(self.root).as_posix()] = stored
        return found

    def sweep(self, older_than: float) -> int:
        return self.files.sweep(older_than)

    def close(self) -> None:
        """Nothing is held open between calls."""


class LocalSegment(SegmentFiles):
    """The file, or the folder of files, of one segment. Links inside of the folder lead elsewhere and are refused."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self.where = str(path)

    def names(self) -> list[str]:
        if not stat.S_ISDIR(os.stat(self.path).st_mode):
            return [""]
        names: list[str] = []
        pending = [("", 0)]
        while pending:
            folder, depth = pending.pop()
            with os.scandir(self.path / folder) as scan:
                for entry in scan:
                    name = f"{folder}{entry.name}"
                    if entry.name.startswith("."):  # a note of an operating system
                        continue
                    if entry.is_dir(follow_symlinks=False) and depth < _DEEPEST:
                        pending.append((f"{name}/", depth + 1))
                    elif entry.is_file(follow_symlinks=False):
                        names.append(name)
                    else:
                        raise FormatError(f"{self.where}: {name} is no file; this is no segment")
                    if len(names) + len(pending) > _MOST_FILES:
                        raise FormatError(f"{self.where} holds more files than a segment; this is none")
        return sorted(names)

    def size(self, name: str) -> int:
        with self._opened(name) as (_, size):
            return size

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        with self._opened(name) as (descriptor, size):
            nbytes = max(0, min(nbytes, size - offset))
            parts = []
            while nbytes and (part := os.pread(descriptor, nbytes, offset)):
                parts.append(part)
                nbytes, offset = nbytes - len(part), offset + len(part)
            return b"".join(parts)

    @contextmanager
    def _opened(self, name: str) -> Iterator[tuple[int, int]]:
        """Open a regular file of the segment; yield its descriptor and size. A pipe would block."""
        path = self.path / name if name else self.path
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            descriptor = os.open(path, flags | os.O_NOFOLLOW if name else flags)
        except (FileNotFoundError, NotADirectoryError):
            if name and self.path.is_dir():
                raise FormatError(f"{self.where} is damaged: {name} is missing") from None
            if name and self.path.exists():
                raise FormatError(f"{self.where} is a file and should be a folder") from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.where) from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise FormatError(f"{self.where}: {name or 'this'} is a link or no file; this is no segment") from None
            raise
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is no file; this is no segment")
            yield descriptor, status.st_size
        finally:
            os.close(descriptor)
