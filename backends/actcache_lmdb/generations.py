"""The generations of a space: one LMDB environment after another, each made whole under another name, then renamed.

``<folder>/lmdb/00000001``, ``00000002``, ...; the greatest is the one that counts. Older ones are left to those who
still read them, and removed later. Compaction copies the live entries of one into the next.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from actcache.backend import BytesDone
from actcache.errors import FormatError
from actcache.format.ragged import runs
from actcache.io.files import FileOperations, Files
from actcache_lmdb.environment import Environment, create_databases, pages_of
from actcache_lmdb.failures import translated
from actcache_lmdb.lookup import live, scan
from actcache_lmdb.record import HEADER, Shapes, State, checks, joined
from actcache_lmdb.writing import Writing

if TYPE_CHECKING:
    Txn = lmdb.Transaction[memoryview]

_NAME = re.compile(r"[0-9]{8}")
_LEAST_MAP = 1 << 26
_BELOW_STORE = 2  # folders between that of the generations and the store's: spaces/<fingerprint>
_FORGOTTEN = 3600.0  # seconds after which what a killed process was building is removed
_STEP_BYTES = 64 << 20  # copied in one transaction


class Generations:
    """The generations below ``<folder>/lmdb``. Thread-safe, and safe beside other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "lmdb"

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08d}"

    def numbers(self) -> list[int]:
        """Return the numbers of the generations that are there, ascending."""
        try:
            return sorted(int(name) for name in os.listdir(self.folder) if _NAME.fullmatch(name))
        except FileNotFoundError:
            return []

    def identity(self, number: int) -> tuple[int, int] | None:
        """Return device and inode of a generation's data file, None where it is gone."""
        try:
            status = os.stat(self.path(number) / "data.mdb")
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def newest(self) -> int:
        """Return the number of the one that counts, 0 where there is none."""
        return max(self.numbers(), default=0)

    def create(self) -> None:
        """Make the first, empty one where there is none."""
        if not self.newest():
            with self.building() as build:
                build.publish(1)

    @contextmanager
    def building(self, map_size: int = _LEAST_MAP) -> Iterator[Build]:
        """Make a generation of up to ``map_size`` bytes under another name, which goes again unless it is published."""
        with translated(f"cannot make a generation in {self.folder}"):
            Files(self.folder.parents[_BELOW_STORE]).make_folders(self.folder)
            folder = self.folder / f"tmp-{os.getpid()}-{secrets.token_hex(8)}"
            folder.mkdir()
            try:
                build = Build(self, folder, map_size)
                try:
                    yield build
                finally:
                    build.env.close()
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def remove_old(self, grace: float) -> tuple[int, int]:
        """Remove the generations before the newest, once it is ``grace`` seconds old; return how many, and their bytes.

        Whoever still maps an old one keeps what it maps.
        """
        *old, newest = self.numbers() or [0]
        removed = freed = 0
        with translated(f"cannot remove old generations of {self.folder}"):
            if old and _age(self.path(newest) / "made") >= grace:
                for number in old:
                    # First out of sight, at once; the bytes then go one by one.
                    away = self.folder / f"tmp-{os.getpid()}-{secrets.token_hex(8)}"
                    try:
                        os.rename(self.path(number), away)
                    except FileNotFoundError:
                        continue  # another process was faster
                    freed += (away / "data.mdb").stat().st_size
                    shutil.rmtree(away, ignore_errors=True)
                    removed += 1
            for name in os.listdir(self.folder) if self.folder.is_dir() else []:
                if name.startswith("tmp-") and _age(self.folder / name) > _FORGOTTEN:
                    shutil.rmtree(self.folder / name, ignore_errors=True)
        return removed, freed


class Build:
    """A generation that has no name yet; transactions that fill it are not synced one by one. Not thread-safe."""

    def __init__(self, generations: Generations, folder: Path, map_size: int) -> None:
        self._generations, self._folder = generations, folder
        (folder / "made").touch()  # when: its age decides when older generations go
        # LMDB 0.9's format, which every release reads
        options: dict[str, Any] = {"lib_version": 0} if int(lmdb.__version__.split(".")[0]) >= 3 else {}
        options |= {"create": False, "sync": False, "lock": False}
        self.env = lmdb.open(os.fsencode(folder), map_size=map_size, max_dbs=8, **options)
        self.databases = create_databases(self.env)
        with self.env.begin(write=True) as txn:
            txn.put(State.KEY, State(created=int(time.time() * 1e6)).pack(), db=self.databases["state"])

    def publish(self, number: int) -> bool:
        """Give it its name, durably; return False where another stands there already. It is closed afterwards."""
        parent, target = self._generations.folder, self._generations.path(number)
        self.env.sync(True)
        self.env.close()
        disk = FileOperations()
        for path in (self._folder / "data.mdb", self._folder / "made"):
            disk.sync_file(path)
        disk.sync_folder(self._folder)
        try:
            os.rename(self._folder, target)
        except OSError:
            if not target.exists():
                raise
            return False
        finally:
            # Also where it stood: who made it may have died before its own sync.
            disk.sync_folder(parent)
            disk.sync_folder(parent.parent)
        return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


class Filling:
    """Fills a build from an environment with what is live, in the order of the entries' numbers. Not thread-safe.

    Nearly all of it is copied while others write: an entry never changes. Under the write lock, what was added or
    replaced meanwhile is made up for, and the new generation gets its name.
    """

    def __init__(self, environment: Environment, build: Build, shapes: Shapes) -> None:
        self._environment, self._build, self._shapes = environment, build, shapes

    def copy(self, progress: BytesDone = lambda done, total: None) -> None:
        """Copy what is live, in short transactions; what goes meanwhile is passed over."""
        with self._environment.reading() as txn:
            records = self._live(txn)
        done, total = 0, self._shapes.count(records)[1]
        for step in self._steps(records):
            with self._environment.reading() as txn:
                self._copy(txn, step, needed=False)
            done += self._shapes.count(step)[1]
            progress(done, total)
        self._build.env.sync(True)

    def finish(self, txn: Txn) -> None:
        """Make up for what changed since; ``txn`` holds the write lock. ``FormatError``: a live entry has no value."""
        databases, env = self._build.databases, self._build.env
        with env.begin(buffers=True) as copied:
            done = joined(scan(copied, databases["heads"]))
        records = self._live(txn)
        stale = done[~np.isin(done["head"]["id"], records["head"]["id"])]
        with env.begin(write=True, buffers=True) as target:
            for record in stale:
                target.delete(record["key"].tobytes(), db=databases["heads"])
                target.delete(int(record["head"]["id"]).to_bytes(8, "big"), db=databases["entries"])
        for step in self._steps(records[~np.isin(records["head"]["id"], done["head"]["id"])]):
            self._copy(txn, step, needed=True)
        state = self._environment.state(txn)
        with env.begin(write=True, buffers=True) as target:
            writing = Writing(target, databases, self._shapes, self._environment.folder)
            # Older snapshots keep to the old generation, so nothing of theirs is needed here.
            fresh = {"created": writing.state().created, "horizon": state.sequence}
            counted = state.changed(entries=0, tokens=0, nbytes=0, **fresh)
            writing.put_state(counted.added(len(records), *writing.count(records)))

    def _live(self, txn: Txn) -> NDArray[np.void]:
        """Return the records of all live entries in the order of their numbers."""
        records = joined(map(live, scan(txn, self._environment.dbs["heads"])))
        return records[np.argsort(records["head"]["id"], kind="stable")]

    def _steps(self, records: NDArray[np.void]) -> list[NDArray[np.void]]:
        row_bytes = max(self._shapes.row_bytes.values())
        nbytes = records["head"]["tokens"].astype(np.int64) * row_bytes + self._environment.page_size
        return [records[run] for run in runs(nbytes, _STEP_BYTES)]

    def _copy(self, txn: Txn, records: NDArray[np.void], *, needed: bool) -> None:
        source, databases = self._environment.dbs["entries"], self._build.databases
        with self._build.env.begin(write=True, buffers=True) as target:
            items, there = [], np.zeros(len(records), bool)
            for i, entry in enumerate(records["head"]["id"].tolist()):
                name = entry.to_bytes(8, "big")
                value = txn.get(name, db=source)
                if value is not None and len(value) >= HEADER.itemsize:
                    items.append((name, value))
                    there[i] = True
                elif needed:
                    where = self._environment.data
                    raise FormatError(f"{where}: entry {entry} is missing; delete it, then compact")
            copied = records[there]
            with target.cursor(databases["entries"]) as cursor:
                cursor.putmulti(items)
                copied["head"]["page"] = pages_of(cursor.get(name) for name, _ in items)
            copied["head"]["check"] = checks(copied)
            Writing(target, databases, self._shapes, self._environment.folder).put_heads(copied)
