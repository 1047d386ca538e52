"""One space in LMDB: writes, snapshots, and the change over to a new generation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import GRACE_SECONDS, Block, BytesDone, Columns, Compaction, Snapshot, SpaceDriver
from actcache.errors import ClosedError, FormatError, ReadOnlyError, StorageIOError
from actcache_lmdb import datafile
from actcache_lmdb.environment import Environment
from actcache_lmdb.failures import translated
from actcache_lmdb.generations import Filling, Generations
from actcache_lmdb.record import Shapes
from actcache_lmdb.shared_environments import acquire, release, retain
from actcache_lmdb.snapshot import EmptySnapshot, LMDBSnapshot
from actcache_lmdb.writing import BlockRecords, Writing

T = TypeVar("T")

_TRIES = 20  # to open a generation that others replace meanwhile

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]
    Work = Callable[[Writing], T]


class _Retired(Exception):
    """The generation that a transaction belongs to is no longer the newest."""


class LMDBSpace(SpaceDriver):
    """One space of LMDB. Thread-safe throughout; safe beside other processes.

    Args:
        grace: seconds that what was superseded stays for older snapshots, and an old generation for its readers.
        map_size: bytes of addresses to start with, None for plenty; it grows by itself.
        examine: have another process look at the structure of the data file before it is mapped; ``FormatError`` where
            it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        columns: Columns,
        *,
        writable: bool,
        grace: float,
        map_size: int | None = None,
        examine: bool = False,
    ) -> None:
        self._generations = Generations(folder)
        self._shapes = Shapes(columns)
        self._writable, self._grace, self._map_size = writable, grace, map_size
        self._lock = threading.Lock()
        self._environment: Environment | None = None
        self._closed = False
        self._damage = ""  # what an examination has found
        if examine and (newest := self._generations.newest()):
            self._examine(self._generations.path(newest))
            if self._damage:
                raise FormatError(self._damage)
        if writable:
            with translated(f"cannot open {folder}"):
                self._generations.remove_old(grace)
        self._current()

    # --- generations -------------------------------------------------------------------------------------------------

    def _current(self, *, make: bool = False) -> tuple[int, Environment | None]:
        """Return the newest generation's number and environment; 0 and None where nobody has made one yet, or somebody
        has deleted the space: what is written then is a new one's, whose first generation this is to ``make``."""
        with self._lock, translated(f"cannot open {self._generations.folder}"):
            if self._closed:
                raise ClosedError(f"{self._generations.folder} is closed; open the space again")
            for _ in range(_TRIES):
                number = self._generations.newest()
                if self._environment is not None and self._is_newest(number, self._environment):
                    return number, self._environment
                environment = None
                if not number and make:
                    self._generations.create()
                    continue
                if number:
                    try:
                        environment = acquire(self._generations.path(number), self._map_size, writable=self._writable)
                    except FileNotFoundError:
                        continue  # it was replaced by yet another one, and removed
                old, self._environment = self._environment, environment
                if old is not None:
                    release(old)  # snapshots of it keep it open
                return number, environment
        raise StorageIOError(f"{self._generations.folder}: generations come and go; was the space removed?")

    def _is_newest(self, number: int, environment: Environment) -> bool:
        """Return whether an environment is the newest generation, of that number: that of a space that was deleted and
        made again may have the same one."""
        return number == self._generations.newest() and self._generations.identity(number) == environment.identity

    def _write(self, work: Work[T], nbytes: int = 0) -> T:
        """Run ``work`` in a write transaction of the newest generation, once, or again where the map had to grow."""
        if not self._writable:
            raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to write")
        while True:
            number, environment = self._current(make=True)
            if environment is None:
                raise StorageIOError(f"{self._generations.folder} is gone; open the store again")
            with suppress(_Retired):
                return environment.write(partial(self._checked, work, number, environment), nbytes)

    def _checked(self, work: Work[T], number: int, environment: Environment, txn: Txn) -> T:
        # Whoever compacts publishes the new generation while it holds the write lock of the old one.
        if not self._is_newest(number, environment):
            raise _Retired
        return work(Writing(txn, environment.dbs, self._shapes, environment.data))

    # --- SpaceDriver -------------------------------------------------------------------------------------------------

    def append(self, block: Block) -> None:
        _, environment = self._current(make=self._writable)
        records = BlockRecords(block, self._shapes, environment.page_size if environment is not None else 4096)

        def work(writing: Writing) -> None:
            writing.remove_retired(self._grace)
            writing.append(records)

        self._write(work, records.nbytes)

    def delete(self, keys: NDArray[np.uint8]) -> int:
        if self._writable and self._current()[1] is None:
            return 0
        return self._write(lambda writing: writing.delete(keys))

    def snapshot(self) -> Snapshot:
        _, environment = self._current()
        if environment is None:
            return EmptySnapshot()
        if self._damage:
            raise FormatError(self._damage)
        with environment.reading() as txn:
            state = environment.state(txn)
        return LMDBSnapshot(environment, state, self._shapes)

    def examine(self) -> dict[str, str]:
        """Look at the structure of the data file, in another process; after damage was found, nothing maps it here."""
        number, environment = self._current()
        return {} if environment is None else self._examine(self._generations.path(number))

    def _examine(self, path: Path) -> dict[str, str]:
        wrong = datafile.examine(path)
        if wrong is not None:
            self._damage = f"{path} is damaged inside ({wrong}): restore it from a copy, or remove it and fill again"
        return {} if wrong is None else {path.name: wrong}

    def compact(
        self,
        *,
        target_bytes: int = 0,
        waste: float = 0.0,
        grace: float = GRACE_SECONDS,
        progress: BytesDone = lambda done, total: None,
    ) -> Compaction:
        """Copy the live entries into a new generation, and have everybody move over to it; see ``SpaceDriver``.

        Nobody waits but for the last moment. The old generation is removed by a later call, or opening for writing,
        once the grace period is over. A crash leaves the old one or the new one, whole. ``target_bytes`` means nothing
        here: a generation is one file.
        """
        number, environment = self._current()
        if not self._writable:
            raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to compact")
        if environment is None:
            return Compaction()
        retain(environment)
        try:
            published = self._wasted(environment) >= waste and self._rewrite(number, environment, progress)
        finally:
            release(environment)
        self._current()
        with translated(f"cannot remove old generations of {self._generations.folder}"):
            removed, freed = self._generations.remove_old(grace)
        return Compaction(int(published), int(published), removed, freed)

    def _wasted(self, environment: Environment) -> float:
        """Return the share of the file that a new generation would not have."""
        page_size = environment.page_size
        with environment.reading() as txn:
            size = environment.check_size()
            state = environment.state(txn)
            heads = txn.stat(environment.dbs["heads"])
        # About: an entry's last page is half empty.
        live = state.nbytes + state.entries * page_size * 3 // 4
        return 1 - min(1.0, (live + (heads["leaf_pages"] + heads["branch_pages"] + 8) * page_size) / size)

    def _rewrite(self, number: int, environment: Environment, progress: BytesDone) -> bool:
        size = environment.check_size()
        with self._generations.building(map_size=3 * size + (256 << 20)) as build:
            compacting = Filling(environment, build, self._shapes)
            compacting.copy(progress)

            def finish(txn: Txn) -> bool:
                # Writers look for newer generations once they have the write lock, which is held here.
                if not self._is_newest(number, environment):
                    return False
                compacting.finish(txn)
                return build.publish(number + 1)

            return environment.write(finish)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            environment, self._environment = self._environment, None
        if environment is not None:
            release(environment)
