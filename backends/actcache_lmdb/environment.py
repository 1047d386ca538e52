"""One open LMDB environment: its transactions, its map, and what a map that grows asks for.

Every transaction of the backend begins here, and shares a lock while it lives.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.errors import ClosedError, FormatError, ReadOnlyError, StorageIOError, StoreError
from actcache.io.files import failure, flowing
from actcache_lmdb.datafile import read_meta
from actcache_lmdb.failures import is_full, translated
from actcache_lmdb.readers_writer_lock import ReadersWriterLock
from actcache_lmdb.record import PAGE_HEADER, State

T = TypeVar("T")

DATABASES = ("state", "heads", "entries", "retired")
_MAP_SIZE = 64 << 30  # of addresses, not of memory; it grows by itself
_LEAST_MAP = 1 << 20
_READERS = 2048
_FLOWING_BYTES = 16 << 20  # of a transaction, from which on a thread that watches over its commit is worth it

MAP_LOCK = ReadersWriterLock()


class Environment:
    """One environment, shared by all of this process that use its file. Thread-safe. ``shared_environments`` makes it.

    Raises ``ClosedError`` where it is closed, or the process was forked since, and what ``failures`` makes.
    """

    def __init__(self, folder: Path, map_size: int | None, *, writable: bool) -> None:
        self.folder = folder
        self.data = folder / "data.mdb"
        self.wanted = writable
        self._map_size = map_size
        self._writing = threading.Lock()
        self._base = 0  # address of the map, 0 where it is not known yet
        self._view = 0, np.empty(0, np.uint8)  # the address and the bytes that were asked for last
        self._lmdb: lmdb.Environment | None = None
        self.file = -1  # a descriptor of ``data``, for hints about its bytes
        self._open()

    def _open(self) -> None:
        size = self._map_size or _MAP_SIZE
        modes = _modes(self.folder, self.wanted)
        self.writable, self.locked = not modes["readonly"], modes["lock"]
        while True:
            meta = read_meta(self.data)
            size = max(size, meta.nbytes)
            try:
                self._open_with(size, modes)
                break
            except lmdb.MapResizedError:  # another process writes meanwhile
                size = 2 * size
            except lmdb.MemoryError:  # the address space is limited
                if size <= max(meta.nbytes, _LEAST_MAP):
                    raise
                size = max(size // 4, _LEAST_MAP)
        self.page_size = meta.page_size

    def _open_with(self, size: int, modes: Mapping[str, bool]) -> None:
        try:
            self._lmdb = lmdb.open(
                os.fsencode(self.folder),  # a name need not be UTF-8
                map_size=size,
                max_dbs=len(DATABASES),
                max_readers=_READERS,
                create=False,
                sync=True,
                metasync=True,
                **modes,
            )
            self._clear_dead_readers()
            self.dbs = {name: self._lmdb.open_db(name.encode(), create=False, **_FLAGS[name]) for name in DATABASES}
            self.file = os.open(self.data, os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> tuple[int, int] | None:
        """Device and inode of the open ``data.mdb``, None where it is closed."""
        if self.file < 0:
            return None
        status = os.fstat(self.file)
        return status.st_dev, status.st_ino

    def upgrade(self) -> None:
        """Open again, for writing too; the caller holds ``MAP_LOCK`` alone.

        Who only reads does not open for writing: LMDB's library then waits for the write lock to find its databases,
        and a writer that was stopped in the middle would stop every reader.
        """
        self.wanted = True
        self.close()
        self._open()

    def abandon(self) -> None:
        """Forget everything, in a fork's child; nothing is closed."""
        self._lmdb, self.file, self._base = None, -1, 0

    def close(self) -> None:
        """Unmap; nobody may be using it."""
        env, self._lmdb, self._base = self._lmdb, None, 0
        descriptor, self.file = self.file, -1
        if descriptor >= 0:
            os.close(descriptor)
        if env is not None:
            env.close()

    def check_size(self) -> int:
        """Return the size of the data file. Raises ``FormatError`` where touching the map would kill the process."""
        env = self._lmdb
        if env is None:
            raise ClosedError(f"{self.folder} was closed, or opened before a fork; open the store again")
        size = os.fstat(self.file).st_size
        if size >= 2 * self.page_size:  # the meta pages at least
            needed = (env.info()["last_pgno"] + 1) * self.page_size
            if size < needed:  # another process may have written in between
                size = os.fstat(self.file).st_size
        else:
            needed = 2 * self.page_size
        if size < needed:
            raise FormatError(f"{self.data} was truncated to {size} bytes")
        return size

    # --- transactions ------------------------------------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[lmdb.Transaction[memoryview]]:
        """A short read transaction; its buffers, and ``memory``, mean nothing afterwards."""
        MAP_LOCK.acquire_shared()
        try:
            with translated(f"cannot read {self.data}"):
                while True:
                    self.check_size()
                    try:
                        txn = self._begin(write=False)
                        break
                    except lmdb.MapResizedError:
                        MAP_LOCK.release_shared()
                        try:
                            self._adopt()  # which needs the lock alone
                        finally:
                            MAP_LOCK.acquire_shared()
                    except lmdb.ReadersFullError:
                        if self._lmdb is None or not self._lmdb.reader_check():
                            raise
                try:
                    yield txn
                finally:
                    txn.abort()
        finally:
            MAP_LOCK.release_shared()

    def write(self, work: Callable[[lmdb.Transaction[memoryview]], T], nbytes: int = 0) -> T:
        """Run ``work`` in a write transaction and commit it durably; again from its start where the map had to grow.

        ``nbytes``: about what it writes, where that is much.
        After any exception, also of ``work``, nothing of it is visible, and nothing else was lost.
        """
        if not self.writable:
            raise ReadOnlyError(f"{self.data} cannot be written; check its permissions, or read only with mode='r'")
        what = f"cannot write {self.data}"
        while True:
            with self._writing:
                try:
                    with translated(what), self._inside():
                        self.check_size()
                        self._clear_dead_readers()
                        txn = self._begin(write=True)
                        try:
                            result = work(txn)
                            with flowing(self.file) if nbytes >= _FLOWING_BYTES else nullcontext():
                                txn.commit()
                        except BaseException:
                            txn.abort()
                            raise
                        return result
                except _Again as again:
                    again.mend()
                except StoreError as error:
                    if isinstance(error, StorageIOError) and is_full(self.folder):
                        # LMDB reports a write that was cut short, as the last one on a full disk is, as an I/O error.
                        raise failure(what, errno.ENOSPC, "") from error
                    if isinstance(error.__cause__, lmdb.PanicError):
                        with MAP_LOCK.exclusive(), translated(what):
                            self.close()
                            self._open()
                    raise

    def _clear_dead_readers(self) -> None:
        """Free what readers that were killed hold: the file would grow for ever."""
        if self.locked and self._lmdb is not None:
            self._lmdb.reader_check()

    def _begin(self, *, write: bool) -> lmdb.Transaction[memoryview]:
        if self._lmdb is None:
            raise ClosedError(f"{self.folder} was closed, or opened before a fork; open the store again")
        return self._lmdb.begin(write=write, buffers=True)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        MAP_LOCK.acquire_shared()
        try:
            yield
        except (lmdb.MapFullError, lmdb.MapResizedError) as error:
            raise _Again(self._grow if isinstance(error, lmdb.MapFullError) else self._adopt) from None
        finally:
            MAP_LOCK.release_shared()

    def _grow(self) -> None:
        self._resize(lambda env: max(2 * env.info()["map_size"], _LEAST_MAP))

    def _adopt(self) -> None:
        """Make room for what another process has written."""
        # Not to what the file says: its maker may have had more address space than this process.
        self._resize(lambda env: max(env.info()["map_size"], 2 * read_meta(self.data).nbytes))

    def _resize(self, size: Callable[[lmdb.Environment], int]) -> None:
        with MAP_LOCK.exclusive(), translated(f"cannot grow the map of {self.data}"):
            if self._lmdb is None:
                return
            self._base = 0
            try:
                self._lmdb.set_mapsize(size(self._lmdb))
            except lmdb.Error:  # too little address space, and now it has no map at all
                self.close()
                self._open()
                raise

    # --- the map -----------------------------------------------------------------------------------------------------

    def memory(self, txn: lmdb.Transaction[memoryview], entry: int, size: int) -> NDArray[np.uint8]:
        """Return the first ``size`` bytes of the file as LMDB maps them, read-only, valid inside of the transaction.

        ``size`` is at most what ``check_size`` returned in it. Raises ``FormatError`` where there is no such entry.
        """
        if not self._base:
            self._base = self._find_base(txn, entry)
        return self.mapped(size)

    @property
    def base(self) -> int:
        """The address of the map in a transaction; 0 where ``memory`` was not asked for it yet."""
        return self._base

    def mapped(self, size: int) -> NDArray[np.uint8]:
        """Return what ``memory`` does, where ``base`` is known."""
        base, view = self._view
        if base != self._base or len(view) != size:  # a view costs more than a look at a page
            mapped = memoryview((ctypes.c_char * size).from_address(self._base)).cast("B")
            view = np.frombuffer(mapped.toreadonly(), np.uint8)
            self._view = self._base, view
        return view

    def state(self, txn: lmdb.Transaction[memoryview]) -> State:
        """Return the record of the space's state. Raises ``FormatError``, ``FormatVersionError``."""
        return State.unpack(txn.get(State.KEY, db=self.dbs["state"]), self.data)

    def find_page(self, txn: lmdb.Transaction[memoryview], entry: int) -> int:
        """Return the number of an entry's first page as the B-tree has it, after ``memory``. Raises as that does."""
        return (address(self._value(txn, entry)) - PAGE_HEADER - self._base) // self.page_size

    def _find_base(self, txn: lmdb.Transaction[memoryview], entry: int) -> int:
        """Return where the map begins: two pages say their numbers, and have to agree, since they may be damaged."""
        value = self._value(txn, entry)
        base = address(value) - PAGE_HEADER - page_of(value) * self.page_size
        state = txn.get(State.KEY, db=self.dbs["state"])
        if state is not None:
            page = address(state) // self.page_size * self.page_size  # of the B-tree, with the record inside
            if base == page - int.from_bytes(ctypes.string_at(page, 8), "little") * self.page_size:
                return base
        raise FormatError(f"{self.data}: the page of entry {entry} is damaged")

    def _value(self, txn: lmdb.Transaction[memoryview], entry: int) -> memoryview:
        value = txn.get(entry.to_bytes(8, "big"), db=self.dbs["entries"])
        if value is None or len(value) < self.page_size // 2:
            raise FormatError(f"{self.data}: entry {entry} is not there, though a head names it")
        return value


class _Again(Exception):
    """The map has to be mended before a transaction can be tried again."""

    def __init__(self, mend: Callable[[], None]) -> None:
        self.mend = mend


_FLAGS: dict[str, dict[str, Any]] = {name: {} for name in DATABASES}
_FLAGS["heads"] = {"dupsort": True, "dupfixed": True}


def create_databases(env: lmdb.Environment) -> dict[str, Any]:
    """Make the named databases of a new environment."""
    return {name: env.open_db(name.encode(), **_FLAGS[name]) for name in DATABASES}


def address(value: memoryview) -> int:
    return int(np.frombuffer(value, np.uint8).__array_interface__["data"][0])


def page_of(value: memoryview) -> int:
    """Return the page number of a value that has pages of its own, written or about to be: they begin with it."""
    return int.from_bytes(ctypes.string_at(address(value) - PAGE_HEADER, 8), "little")


def pages_of(values: Iterable[memoryview | None]) -> list[int]:
    """Return ``page_of`` of many values."""
    addresses = [np.frombuffer(value or b"", np.uint8, 1).__array_interface__["data"][0] for value in values]
    read = ctypes.c_uint64.from_address
    return [read(address - PAGE_HEADER).value for address in addresses]


def _modes(folder: Path, writable: bool) -> dict[str, bool]:
    """Return LMDB's ``readonly`` and ``lock`` for what is wanted and what the file system allows."""
    lock = folder / "lock.mdb"
    unwritable_media = bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
    locked = not unwritable_media and (os.access(lock, os.W_OK) if lock.exists() else os.access(folder, os.W_OK))
    return {"readonly": not (writable and locked and os.access(folder / "data.mdb", os.W_OK)), "lock": locked}
