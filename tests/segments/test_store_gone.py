"""A store stays the one that was opened: other working directories, moved and removed folders, other stores there."""

from __future__ import annotations

import os
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

import actcache
from actcache.admin.migration import migrate
from actcache.errors import BackendError, StorageIOError, StoreGoneError
from actcache.io.files import Files
from actcache.segments import registry
from tests.support import check, compact, key, put, recipe
from tests.support.backends import each

HELD = dict.fromkeys(range(6), 0)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, left for another one by ``os.chdir("../elsewhere")``."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def everything(url):
    """What another handle finds: number -> version of those that are there."""
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        check(space, HELD | {n: 0 for n in range(6, 12) if key(n) in space}, range(12))
        return {n for n in range(20) if key(n) in space}


# --- the working directory -------------------------------------------------------------------------------------------


@each()
def test_a_relative_store_stays_where_it_was_opened(kind, here):
    with actcache.open(kind.url("activations")) as store, store.space(recipe()) as space:
        put(space, range(3))
        space.flush()
        os.chdir("../elsewhere")
        put(space, range(3, 8))
        space.flush()
        space.delete([key(6), key(7)])
        compact(space)
        store.put_collection("some", [key(1)])
        assert store.collection("some").keys.tobytes() == key(1)
        assert store.sweep(0.0) >= 0
        space.refresh()
        check(space, HELD, range(10))
        assert space.put_blob("note.json", b"{}")
        assert space.blob("note.json") == b"{}"
        assert not space.repair().quarantined
        with store.space(recipe(layer=2)) as second:
            put(second, [1])
        assert store.delete_space(recipe(layer=2).fingerprint)
        assert not list(Path.cwd().iterdir())
    assert everything(here / "activations") == set(HELD)


@each()
def test_what_is_pickled_is_the_same_store(kind, here):
    with actcache.open(kind.url("activations")) as store, store.space(recipe()) as space:
        put(space, range(6))
        space.flush()
        sent = pickle.dumps((store, space, space.reader([key(n) for n in range(6)]).dataset()))
    os.chdir("../elsewhere")
    store, space, data = pickle.loads(sent)  # noqa: S301
    check(space, HELD, range(8))
    assert len(data) == 6
    assert data[1].key_array.tobytes() == key(1)
    put(space, [6])
    store.close()
    space.close()
    assert not list(Path.cwd().iterdir())
    assert everything(here / "activations") == {*HELD, 6}
    (here / "activations").rename("moved")
    with pytest.raises(StoreGoneError):
        pickle.loads(sent)  # noqa: S301
    assert not list(here.iterdir())
    actcache.open(kind.url(here / "activations")).close()
    with pytest.raises(StoreGoneError, match="another store"):
        pickle.loads(sent)  # noqa: S301


def test_what_a_location_becomes(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    for given, resolved in (
        ("a", here / "a"),
        ("./a:b", here / "a:b"),
        (Path("a:b"), here / "a:b"),
        ("hdf5:a", f"hdf5:{here}/a"),
        ("lmdb:~/a", f"lmdb:{here}/a"),
        ("~", here),
        ("//a/b", Path("/a/b")),
        ("hdf5:////a", "hdf5:/a"),
        ("../a", here / "../a"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("zarr:s3://bucket/a", "zarr:s3://bucket/a"),
        ("memory://a", "memory://a"),
    ):
        assert registry.resolve(given) == resolved
        assert registry.resolve(registry.resolve(given)) == resolved
    here.rmdir()
    with pytest.raises(BackendError, match="absolute"):
        registry.resolve("a")


# --- moved, removed, replaced ----------------------------------------------------------------------------------------


def changes(store, space):
    """All that changes or lists something in a store, by name."""
    fingerprint = recipe().fingerprint
    return {
        "delete": lambda: space.delete([key(1)]),
        "compact": lambda: compact(space),
        "verify": space.verify,
        "repair": space.repair,
        "refresh": space.refresh,
        "put_collection": lambda: store.put_collection("other", [key(2)]),
        "collection": lambda: store.collection("some"),
        "collections": store.collections,
        "delete_collection": lambda: store.delete_collection("some"),
        "fingerprints": store.fingerprints,
        "recipes": store.recipes,
        "put_blob": lambda: space.put_blob("note.json", b"{}", replace=True),
        "blob": lambda: space.blob("note.json"),
        "listing": lambda: store.driver.listing(),
        "space": lambda: store.space(recipe(layer=3)),
        "delete_space": lambda: store.delete_space(fingerprint),
        "sweep": lambda: store.sweep(0.0),
    }


@pytest.fixture
def opened(kind, root):
    store = actcache.open(kind.url(root))
    space = store.space(recipe())
    put(space, range(4))
    store.put_collection("some", [key(1)])
    space.flush()
    put(space, [4])
    space.flush()
    space.refresh()
    put(space, [5])  # not flushed
    yield store, space
    with suppress(StoreGoneError):
        store.close()


@each()
def test_a_store_that_was_moved_takes_nothing_until_it_is_back(kind, root, opened, tmp_path):
    store, space = opened
    root.rename(tmp_path / "moved")
    before = contents(tmp_path / "moved")
    with pytest.raises(StoreGoneError, match=r"moved.* not stored: 1, .* flush again"):
        space.flush()
    for name, change in changes(store, space).items():
        with pytest.raises(StoreGoneError):
            change()
        assert not root.exists(), name
    assert contents(tmp_path / "moved") == before
    for number in range(6):  # right, or refused: never absent
        try:
            check(space, HELD, [number])
        except StoreGoneError:
            assert number != 5  # that one is in memory
    (tmp_path / "moved").rename(root)
    space.flush()
    check(space, HELD, range(8))
    store.close()
    assert everything(root) == set(HELD)


@each()
def test_another_store_in_its_place_is_not_touched_and_never_read(kind, root, opened, tmp_path):
    store, space = opened
    root.rename(tmp_path / "moved")
    with actcache.open(kind.url(root)) as other, other.space(recipe()) as others:
        put(others, range(8), version=1)  # the same keys with other contents, as after a bug was mended
        other.put_collection("some", [key(7)])
        others.flush()
        before = contents(root)
        with pytest.raises(StoreGoneError, match=r"another store.* not stored: 1,"):
            space.flush()
        for change in changes(store, space).values():
            with pytest.raises(StoreGoneError):
                change()
        for number in range(10):
            with suppress(StoreGoneError):
                check(space, HELD, [number])
        assert contents(root) == before
    shutil.rmtree(root)
    (tmp_path / "moved").rename(root)
    space.flush()
    check(space, HELD, range(8))


@each()
def test_closing_says_what_is_lost(kind, root):
    store = actcache.open(kind.url(root))
    space = store.space(recipe())
    put(space, range(3))
    shutil.rmtree(root)
    with pytest.raises(StoreGoneError, match=r"not stored: 3, .* lost"):
        store.close()
    assert not root.exists()
    store.close()


@each()
def test_a_copy_that_was_put_back_is_the_same_store(kind, root, tmp_path):
    with actcache.open(kind.url(root)) as store, store.space(recipe()) as space:
        put(space, range(5))
        space.flush()
        shutil.copytree(root, tmp_path / "copy")
        shutil.rmtree(root)
        shutil.copytree(tmp_path / "copy", root)
        put(space, [5])
        space.flush()
        check(space, HELD, range(8))
    assert everything(root) == set(HELD)


@each()
def test_a_link_that_leads_elsewhere_now(kind, tmp_path):
    for name in ("one", "two"):
        actcache.open(kind.url(tmp_path / name)).close()
    link = tmp_path / "link"
    link.symlink_to("one")
    with actcache.open(kind.url(link)) as store, store.space(recipe()) as space:
        put(space, range(6))
        link.unlink()
        link.symlink_to("two")
        with pytest.raises(StoreGoneError, match="another store"):
            space.flush()
        link.unlink()
        link.symlink_to("one")
        space.flush()
    assert everything(tmp_path / "one") == set(HELD)


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_that_moves_while_something_is_being_written(tmp_path, folder):
    """Neither the file nor a new folder appears where the store was."""
    root, moved = tmp_path / "store", tmp_path / "moved"
    files = Files(root)
    files.make_root()

    def write(path):
        if folder:
            path.mkdir()
        (path / "file" if folder else path).write_bytes(b"data")
        root.rename(moved)

    with pytest.raises(StorageIOError):
        files.publish(root / "a" / "name", write)
    assert not root.exists()
    with pytest.raises(StorageIOError, match="folder"):
        files.publish_bytes(root / "a" / "name", b"data", replace=True)
    assert not root.exists()
    moved.rename(root)
    assert files.publish_bytes(root / "a" / "name", b"data", replace=True)


@each()
def test_a_migration_whose_target_is_moved(kind, tmp_path, root):
    with actcache.open(tmp_path / "source") as source, source.space(recipe()) as space:
        for number in range(6):
            put(space, [number])
            space.flush()
        target = actcache.open(kind.url(root))
        with suppress(StoreGoneError), target, pytest.raises(StoreGoneError):
            migrate(
                source,
                target,
                segment_bytes=64,
                progress=lambda *_: root.exists() and root.rename(tmp_path / "moved"),
            )
        assert not root.exists()
        (tmp_path / "moved").rename(root)
        with actcache.open(kind.url(root)) as target:
            migrate(source, target)
    assert everything(root) == set(HELD)
