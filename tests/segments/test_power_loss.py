"""Power loss at every step of publishing: what was acknowledged is there, and the store opens.

The disk below keeps, beside the real files, what would outlast a power loss: a file's bytes as of its last sync, a
folder's names as of its last sync. Two kinds of loss are tried at every step: one that drops all names that were not
synced, and one that keeps all names but loses the bytes behind them that were not synced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import SpaceNotFoundError, StoreNotFoundError
from actcache.io import files as seam
from actcache.io.files import FileOperations
from tests.support import check, compact, key, put, recipe, rows
from tests.support.backends import KINDS, each

pytestmark = pytest.mark.processes


class Killed(BaseException):
    """The process ends here; nothing catches this."""


class JournalingDisk(FileOperations):
    def __init__(self):
        self.bytes = {}  # inode -> content at its last sync
        self.names = {}  # inode of a folder -> {name: inode} at its last sync
        self.kinds = {}  # inode -> whether it is a folder
        self.held = {}  # inode -> descriptor, so that nothing else gets the number of what was removed
        self.watching = True
        self.after = lambda: None  # called after each step
        self.steps = 0
        self.kill_at = -1

    @contextlib.contextmanager
    def looking_away(self):
        """While survivors are examined, by code that goes through this disk as well."""
        self.watching = False
        try:
            yield
        finally:
            self.watching = True

    def _step(self):
        if not self.watching:
            return
        self.steps += 1
        if self.steps == self.kill_at:
            raise Killed
        self.after()

    def sync_file(self, path):
        super().sync_file(path)
        if self.watching:
            self._hold(path)
            self.bytes[path.stat().st_ino] = path.read_bytes()
        self._step()

    def sync_files(self, paths):
        """One after another, so that there is a moment after each: that any others are synced first changes nothing,
        for the name comes after all of them."""
        for path in paths:
            self.sync_file(path)

    def sync_folder(self, path):
        super().sync_folder(path)
        if self.watching:
            self._hold(path)
            self.names[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
            self.kinds.update({entry.inode(): entry.is_dir() for entry in os.scandir(path)})
        self._step()

    def _hold(self, path):
        inode = path.stat().st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)

    def rename(self, source, target):
        super().rename(source, target)
        self._step()

    def link(self, source, target):
        super().link(source, target)
        self._step()

    def unlink(self, path):
        super().unlink(path)
        self._step()

    def make_folder(self, path):
        super().make_folder(path)
        self._step()

    def lose_names(self, inode, copy):
        """Write what survives of a folder whose own name survived, to ``copy``."""
        copy.mkdir()
        for name, child in self.names.get(inode, {}).items():
            if self.kinds[child]:
                self.lose_names(child, copy / name)
            else:
                (copy / name).write_bytes(self.bytes.get(child, b""))

    def lose_bytes(self, folder, copy):
        copy.mkdir()
        for entry in os.scandir(folder):
            if entry.is_dir():
                self.lose_bytes(entry.path, copy / entry.name)
            else:
                size = entry.stat().st_size
                (copy / entry.name).write_bytes(self.bytes.get(entry.inode(), bytes(size)))


@pytest.fixture
def tmp_path():
    """A folder in memory: what syncing means is the journaling disk's business, and the real one takes its time."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


@pytest.fixture
def disk(monkeypatch):
    disk = JournalingDisk()
    monkeypatch.setattr(seam, "FileOperations", lambda: disk)
    yield disk
    for descriptor in disk.held.values():
        os.close(descriptor)


class World:
    """A folder on the journaling disk, with what was acknowledged."""

    def __init__(self, disk, tmp_path, kind=KINDS["hdf5"]):
        self.disk, self.tmp, self.kind = disk, tmp_path, kind
        self.place = tmp_path / "disk"  # stands for what was there for long
        self.place.mkdir()
        disk.names[self.place.stat().st_ino] = {}
        self.acknowledged = {}
        self.pending = {}  # what may or may not be there
        self.either = {}  # number -> versions of which one is there
        self.gone = set()  # numbers whose deletion was acknowledged
        self.losses = 0

    def open(self):
        return actcache.open(self.kind.url(self.place / "store"))

    def lose_power(self):
        """Check both kinds of survivors."""
        with self.disk.looking_away():
            for kind in ("names", "bytes"):
                copy = self.tmp / "survivor"
                if kind == "names":
                    self.disk.lose_names(self.place.stat().st_ino, copy)
                else:
                    self.disk.lose_bytes(self.place, copy)
                self.examine(copy / "store", kind)
                shutil.rmtree(copy)
                self.losses += 1

    def examine(self, root, kind):
        try:
            store = actcache.open(self.kind.url(root), "r")
        except StoreNotFoundError:
            assert not self.acknowledged, kind
            actcache.open(self.kind.url(root)).close()  # and it can be made again
            return
        with store:
            try:
                space = store.space(recipe())
            except SpaceNotFoundError:
                assert not self.acknowledged, kind
                return
            assert space.damaged() == {}, kind
            present = {n for n in self.pending if n not in self.acknowledged and key(n) in space}
            held = {**{n: self.pending[n] for n in present}, **self.acknowledged}
            for n, versions in self.either.items():
                activations = space.get([key(n)])[0].activations
                (held[n],) = (v for v in versions if np.array_equal(activations, rows(n, v)))
            check(space, held, [*held, *self.gone])
            assert len(space) == len(held)


@each(segmented=True)
def test_every_step_of_a_life(kind, disk, tmp_path):
    """Create, put, flush, overwrite, delete, compact, index, collections: power is lost after each step of each."""
    a_life(kind, disk, tmp_path, {"hdf5": 4, "safetensors": 6, "zarr": 20}[kind.name])


@pytest.mark.long
@pytest.mark.timeout(1200)
@each(segmented=True)
def test_each_single_step_of_a_life(kind, disk, tmp_path):
    a_life(kind, disk, tmp_path, 1)


def a_life(kind, disk, tmp_path, stride):
    world = World(disk, tmp_path, kind)
    disk.after = lambda: world.lose_power() if disk.steps % stride == 0 else None

    def overwrite(space, number, version):
        before = world.acknowledged.pop(number)
        world.either = {number: {before, version}}
        put(space, [number], version=version, overwrite=True)
        space.flush()
        world.acknowledged[number], world.either = version, {}
        world.lose_power()

    def delete(space, number):
        # While a deletion is under way, the entry may be there or not.
        world.pending = {number: world.acknowledged.pop(number)}
        assert space.delete([key(number)]) == 1
        world.gone.add(number)
        world.pending = {}
        world.lose_power()

    with world.open() as store, store.space(recipe()) as space:
        for first in (0, 5):
            world.pending = dict.fromkeys(range(first, first + 5), 0)
            put(space, range(first, first + 5))
            space.flush()
            world.acknowledged.update(world.pending)
            world.pending = {}
            world.lose_power()
        overwrite(space, 4, 1)
        delete(space, 3)
        for grace in (600.0, 0.0, 0.0):
            compact(space, grace=grace)
            world.lose_power()
            delete(space, 5 + int(grace == 0) + len(world.gone))
            overwrite(space, 2, 1 + len(world.gone))
        store.put_collection("train", [key(4)])
        assert store.delete_collection("train")
    world.lose_power()  # closing wrote an index
    names = os.listdir(world.place / "store/spaces" / recipe().fingerprint / "index")
    assert len(names) == 1
    assert world.losses * stride > 150


def heirs_of_compactors(kind, disk, tmp_path, stride):
    """A process dies at any step of a compaction; the next one goes on and acknowledges. Return the number of steps."""
    for kill_at in range(1, 1000, stride):
        disk.kill_at = -1
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        world = World(disk, folder, kind)
        with world.open() as store, store.space(recipe()) as space:
            for first in (0, 3):
                put(space, range(first, first + 3))
                space.flush()
            space.delete([key(1)])
            world.acknowledged, world.gone = {0: 0, 2: 0, 3: 0, 4: 0, 5: 0}, {1}
            disk.steps, disk.kill_at = 0, kill_at
            try:
                compact(space)
                steps = None
            except Killed:
                steps = disk.steps
            disk.kill_at = -1
            space._writer.abandon()
        world.lose_power()
        with world.open() as heir, heir.space(recipe()) as space:
            put(space, [*world.acknowledged, 7])
            space.flush()
            world.acknowledged[7] = 0
            world.lose_power()
            space.delete([key(4)])
            del world.acknowledged[4]
            world.gone.add(4)
            world.lose_power()
            compact(space)
            world.lose_power()
        shutil.rmtree(folder)
        if steps is None:
            return kill_at
    raise AssertionError("compaction takes too many steps")


@each(segmented=True)
def test_the_heir_of_a_killed_compactor(kind, disk, tmp_path):
    assert heirs_of_compactors(kind, disk, tmp_path, 17 if kind.name == "zarr" else 4) > 10


@pytest.mark.long
@pytest.mark.timeout(1200)
@each(segmented=True)
def test_the_heir_of_a_compactor_that_was_killed_at_every_step(kind, disk, tmp_path):
    print(kind.name, heirs_of_compactors(kind, disk, tmp_path, 1))


def test_blobs_and_collections_survive_whole(disk, tmp_path):
    world = World(disk, tmp_path)
    with world.open() as store, store.space(recipe()) as space:
        put(space, [1])
        space.flush()
        store.put_collection("c", [key(1)])
        space.put_blob("b", b"one", replace=True)
        seen = []

        def examine():
            inode, copy = world.place.stat().st_ino, tmp_path / "copy"
            with disk.looking_away():
                for lose in (lambda: disk.lose_names(inode, copy), lambda: disk.lose_bytes(world.place, copy)):
                    lose()
                    with actcache.open(copy / "store", "r") as other, other.space(recipe()) as there:
                        seen.append((there.blob("b"), len(other.collection("c"))))
                    shutil.rmtree(copy)

        disk.after = examine
        store.put_collection("c", [key(1), key(2)])
        assert set(seen) == {(b"one", 1), (b"one", 2)}
        assert seen[-2:] == [(b"one", 2)] * 2
        seen.clear()
        space.put_blob("b", b"two", replace=True)
        assert set(seen) == {(b"one", 2), (b"two", 2)}
        assert seen[-2:] == [(b"two", 2)] * 2


@each(segmented=True)
def test_the_heir_of_a_killed_process_owes_it_nothing(kind, disk, tmp_path):
    heirs_of_processes(kind, disk, tmp_path, {"hdf5": 5, "safetensors": 7, "zarr": 11}[kind.name])


@pytest.mark.long
@pytest.mark.timeout(1200)
@each(segmented=True)
def test_the_heir_of_a_process_that_was_killed_at_every_step(kind, disk, tmp_path):
    heirs_of_processes(kind, disk, tmp_path, 1)


def heirs_of_processes(kind, disk, tmp_path, stride):
    """A process dies at any step; the next one finds names that nobody has synced, builds on them, and acknowledges."""
    for kill_at in range(1, 300, stride):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        world = World(disk, folder, kind)
        disk.steps, disk.kill_at = 0, kill_at
        world.pending = {0: 0, 1: 0, 2: 0}
        killed = False
        try:
            store = world.open()
            space = store.space(recipe())
            put(space, [0])
            space.flush()
            world.acknowledged[0] = 0
            put(space, [1, 2])
            space.flush()
            world.acknowledged.update({1: 0, 2: 0})
            space.delete([key(2)])
        except Killed:
            killed = True
        disk.kill_at = -1
        if not killed:
            break
        world.acknowledged.pop(2, None)
        with world.open() as heir, heir.space(recipe()) as space:
            # What stands already is skipped, and this flush vouches for it all the same.
            put(space, [0, 1, 5])
            space.flush()
            world.acknowledged.update({0: 0, 1: 0, 5: 0})
            world.lose_power()
            put(space, [6])
            space.flush()
            world.acknowledged[6] = 0
            world.lose_power()
        space._writer.abandon()
    assert kill_at > 25


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.long)])
def test_only_skipped_keys(disk, tmp_path, stride):
    """The heir puts nothing new: even then its flush makes durable what it skipped."""
    for kill_at in range(1, 40, stride):
        folder = tmp_path / str(kill_at)
        folder.mkdir()
        world = World(disk, folder)
        with world.open() as store, store.space(recipe()) as space:
            put(space, [0])
        disk.steps, disk.kill_at = 0, kill_at
        try:
            with world.open() as store, store.space(recipe()) as space:
                put(space, [1])
                space.flush()
            killed = False
        except Killed:
            killed = True
        disk.kill_at = -1
        if not killed:
            break
        with world.open() as heir, heir.space(recipe()) as space:
            put(space, [0, 1])
            space.flush()
            world.acknowledged.update({0: 0, 1: 0})
            world.lose_power()
    assert kill_at > 3


def test_the_journaling_disk_notices_a_missing_sync(disk, tmp_path, monkeypatch):
    """The test of the test: without either sync, power loss takes what was acknowledged."""
    for missing in ("sync_file", "sync_folder"):
        folder = tmp_path / missing
        folder.mkdir()
        world = World(disk, folder)
        with monkeypatch.context() as patch:
            with world.open() as store, store.space(recipe()) as space:
                put(space, [0])
                space.flush()
                patch.setattr(disk, missing, lambda path: None)
                put(space, [1])
                space.flush()
            world.acknowledged = {0: 0, 1: 0}
        with pytest.raises((AssertionError, actcache.errors.ActcacheError)):
            world.lose_power()
