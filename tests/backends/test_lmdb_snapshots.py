"""Versions by key: snapshots that stand still, removal after the grace period, compaction within one process."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.backend import VALUES
from actcache.errors import CorruptEntryError, OutOfSpaceError, ReadOnlyError, SegmentGoneError, StoreError
from actcache_lmdb import shared_environments
from actcache_lmdb.environment import MAP_LOCK
from actcache_lmdb.snapshot import LMDBSnapshot
from tests.support import HIDDEN, check, ids, key, length, put, recipe, rows


def generations(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("store/spaces/*/lmdb/*"))


def data_file(root: Path) -> Path:
    return sorted(root.glob("store/spaces/*/lmdb/*/data.mdb"))[-1]


def read(snapshot, numbers):
    """Return the rows that a snapshot has of these documents, None where it has none."""
    located = snapshot.locate(np.stack([np.frombuffer(key(n), np.uint8) for n in numbers]))
    out = np.empty((int(located.tokens.sum()), HIDDEN), np.float32)
    snapshot.gather(located, {VALUES: out}, None, None)
    parts = np.split(out, np.cumsum(located.tokens)[:-1])
    return [part if len(part) else None for part in parts]


def same(snapshot, versions, numbers):
    for number, part in zip(numbers, read(snapshot, numbers), strict=True):
        if number in versions:
            np.testing.assert_array_equal(part, rows(number, versions[number]))
        else:
            assert part is None


@pytest.fixture
def url(tmp_path):
    return f"lmdb:{tmp_path}/store"


def test_a_snapshot_stands_still(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(10))
        space.flush()
        old = space._driver.snapshot()
        usage = old.usage()
        located = old.locate(np.frombuffer(key(3), np.uint8)[None])
        put(space, [3, 4], version=1, overwrite=True)
        space.flush()
        middle = space._driver.snapshot()
        space.delete([key(4), key(5), key(77)])
        put(space, [10], version=2)
        space.flush()
        for _ in range(2):
            same(old, dict.fromkeys(range(10), 0), range(12))
            same(middle, {**dict.fromkeys(range(10), 0), 3: 1, 4: 1}, range(12))
            held = {**{n: 0 for n in range(10) if n not in (4, 5)}, 3: 1, 10: 2}
            same(space._driver.snapshot(), held, range(12))
            check(space, held, range(12))
            assert [len(view.keys()) for view in (old, middle, space._snapshot)] == [10, 10, 9]
            space._driver.compact()  # older snapshots keep to the old generation
            space.refresh()
        out = np.empty((length(3), HIDDEN), np.float32)
        old.gather(located, {VALUES: out}, None, None)
        np.testing.assert_array_equal(out, rows(3))
        assert old.usage() == usage
        assert old.usage().entries == 10
        assert space.usage().entries == len(space) == 9


def test_what_was_superseded_goes_after_the_grace_period(url, tmp_path):
    with actcache.open(url, grace=0) as store, store.space(recipe()) as space:
        put(space, range(50))
        space.flush()
        old = space._driver.snapshot()
        located = old.locate(np.frombuffer(key(3), np.uint8)[None])
        size = data_file(tmp_path).stat().st_size
        for version in range(1, 30):
            put(space, range(50), version=version, overwrite=True)
            space.flush()
        assert data_file(tmp_path).stat().st_size < 6 * size
        with pytest.raises(SegmentGoneError):
            same(old, {}, [3])
        with pytest.raises(SegmentGoneError):
            old.gather(located, {VALUES: np.empty((length(3), HIDDEN), np.float32)}, None, None)
        with pytest.raises(SegmentGoneError):
            old.keys()
        check(space, dict.fromkeys(range(50), 29), range(60))
        space.delete([key(n) for n in range(50)])
        put(space, [60])
        space.flush()
        put(space, [61])
        space.flush()
        environment = space._driver._wrapped._environment
        with environment.reading() as txn:
            left = {name: txn.stat(db)["entries"] for name, db in environment.dbs.items()}
        assert left == {"state": 1, "heads": 2, "entries": 2, "retired": 0}


def test_compaction_gives_space_back(url, tmp_path):
    with actcache.open(url, grace=3600) as store, store.space(recipe()) as space:
        for version in range(20):
            put(space, range(100), version=version, overwrite=True)
            space.flush()
        space.delete([key(n) for n in range(50)])
        before = data_file(tmp_path).stat().st_size
        usage = space.usage()
        assert space._driver.compact().segments_written == 1
        space.refresh()
        assert generations(tmp_path) == ["00000001", "00000002"]  # the old one has its readers' grace
        assert data_file(tmp_path).stat().st_size < before / 10
        check(space, dict.fromkeys(range(50, 100), 19), range(110))
        assert space.usage() == usage
        put(space, range(200, 210))
        space.flush()
        check(space, dict.fromkeys(range(200, 210), 0), range(200, 220))
    with actcache.open(url, grace=0) as store, store.space(recipe()) as space:
        assert generations(tmp_path) == ["00000002"]
        check(space, {**dict.fromkeys(range(50, 100), 19), **dict.fromkeys(range(200, 210), 0)}, range(220))


def test_two_stores_of_one_process_share_the_environment(url, tmp_path):
    first, second = actcache.open(url), actcache.open(f"lmdb:{tmp_path}/../{tmp_path.name}/store")
    one, two = first.space(recipe()), second.space(recipe())
    reading = actcache.open(str(tmp_path / "store"), "r").space(recipe())
    assert (
        one._driver._wrapped._environment is two._driver._wrapped._environment is reading._driver._wrapped._environment
    )
    put(one, range(5))
    one.flush()
    put(two, range(5, 10))
    two.flush()
    first.close()
    for space in (two, reading):
        space.refresh()
        check(space, dict.fromkeys(range(10), 0), range(12))
    second.close()
    check(reading, dict.fromkeys(range(10), 0), range(12))
    reading.close()
    gc.collect()
    assert not [e for e in shared_environments._OPEN.values() if e.folder.is_relative_to(tmp_path)]
    assert not MAP_LOCK._sharing


def test_a_copy_by_lmdbs_own_tools_is_read(url, tmp_path):
    """``mdb_copy -c`` moves pages: what heads say of them is wrong then, and found out."""
    import lmdb

    with actcache.open(url) as store, store.space(recipe()) as space:
        for version in range(3):
            put(space, range(50), version=version, overwrite=True)
            space.flush()
    path = data_file(tmp_path)
    copied = tmp_path / "copied"
    copied.mkdir()
    with lmdb.open(str(path.parent), max_dbs=4) as env:
        env.copy(str(copied), compact=True)
    shutil.copy(copied / "data.mdb", path)
    path.with_name("lock.mdb").unlink()
    with actcache.open(url) as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(50), 2), range(60))
        read_all(space, range(50), version=2)
        assert space._driver.compact().segments_written == 1
        space.refresh()
        check(space, dict.fromkeys(range(50), 2), range(60))


def read_all(space, numbers, version=0):
    """Read documents into one buffer, twice: by then it is known where all entries lie."""
    for _ in range(2):
        out = np.zeros((sum(length(n, version) for n in numbers), HIDDEN), np.float32)
        token_ids = np.zeros(len(out), np.int32)
        space.read_into([key(n) for n in numbers], out, token_ids=token_ids)
        np.testing.assert_array_equal(out, np.concatenate([rows(n, version) for n in numbers]))
        np.testing.assert_array_equal(token_ids, np.concatenate([ids(n, version) for n in numbers]))


def test_batches_by_one_call(url, tmp_path, monkeypatch):
    taken = []
    read_at_once = LMDBSnapshot.read_at_once

    def noted(*given):
        taken.append(read_at_once(*given))
        return taken[-1]

    monkeypatch.setattr(LMDBSnapshot, "read_at_once", noted)
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(40))
        space.flush()
        read_all(space, range(40))
        assert [one is not None for one in taken] == [False, True]
        put(space, range(10, 60), version=1, overwrite=True)  # the map and the snapshot are others
        space.delete([key(3)])
        read_all(space, range(10, 60), version=1)
        read_all(space, [0, 1, 2, 4, 5, 6, 7, 8, 9])
        assert space.read_into([key(3), key(4)], np.zeros((9, HIDDEN), np.float32)).lengths.tolist() == [0, length(4)]
        assert taken[-1] is not None
    path = data_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(rows(20, 1).tobytes())] ^= 1
    path.write_bytes(data)
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        space.lengths([key(n) for n in range(60)])
        read_all(space, range(30, 60), version=1)
        assert taken[-1] is not None
        with pytest.raises(CorruptEntryError) as caught:
            space.read_into([key(n) for n in range(10, 60)], np.zeros((500, HIDDEN), np.float32))
        assert caught.value.keys == [key(20)]
        assert taken[-1] is None, "what does not fit is looked at step by step"
    with actcache.open(url) as store, store.space(recipe()) as space:
        space.put([key(100)], [rows(100)])
        space.flush()
        space.lengths([key(n) for n in range(101)])
        for _ in range(3):
            space.read_into([key(30), key(100)], np.zeros((30, HIDDEN), np.float32))
        assert taken[-1] is None, "one has no token ids"


def test_padding_and_every_kind_of_array(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(40))
        space.put([key(100)], [rows(100)], None, word_ids=[np.arange(length(100))])
        space.flush()
        numbers = [5, 77, 3, 3, 39, 0]
        for width in (9, 12):
            out, token_ids = np.full((6, width, HIDDEN), 7, np.float32), np.full((6, width), 7, np.int32)
            space.read_into([key(n) for n in numbers], out, token_ids=token_ids)
            for i, number in enumerate(numbers):
                size = length(number) if number < 40 else 0
                np.testing.assert_array_equal(out[i, :size], rows(number)[:size])
                assert not out[i, size:].any()
                assert not token_ids[i, size:].any()
        np.testing.assert_array_equal(space.get([key(100)])[0].extras["word_ids"], np.arange(length(100)))


@pytest.mark.parametrize("hidden", [1, 3, 64, 100, 384, 768, 1000])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_of_every_size(url, hidden, dtype):
    """Short entries are taken in units that divide a page, long ones copied one by one."""
    rng = np.random.default_rng(hidden)
    many = [rng.integers(-9, 9, (n, hidden)).astype(dtype) for n in [*rng.integers(1, 60, 200).tolist(), 3000]]
    keys = [actcache.document_key(str(n)) for n in range(len(many))]
    with actcache.open(url) as store, store.space(recipe(hidden_size=hidden, dtype=dtype)) as space:
        space.put(keys, many, [np.arange(len(one)) for one in many])
        space.flush()
        order = rng.integers(0, len(many), 300).tolist()
        for some in (order, order[:3], [200]):
            for entry, number in zip(space.get([keys[i] for i in some]), some, strict=True):
                np.testing.assert_array_equal(entry.activations, many[number])
                np.testing.assert_array_equal(entry.token_ids, np.arange(len(many[number])))


def test_an_empty_space_is_read(tmp_path, url):
    with actcache.open(url) as store:
        store.space(recipe()).close()
    assert not list(tmp_path.glob("store/spaces/*/lmdb"))  # which comes with the first entries
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        check(space, {}, range(3))
        assert (len(space), space.usage().entries, space.damaged()) == (0, 0, {})
        space.read_into([key(1)], np.empty((1, 3, HIDDEN), np.float32))
        with actcache.open(url) as other, other.space(recipe()) as writing:
            put(writing, range(3))
        space.refresh()
        check(space, dict.fromkeys(range(3), 0), range(4))


def test_network_file_systems_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("actcache_lmdb.is_local", lambda path: False)
    with pytest.raises(StoreError, match="network file system"):
        actcache.open(f"lmdb:{tmp_path}/store")


@pytest.mark.parametrize("options", [{"grace": -1}, {"grace": "x"}, {"map_size": 5}, {"other": 1}])
def test_options(url, options):
    with pytest.raises(ValueError), actcache.open(url, **options) as store:
        store.space(recipe())


@contextmanager
def mounted(folder: Path, options: str):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("cannot mount a file system here")
    try:
        yield
    finally:
        gc.collect()
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(tmp_path):
    with mounted(tmp_path / "small", "size=6m"):
        url = f"lmdb:{tmp_path}/small/store"
        with actcache.open(url) as store:
            space = store.space(recipe())
            put(space, range(20))
            space.flush()
            ballast = tmp_path / "small" / "ballast"
            ballast.write_bytes(bytes(5 << 20))
            big = np.ones((60000, HIDDEN), np.float32)
            space.put([key(100)], [big])
            for _ in range(3):
                with pytest.raises(OutOfSpaceError):
                    space.flush()
                check(space, dict.fromkeys(range(20), 0), range(25))
            with suppress(OSError), open(ballast, "ab", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with pytest.raises(OutOfSpaceError):
                space._driver.compact()
            assert generations(tmp_path / "small") == ["00000001"]
            check(space, dict.fromkeys(range(20), 0), range(25))
            ballast.unlink()
            space.flush()
            np.testing.assert_array_equal(space.get([key(100)])[0].activations, big)
        with actcache.open(url) as store, store.space(recipe()) as space:
            check(space, dict.fromkeys(range(20), 0), range(25))
            assert key(100) in space


def test_read_only_media(tmp_path):
    folder = tmp_path / "media"
    with mounted(folder, "size=64m"):
        url = f"lmdb:{folder}/store"
        with actcache.open(url) as store, store.space(recipe()) as space:
            put(space, range(20))
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with actcache.open(url, "r") as store, store.space(recipe()) as space:
            check(space, dict.fromkeys(range(20), 0), range(25))
            assert not space._driver._wrapped._environment.locked
        space = actcache.open(url).space(recipe())
        put(space, [99])
        with pytest.raises(ReadOnlyError):
            space.flush()
        with pytest.raises(ReadOnlyError):
            space.close()
        del space
        gc.collect()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_folder_of_somebody_else(tmp_path):
    """Files and folders that cannot be written: read without LMDB's locks."""
    url = f"lmdb:{tmp_path}/store"
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(20))
    for path in [tmp_path, *tmp_path.parents]:
        path.chmod(path.stat().st_mode | 0o555)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setuid(65534)
            with actcache.open(url, "r") as store, store.space(recipe()) as space:
                check(space, dict.fromkeys(range(20), 0), range(25))
                status = 0 if not space._driver._wrapped._environment.locked else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
