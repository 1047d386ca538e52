"""The one seam through which every local file of a store is published, replaced or removed.

A name appears in a store only after all bytes behind it are on the medium: write to a temporary file, sync it, rename
it, sync the folder. ``FileOperations`` holds the steps, so that a test can put a file system under them that forgets
whatever was not synced.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from actcache.errors import OutOfSpaceError, ReadOnlyError, StorageIOError, StoreError

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}


# What is written at a time, to its multiples in the file: so the page cache has it in huge pages, two of them, and a
# mapping of the file, too. In small pages a processor spends a third of a scattered read on looking for them.
_WRITE_BYTES = 4 << 20
_SYNCS = 16  # at a time
_BEGIN_SECONDS = 0.003
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def write_flowing(descriptor: int, pieces: Iterable[memoryview]) -> None:
    """Write pieces of bytes, one after another, at the place of a file where its descriptor stands.

    Where the operating system can be asked to, the disk takes them while others are copied, so that a sync waits for
    the last of them and not for all. Durable they are when the file has been synced. Raises ``OSError``.
    """
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    for data in _blocks(pieces, place):
        begun = place
        while data:
            written = os.write(descriptor, data)
            data, place = data[written:], place + written
        if _sync_file_range is not None:
            _sync_file_range(descriptor, begun, place - begun, _BEGIN)  # whether it all went well, the sync says


def _blocks(pieces: Iterable[memoryview], place: int) -> Iterator[memoryview]:
    """Yield pieces of bytes, of which the first begins at a place of a file, cut at the multiples of ``_WRITE_BYTES``
    and nowhere else; each is good until the next."""
    kept, room = bytearray(), _WRITE_BYTES - place % _WRITE_BYTES
    for data in pieces:
        while len(data) >= room - len(kept):
            data, block = data[room - len(kept) :], data[: room - len(kept)]
            yield memoryview(kept + block) if kept else block
            kept, room = bytearray(), _WRITE_BYTES
        kept += data
    if kept:
        yield memoryview(kept)


@contextmanager
def flowing(descriptor: int) -> Iterator[None]:
    """Have the disk take, as ``write_flowing`` does, what somebody else writes to a file meanwhile."""
    if _sync_file_range is None:
        yield
        return
    ended = threading.Event()

    def begin() -> None:
        while not ended.wait(_BEGIN_SECONDS):
            _sync_file_range(descriptor, 0, 0, _BEGIN)  # all of the file

    thread = threading.Thread(target=begin, name="actcache-flow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class FileOperations:
    """The primitive steps. Thread-safe. All raise ``OSError`` as the operating system does."""

    def sync_file(self, path: Path) -> None:
        """Force the bytes of a file to the medium."""
        self._sync(path, os.O_RDONLY)

    def sync_files(self, paths: Sequence[Path]) -> None:
        """Force the bytes of several files to the medium, in any order; all are tried, and the first failure raised.

        At once: a disk that is asked to flush for each of them one after another is asked as often as there are files.
        """
        if len(paths) == 1:
            self.sync_file(paths[0])
            return
        with ThreadPoolExecutor(min(len(paths), _SYNCS), thread_name_prefix="actcache-sync") as threads:
            for done in [threads.submit(self.sync_file, path) for path in paths]:
                done.result()

    def sync_folder(self, path: Path) -> None:
        """Force the names in a folder to the medium."""
        self._sync(path, os.O_RDONLY | os.O_DIRECTORY)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; ``FileExistsError`` where the name is taken."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        os.mkdir(path)

    def _sync(self, path: Path, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Files:
    """Publication below one root. Temporary files live in ``root/tmp``, outside every folder that is ever listed.

    Thread-safe, and safe beside other processes: names that must not be replaced are claimed by ``link``.
    """

    def __init__(self, root: Path, disk: FileOperations | None = None) -> None:
        self.root = root
        self.disk = disk or FileOperations()
        self._tmp = root / "tmp"
        self._durable: set[Path] = set()  # folders below the root whose names this object has synced

    def make_root(self) -> None:
        """Make the root and what is missing above it, each name durable before the next.

        Nothing else makes it: a root that is not there any more was moved or removed, and a new one would be no store.
        """
        with translated(f"cannot make the folder {self.root}"):
            missing = itertools.takewhile(lambda folder: not folder.is_dir(), (self.root, *self.root.parents))
            for folder in reversed(list(missing)):
                self._make(folder)

    def make_folders(self, path: Path) -> None:
        """Make a folder below the root and its parents down from there, each name durable before the next.

        What stands, the root too, is synced once: who made it may have died before that. ``StorageIOError``: no root.
        """

        def unsynced(folder: Path) -> bool:
            return folder != self.root and not (folder.is_dir() and folder in self._durable)

        with translated(f"cannot make the folder {path}"):
            if self.root not in self._durable and self.root.is_dir():
                if os.access(self.root.parent, os.R_OK):  # else somebody made it for us where we cannot even look
                    self.disk.sync_folder(self.root.parent)
                self._durable.add(self.root)
            for folder in reversed(list(itertools.takewhile(unsynced, (path, *path.parents)))):
                self._make(folder)

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            try:
                self.disk.make_folder(folder)
            except FileExistsError:
                if not folder.is_dir():
                    raise StorageIOError(f"{folder} is a file where the store needs a folder") from None
        self.disk.sync_folder(folder.parent)
        self._durable.add(folder)

    def publish(self, target: Path, write: Callable[[Path], object], *, replace: bool = False) -> bool:
        """Have ``write(path)`` write a file or folder, then give it its name.

        Returns:
            False where ``target`` stands already and ``replace`` is False; it is left as it is.

        Raises:
            OutOfSpaceError, ReadOnlyError, StorageIOError: the temporary file is gone, and nothing became visible; only
                where the very last sync is what failed, all of it is visible, but may not outlast a power loss.
        """
        self.make_folders(self._tmp)
        self.make_folders(target.parent)
        # After a failed sync the kernel may have dropped the dirty pages: a retry writes a new file.
        temporary = self._new_temporary(target.suffix)
        with translated(f"cannot write {target}"):
            try:
                write(temporary)
                self._sync_tree(temporary)
                if replace:
                    self.disk.rename(temporary, target)
                else:
                    claim(self.disk, temporary, target)
                published = True
            except FileExistsError:
                published = False
            finally:
                _discard(temporary)
            # Also where the name stood: the process that gave it may have died before its own sync.
            self.disk.sync_folder(target.parent)
        return published

    def publish_bytes(self, target: Path, data: bytes, *, replace: bool) -> bool:
        """Publish a small file."""
        return self.publish(target, lambda path: path.write_bytes(data), replace=replace)

    def remove(self, path: Path) -> bool:
        """Remove a file or folder, durably and at once; return whether it was there."""
        if path.is_dir() and not path.is_symlink():
            # A folder loses its name first: half of one would be damage.
            doomed = self._new_temporary("")
            if not self.move(path, doomed):
                return False
            _discard(doomed)
            return True
        with translated(f"cannot remove {path}"):
            try:
                self.disk.unlink(path)
            except FileNotFoundError:
                return False
            self.disk.sync_folder(path.parent)
        return True

    def move(self, path: Path, target: Path) -> bool:
        """Give a file or folder another name below the root, durably; return whether it was there."""
        self.make_folders(target.parent)
        with translated(f"cannot move {path}"):
            try:
                self.disk.rename(path, target)
            except FileNotFoundError:
                return False
            self.disk.sync_folder(target.parent)  # the new name before the old one is gone for good
            self.disk.sync_folder(path.parent)
        return True

    def now(self) -> float:
        """Return the time in seconds by the clock that stamps the files here, which a network's server may keep."""
        try:
            with tempfile.TemporaryFile(dir=self._tmp) as probe:  # without a name, which a signal could leave behind
                return os.fstat(probe.fileno()).st_mtime
        except OSError:  # read-only, or there is no store yet
            return time.time()

    def sweep(self, older_than: float) -> int:
        """Remove temporary files that nobody has touched for so many seconds; return how many."""
        swept = 0
        with translated(f"cannot list {self._tmp}"):
            try:
                found = list(os.scandir(self._tmp))
            except FileNotFoundError:
                return 0
            oldest = self.now() - older_than
            for entry in found:
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if max(status.st_mtime, status.st_ctime) <= oldest:
                        _discard(Path(entry.path))
                        swept += 1
        return swept

    def _new_temporary(self, suffix: str) -> Path:
        return self._tmp / f"{os.getpid()}-{secrets.token_hex(8)}{suffix}"

    def _sync_tree(self, path: Path) -> None:
        if path.is_dir():
            tree = list(os.walk(path, topdown=False, onerror=_raise))
            self.disk.sync_files([Path(folder, name) for folder, _, names in tree for name in names])
            for folder, _, _ in tree:
                self.disk.sync_folder(Path(folder))
        else:
            self.disk.sync_file(path)


def claim(disk: FileOperations, temporary: Path, target: Path) -> None:
    """Name a file unless the name is taken (``FileExistsError``)."""
    try:
        disk.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # File systems without hard links: two processes that race here write equal bytes.
        if target.exists():
            raise FileExistsError(target) from None
        disk.rename(temporary, target)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn an ``OSError`` into the exception that says what to do; ``FileExistsError`` is the caller's own business."""
    try:
        yield
    except (StoreError, FileExistsError):
        raise
    except OSError as error:
        code = error.errno or 0
        raise failure(what, code, os.strerror(code) if code in _DENIED else str(error)) from error


def failure(what: str, code: int, said: str) -> StoreError:
    """Return the exception for a failure of the operating system, ``code`` being its ``errno``."""
    if code in NO_SPACE:
        return OutOfSpaceError(f"{what}: the disk or quota is full; free some space and flush again")
    if code in _DENIED:
        return ReadOnlyError(f"{what}: {said}; check the permissions, or read only with mode='r'")
    return StorageIOError(f"{what}: {said}")


def _raise(error: OSError) -> None:
    raise error


def _discard(path: Path) -> None:
    """Remove a temporary file or folder; a leftover is harmless, so nothing is raised over it."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


#: File systems whose files can change size or vanish under a mapping, which is a SIGBUS: their rows are read instead.
_REMOTE = (
    *("nfs", "cifs", "smb", "fuse", "ceph", "lustre", "9p", "afs"),
    *("gfs", "gpfs", "beegfs", "virtiofs", "glusterfs"),
)


def is_local(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Return whether ``path`` lies on a local file system; True where the operating system does not tell."""
    return not mount_of(path, mounts)[1].startswith(_REMOTE)


def mount_of(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> tuple[str, str]:
    """Return mount point and kind of the file system of a path; empty where the operating system does not tell."""
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        return "", ""
    best, kind = "", ""
    resolved = f"{path.resolve()}/"
    for line in lines:
        before, _, after = line.partition(b" - ")
        # blanks in mount points are octal escapes
        point = os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), before.split()[4]))
        if resolved.startswith(f"{point.rstrip('/')}/") and len(point) >= len(best):
            best, kind = point, after.split()[0].decode()
    return best, kind
