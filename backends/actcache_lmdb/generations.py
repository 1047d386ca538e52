"""The generations of a space: one LMDB environment after another, each made whole under another name, then renamed.

``<folder>/lmdb/00000001``, ``00000002``, ...; the greatest is the one that counts. Older ones are left to those who
still read them, and removed later.
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
from typing import Any

import lmdb

from actcache_lmdb.environment import create_databases
from actcache_lmdb.failures import translated
from actcache_lmdb.record import State

_NAME = re.compile(r"[0-9]{8}")
_LEAST_MAP = 1 << 26
_BELOW_STORE = 2  # folders above that of the generations: spaces/<fingerprint>
_FORGOTTEN = 3600.0  # seconds after which what a killed process was building is removed


def name_of(number: int) -> str:
    return f"{number:08d}"


class Generations:
    """The generations below ``<folder>/lmdb``. Thread-safe, and safe beside other processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "lmdb"

    def path(self, number: int) -> Path:
        return self.folder / name_of(number)

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
        """Make a generation under another name, which goes again unless it is published.

        Args:
            map_size: what it fits into, bytes.
        """
        with translated(f"cannot make a generation in {self.folder}"):
            _make_folders(self.folder)
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
        """Remove the generations before the newest, once it is ``grace`` seconds old; return how many, and
        the bytes they took.

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
    """A generation that has no name yet. Not thread-safe.

    Attributes:
        env, databases: to fill it; its transactions are not synced one by one.
    """

    def __init__(self, generations: Generations, folder: Path, map_size: int) -> None:
        self._generations = generations
        self._folder = folder
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
        for path in (self._folder / "data.mdb", self._folder / "made", self._folder):
            _sync(path)
        try:
            os.rename(self._folder, target)
        except OSError:
            if not target.exists():
                raise
            return False
        finally:
            # Also where it stood: who made it may have died before its own sync.
            _sync(parent)
            _sync(parent.parent)
        return True


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it up to the store's own, each name durable before the next.

    Raises:
        FileNotFoundError: the store's folder has gone.
    """
    missing = []
    for path in (folder, *folder.parents[:_BELOW_STORE]):
        if path.is_dir():
            break
        missing.append(path)
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
