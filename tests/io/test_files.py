"""The seam through which every name of a store is published."""

from __future__ import annotations

import ast
import errno
import os
import tempfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache
import actcache.io.files
from actcache.errors import OutOfSpaceError, ReadOnlyError, StorageIOError
from actcache.io.files import FileOperations, Files, flowing, is_local, write_flowing
from tests.support import ROOT, check, put, recipe


class Recording(FileOperations):
    """Notes the steps; fails at the one numbered ``failing`` with ``code``."""

    def __init__(self, failing=-1, code=errno.EIO):
        self.steps = []
        self.failing, self.code = failing, code

    def _note(self, kind, path):
        self.steps.append((kind, path))
        if len(self.steps) - 1 == self.failing:
            raise OSError(self.code, os.strerror(self.code), str(path))

    def sync_file(self, path):
        self._note("sync", path)
        super().sync_file(path)

    def sync_folder(self, path):
        self._note("sync", path)
        super().sync_folder(path)

    def rename(self, source, target):
        self._note("name", target)
        super().rename(source, target)

    def link(self, source, target):
        self._note("name", target)
        super().link(source, target)

    def unlink(self, path):
        self._note("unlink", path)
        super().unlink(path)

    def make_folder(self, path):
        self._note("mkdir", path)
        super().make_folder(path)


@pytest.mark.parametrize("replace", [True, False])
def test_the_order_of_the_steps(tmp_path, replace):
    """A folder is durable before anything goes into it; a name comes after the bytes, and is then synced itself."""
    root, disk = tmp_path / "root", Recording()
    target = root / "a" / "b" / "file.bin"
    files = Files(root, disk)
    files.make_root()
    assert files.publish_bytes(target, b"data", replace=replace)
    (temporary,) = {path for kind, path in disk.steps if kind == "sync" and path.parent == root / "tmp"}
    assert disk.steps == [
        ("mkdir", root),
        ("sync", tmp_path),
        ("mkdir", root / "tmp"),
        ("sync", root),
        ("mkdir", root / "a"),
        ("sync", root),
        ("mkdir", root / "a" / "b"),
        ("sync", root / "a"),
        ("sync", temporary),
        ("name", target),
        ("sync", target.parent),
    ]
    assert target.read_bytes() == b"data"
    assert list((root / "tmp").iterdir()) == []


def test_a_second_file_costs_no_more_than_its_own_steps(tmp_path):
    disk = Recording()
    files = Files(tmp_path, disk)
    files.publish_bytes(tmp_path / "a/one", b"1", replace=False)
    before = len(disk.steps)
    files.publish_bytes(tmp_path / "a/two", b"2", replace=False)
    assert [kind for kind, _ in disk.steps[before:]] == ["sync", "name", "sync"]


def test_folders_are_synced_bottom_up(tmp_path):
    def write(path):
        (path / "x/y").mkdir(parents=True)
        (path / "x/y/deep").write_bytes(b"1")
        (path / "top").write_bytes(b"2")

    disk = Recording()
    Files(tmp_path, disk).publish(tmp_path / "made", write, replace=True)
    synced = [path for kind, path in disk.steps if kind == "sync" and tmp_path / "tmp" in path.parents]
    root = min(synced, key=lambda path: len(path.parts))
    assert set(synced) == {root, root / "x", root / "x/y", root / "x/y/deep", root / "top"}
    for path in synced:
        inside = [other for other in synced if path in other.parents]
        assert all(synced.index(other) < synced.index(path) for other in inside)
    assert (tmp_path / "made/x/y/deep").read_bytes() == b"1"


@pytest.mark.parametrize("failing", range(0, 40, 7))
def test_all_files_of_a_folder_are_synced_before_it_has_its_name(tmp_path, failing):
    """At once, in any order; where one cannot be, nothing is published."""
    names = [f"{n % 3}/{n}" for n in range(40)]

    def write(path):
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"1")

    class Failing(Recording):
        def sync_file(self, path):
            super().sync_file(path)
            if path.name == str(failing) and self.failing == "some":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    disk = Failing(failing="some")
    files = Files(tmp_path, disk)
    with pytest.raises(StorageIOError):
        files.publish(tmp_path / "made", write, replace=True)
    assert not (tmp_path / "made").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert ("name", tmp_path / "made") not in disk.steps
    disk.failing, disk.steps = -1, []
    files.publish(tmp_path / "made", write, replace=True)
    named = disk.steps.index(("name", tmp_path / "made"))
    before = [path for kind, path in disk.steps[:named] if kind == "sync"]
    assert sorted(int(path.name) for path in before[:40]) == list(range(40))
    assert len(before) == 40 + 4  # the folders after them


@pytest.mark.parametrize("replace", [True, False])
def test_a_failure_at_any_step_leaves_nothing(tmp_path, replace):
    for failing in range(100):
        root = tmp_path / str(failing)
        root.mkdir()
        disk = Recording(failing)
        files, target = Files(root, disk), root / "a" / "file"
        try:
            files.publish_bytes(target, b"data", replace=replace)
        except StorageIOError as error:
            said = str(error)
        else:
            assert failing == len(disk.steps)
            break
        assert str(root) in said
        last = disk.steps[-1] == ("sync", target.parent) and disk.steps[-2][0] == "name"
        assert target.exists() == last
        assert not target.exists() or target.read_bytes() == b"data"  # whole, where its name could not be synced
        assert not (root / "tmp").exists() or list((root / "tmp").iterdir()) == []
        # And what failed can be done again, by the same object.
        disk.failing = -1
        assert files.publish_bytes(target, b"data", replace=replace) == (replace or not last)
        assert target.read_bytes() == b"data"
    assert failing > 5


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, OutOfSpaceError),
        (errno.EDQUOT, OutOfSpaceError),
        (errno.EFBIG, OutOfSpaceError),
        (errno.EROFS, ReadOnlyError),
        (errno.EACCES, ReadOnlyError),
        (errno.EIO, StorageIOError),
        (errno.EMFILE, StorageIOError),
        (errno.ENAMETOOLONG, StorageIOError),
        (errno.ESTALE, StorageIOError),
    ],
)
def test_what_the_operating_system_says_is_translated(tmp_path, code, expected):
    def write(path):
        path.write_bytes(b"some of it")
        raise OSError(code, os.strerror(code))

    files = Files(tmp_path)
    with pytest.raises(expected) as caught:
        files.publish(tmp_path / "file", write)
    assert type(caught.value) is expected
    assert list((tmp_path / "tmp").iterdir()) == []
    for step in range(5):
        broken = Files(tmp_path, Recording(step, code))
        with pytest.raises(expected):
            broken.publish_bytes(tmp_path / "file", b"x", replace=True)
    (tmp_path / "other").touch()
    with pytest.raises(expected):
        Files(tmp_path, Recording(0, code)).remove(tmp_path / "other")


def test_replacing(tmp_path):
    files = Files(tmp_path)
    assert files.publish_bytes(tmp_path / "f", b"1", replace=False)
    assert not files.publish_bytes(tmp_path / "f", b"2", replace=False)
    assert (tmp_path / "f").read_bytes() == b"1"
    assert files.publish_bytes(tmp_path / "f", b"3", replace=True)
    assert (tmp_path / "f").read_bytes() == b"3"
    assert files.remove(tmp_path / "f")
    assert not files.remove(tmp_path / "f")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(StorageIOError, match=r"a file where the store needs a folder|Not a directory"):
        Files(tmp_path).publish_bytes(tmp_path / "a/b/c", b"", replace=True)


def test_file_systems_without_hard_links(tmp_path):
    class NoLinks(FileOperations):
        def link(self, source, target):
            raise PermissionError(errno.EPERM, "no links here")

    files = Files(tmp_path, NoLinks())
    assert files.publish_bytes(tmp_path / "f", b"1", replace=False)
    assert not files.publish_bytes(tmp_path / "f", b"2", replace=False)
    assert (tmp_path / "f").read_bytes() == b"1"


def test_of_racing_creators_one_wins(tmp_path):
    for number in range(30):
        target, results, gate = tmp_path / f"{number}", [], threading.Barrier(6)

        def create(name, target=target, results=results, gate=gate):
            gate.wait()
            if Files(tmp_path).publish_bytes(target, name, replace=False):
                results.append(name)

        threads = [threading.Thread(target=create, args=(b"%d" % n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 1
        assert target.read_bytes() == results[0]


@pytest.mark.parametrize("rounds", [6, pytest.param(20, marks=pytest.mark.long)])
def test_racing_creators_of_one_store(tmp_path, rounds):
    for number in range(rounds):
        root, failures, gate = tmp_path / f"{number}", [], threading.Barrier(6)

        def create(n, root=root, failures=failures, gate=gate):
            gate.wait()
            try:
                with actcache.open(root) as store, store.space(recipe()) as space:
                    put(space, [n])
            except BaseException as error:  # reported by the test
                failures.append(error)
                raise SystemExit from None

        threads = [threading.Thread(target=create, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        with actcache.open(root, "r") as store, store.space(recipe()) as space:
            check(space, dict.fromkeys(range(6), 0), range(7))


def test_a_temporary_folder_that_somebody_cleans_away(tmp_path):
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        put(space, [1])
        space.flush()
        (tmp_path / "s/tmp").rmdir()
        put(space, [2])
        space.flush()
        check(space, {1: 0, 2: 0}, range(4))


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("/", True),
        ("/nfs/share/x", False),
        ("/nfs/share2", True),
        ("/nfs/share/local/x", True),
        ("/with space/x", False),
        ("/h\u00f6me/x", False),
        ("/fuse", False),
    ],
)
def test_which_file_systems_are_local(tmp_path, path, local):
    mounts = tmp_path / "mountinfo"
    lines = ["1 0 8:1 / / rw - ext4 /dev/sda rw", "2 1 0:5 / /nfs/share rw shared:1 - nfs4 host:/x rw"]
    lines += ["3 2 8:2 / /nfs/share/local rw - xfs /dev/sdb rw", "4 1 0:6 / /with\\040space rw - cifs //host/x rw"]
    lines += ["5 1 0:7 / /h\u00f6me rw - nfs host:/h rw", "6 1 0:8 / /fuse rw - fuse.sshfs host: rw"]
    mounts.write_bytes("\n".join(lines).encode() + b"\n7 1 0:9 / /lat\xefn rw - nfs host:/l rw\n")
    assert is_local(type(tmp_path)(path), mounts) == local
    assert is_local(tmp_path, tmp_path / "absent")


def test_the_seam_is_the_only_way():
    """No other module of the store renames, links, or removes files; LMDB keeps its own, in one module of its own."""
    core, backends = ROOT / "src/actcache", ROOT / "backends"
    seams = {core / "io/files.py", core / "io/newfile.py", backends / "actcache_lmdb/generations.py"}
    seams.add(core / "segments/places/objects/object_place.py")  # copies of objects, in a folder of its own
    names = {"rename", "replace", "link", "symlink", "unlink", "remove", "rmtree", "move", "rmdir", "renames"}
    sources = [
        path for room in ("format", "io", "segments", "entries", "store") for path in (core / room).rglob("*.py")
    ]
    assert len(sources) > 50
    assert seams <= {*sources, *backends.rglob("*.py")}
    for path in [*sources, *backends.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in names and path not in seams:
                assert ast.unparse(node.value) not in ("os", "shutil", "path", "Path"), f"{path}:{node.lineno}"


@pytest.mark.parametrize("hinting", [True, False], ids=["where-hints-are-taken", "elsewhere"])
@pytest.mark.parametrize("short", [None, 1000, 4097], ids=["whole", "short", "odd"])
def test_large_writes(tmp_path, monkeypatch, hinting, short):
    """All bytes, where the file stands, however much the system takes at once; the hints name what was written."""
    if not hinting:
        monkeypatch.setattr(actcache.io.files, "_sync_file_range", None)
    elif actcache.io.files._sync_file_range is not None:
        real, hints = actcache.io.files._sync_file_range, []
        monkeypatch.setattr(actcache.io.files, "_sync_file_range", lambda *hint: hints.append(hint) or real(*hint))
    if short is not None:
        write = os.write
        monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:short]))
    monkeypatch.setattr(actcache.io.files, "_WRITE_BYTES", 1 << 13)
    data = memoryview(os.urandom(100_001))
    with open(tmp_path / "file", "xb", buffering=0) as file:
        file.write(b"before")
        write_flowing(file.fileno(), [data])
        write_flowing(file.fileno(), [])
        file.write(b"after")
    assert (tmp_path / "file").read_bytes() == b"before" + data + b"after"
    if hinting and actcache.io.files._sync_file_range is not None:
        assert [place for _, place, _, _ in hints] == np.cumsum([6, *(n for _, _, n, _ in hints)])[:-1].tolist()
        assert sum(n for _, _, n, _ in hints) == len(data)
        assert all(place % (1 << 13) == 0 for _, place, _, _ in hints[1:])


@given(
    sizes=st.lists(st.integers(0, 300), max_size=30),
    at=st.integers(0, 200),
    unit=st.sampled_from([1, 7, 64, 128]),
)
def test_pieces_are_written_by_whole_blocks(sizes, at, unit):
    """Whatever the pieces are, and where the file stands: the page cache gets whole huge pages by single writes."""
    data, writes = os.urandom(sum(sizes)), []
    ends = np.cumsum(sizes, dtype=int).tolist()
    with tempfile.TemporaryFile(buffering=0) as file, pytest.MonkeyPatch.context() as monkeypatch:
        file.write(bytes(at))
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, block: writes.append(len(block)) or write(fd, block))
        monkeypatch.setattr(actcache.io.files, "_WRITE_BYTES", unit)
        write_flowing(file.fileno(), (memoryview(data)[end - n : end] for end, n in zip(ends, sizes, strict=True)))
        assert os.pread(file.fileno(), at + len(data) + 1, 0) == bytes(at) + data
    edges = np.cumsum([at, *writes]).tolist()
    assert edges == sorted({at, *(p for p in range(at, at + len(data)) if p % unit == 0), at + len(data)})


def test_a_large_write_that_fails(tmp_path, monkeypatch):
    """A hint that fails is none of ours; a write that fails is."""
    monkeypatch.setattr(actcache.io.files, "_sync_file_range", lambda *given: -1)
    with open(tmp_path / "file", "xb", buffering=0) as file:
        write_flowing(file.fileno(), [memoryview(b"data")])
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space"):
        write_flowing(full.fileno(), [memoryview(b"data")])


def test_a_file_that_others_write_to(tmp_path):
    with open(tmp_path / "file", "xb", buffering=0) as file:
        with flowing(file.fileno()):
            for _ in range(20):
                file.write(bytes(1 << 16))
                time.sleep(0.001)
        with pytest.raises(KeyError), flowing(file.fileno()):
            raise KeyError
    assert (tmp_path / "file").stat().st_size == 20 << 16
    assert [thread for thread in threading.enumerate() if thread.name == "actcache-flow"] == []
