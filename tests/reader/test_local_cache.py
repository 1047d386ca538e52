"""Copies of entries on a local disk: the same numbers whatever becomes of them, and never more bytes than allowed."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
from torch.utils.data import DataLoader

import actcache
from actcache.errors import NotAStoreError, StorageIOError, UsageError
from actcache.reader.caches import local_entries as localentries
from actcache.reader.caches.local_cache import LocalCache
from actcache.reader.caches.local_folder import in_use
from actcache.reader.reader import Reader
from tests.reader.remote import COUNT, KEYS, Remote, check, reading
from tests.store.test_disk import mount, small_disk  # noqa: F401 (a fixture)
from tests.support import HIDDEN, ids, key, length, put, recipe, rows, run, start
from tests.support.backends import each
from tests.support.waiting import DEADLINE, until


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


@pytest.fixture
def remote(space):
    return Remote(space)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache"


def segments(place):
    return sorted(place.glob("spaces/*/segments/*"))


def used(place):
    # Its status tells only whether a file went away while it looked.
    return int(subprocess.run(["du", "-s", "-B1", place], capture_output=True, check=False).stdout.split()[0])


def test_the_second_epoch_and_the_next_run_read_nothing(remote, place):
    with reading(remote, place) as reader:
        for _ in range(3):
            assert sorted(check(reader)) == list(range(COUNT))
        assert remote.read == COUNT
        assert reader.stats().local_documents == 2 * COUNT
    with reading(remote, place) as reader:
        assert sorted(check(reader)) == list(range(COUNT))
        assert reader.stats().local_documents == COUNT
    assert remote.read == COUNT


@each()
def test_copies_of_every_backends_entries(kind, tmp_path, place):
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        put(space, [7], version=1, overwrite=True)
        space.flush()
        remote = Remote(space)
        with reading(remote, place) as reader:
            for _ in range(2):
                assert sorted(check(reader, {7: 1})) == list(range(COUNT))
        assert remote.read == COUNT


@pytest.mark.parametrize("padded", [True, False])
def test_any_mixture_of_here_and_there(remote, place, padded, monkeypatch):
    """In both layouts, with absent documents, while segments come and go."""
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 600)
    cache = LocalCache(remote, place, 4 << 20)
    rng = np.random.default_rng(0)
    for step in range(150):
        numbers = rng.integers(0, COUNT + 5, int(rng.integers(0, 12))).tolist()
        lengths = [length(n) if n < COUNT else 0 for n in numbers]
        shape = (len(numbers), max(lengths, default=0) + 2) if padded else (sum(lengths) + 3,)
        out, out_ids = np.full((*shape, HIDDEN), 7, np.float32), np.full(shape, 7, np.int32)
        report = cache.read_into([key(n) for n in numbers], out, token_ids=out_ids)
        assert report.lengths.tolist() == lengths
        begin = 0
        for i, n in enumerate(numbers):
            part = (i, slice(lengths[i])) if padded else slice(begin, begin + lengths[i])
            begin += lengths[i]
            if lengths[i]:
                np.testing.assert_array_equal(out[part], rows(n))
                np.testing.assert_array_equal(out_ids[part], ids(n))
            if padded:
                assert not out[i, lengths[i] :].any()
        if step % 20 == 10:
            rng.choice(np.array(segments(place) or [place / "x"], object)).unlink(missing_ok=True)
    assert remote.read < 500
    cache.close()


def test_entries_on_their_way_to_the_disk_are_not_read_again(remote, place, monkeypatch):
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 700)
    cache = LocalCache(remote, place, 4 << 20)
    out = np.empty((40, HIDDEN), np.float32), np.empty(40, np.int32)
    for n in range(COUNT):
        for again in (n, max(0, n - 1), max(0, n - 4), max(0, n - 9)):
            cache.read_into([key(again)], out[0], token_ids=out[1])
            np.testing.assert_array_equal(out[0][: length(again)], rows(again))
            np.testing.assert_array_equal(out[1][: length(again)], ids(again))
    cache.close()
    assert remote.read == COUNT


def test_ram_over_disk_over_the_space(remote, place):
    ram = "1kB"  # a few entries
    with reading(remote, place, ram_cache=ram, device="cpu") as reader:
        for _ in range(3):
            assert sorted(check(reader)) == list(range(COUNT))
        stats = reader.stats()
    assert remote.read == COUNT
    assert 0 < stats.ram_documents < COUNT
    assert stats.documents == stats.ram_documents + stats.local_documents + remote.read
    assert stats.documents == 3 * COUNT


def test_what_is_overwritten_or_deleted_is_seen(space, remote, place):
    with reading(remote, place) as reader:
        check(reader)
    put(space, [3, 4], version=1, overwrite=True)
    space.flush()
    space.delete([key(9)])
    remote.read = 0
    rest = [key for n, key in enumerate(KEYS) if n != 9]
    versions = {3: 1, 4: 1}
    for reads in (2, 2):
        with reading(remote, place, KEYS, on_missing="skip", documents=range(COUNT)) as reader:
            assert sorted(check(reader, versions)) == [n for n in range(COUNT) if n != 9]
        assert remote.read == reads
    assert len(rest) == COUNT - 1


def test_entries_that_are_not_published_are_read_from_the_space(space, remote, place):
    put(space, range(100, 110))
    with reading(remote, place, [key(n) for n in range(100, 110)], documents=range(100, 110)) as reader:
        assert sorted(check(reader)) == sorted(check(reader)) == list(range(100, 110))
        assert segments(place) == []
        space.flush()
        check(reader)
        remote.read = 0
        check(reader)
    assert remote.read == 0


def test_entries_without_token_ids(space, remote, place):
    space.put([key(100)], [rows(100)])
    space.flush()
    keys = [*KEYS[:20], key(100)]
    with reading(remote, place, keys) as reader:
        for _ in range(6):
            for batch in reader:
                assert (batch.token_ids is None) == (20 in batch.documents)
                for i, n in enumerate(batch.documents.tolist()):
                    n = 100 if n == 20 else n
                    np.testing.assert_array_equal(batch.activations[i, : length(n)], rows(n))
    # Rows that were read without their token ids are not kept: the folder stops growing.
    sizes = []
    for _ in range(4):
        with reading(remote, place, keys) as reader:
            for _ in range(5):
                list(reader)
        sizes.append(len(segments(place)))
    assert sizes[-1] == sizes[-2]
    remote.read = 0
    with reading(remote, place, KEYS[:20]) as reader:
        check(reader)
    assert remote.read == 0


@pytest.mark.parametrize("what", ["rows", "folder"])
def test_a_disk_that_cannot_be_read(remote, place, caplog, what):
    """The reader goes on with the space alone, after one warning."""
    with reading(remote, place, KEYS[:50]) as reader:
        check(reader)

    def broken(*args, **options):
        raise StorageIOError("input/output error")

    with reading(remote, place) as reader:
        entries = reader._local._opened
        if what == "rows":
            entries._snapshot.gather = broken
        else:
            entries._catalog.snapshot, entries._seen = broken, -1
        assert sorted(check(reader)) == sorted(check(reader)) == list(range(COUNT))
        entries._catalog.snapshot = lambda: None  # closing looks once more
    assert [record.message[:31] for record in caplog.records] == ["going on without the local cache"[:31]]
    caplog.clear()


def damage_flip(path):
    data = bytearray(path.read_bytes())
    position = data.index(rows(5)[0].tobytes())
    data[position] ^= 1
    path.write_bytes(data)


def damage_truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_empty(path):
    path.write_bytes(b"")


def damage_foreign(path):
    path.write_bytes(b"\x89HDF" * 5000)


def damage_zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def damage_everything(path):
    rng = np.random.default_rng(0)
    data = bytearray(path.read_bytes())
    for position in rng.integers(0, len(data), 200).tolist():
        data[position] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [damage_flip, damage_truncate, damage_empty, damage_foreign, damage_zeros, damage_everything, os.unlink],
    ids=lambda damage: damage.__name__,
)
def test_damaged_files_are_misses(remote, place, damage):
    with reading(remote, place) as reader:
        check(reader)
    (path,) = segments(place)
    damage(path)
    remote.read = 0
    with reading(remote, place) as reader:
        assert sorted(check(reader)) == list(range(COUNT))
        assert 0 < remote.read <= COUNT
        check(reader)
    remote.read = 0
    with reading(remote, place) as reader:  # mended
        assert sorted(check(reader)) == list(range(COUNT))
    assert remote.read == 0


def test_a_damaged_index_costs_time_only(remote, place, monkeypatch, caplog):
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 2000)
    with reading(remote, place) as reader:
        check(reader)
    (index,) = place.glob("spaces/*/index/*")
    intact = index.read_bytes()
    rng = np.random.default_rng(1)
    for how in range(6):
        data = bytearray(intact if how else b"")
        for position in rng.integers(0, max(1, len(data)), 20 if how else 0).tolist():
            data[position] ^= 255
        index.write_bytes(data)
        with reading(remote, place) as reader:
            assert sorted(check(reader)) == list(range(COUNT))
    caplog.clear()  # the errors' tracebacks refer to all that was open then


@pytest.mark.parametrize("nbytes", [90_000, 200_000, 400_000])
def test_the_bound_holds_and_what_nobody_uses_is_evicted(tmp_path, place, nbytes, monkeypatch):
    """Three readers one after the other, of more than fits: as du counts, at each step."""
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 16_000)
    wide = recipe(hidden_size=256)
    with actcache.open(tmp_path / "store") as store, store.space(wide) as space:
        values = {n: np.full((1 + n % 9, 256), n, np.float32) for n in range(120)}
        space.put([key(n) for n in values], list(values.values()))
        space.flush()
        remote = Remote(space)
        for numbers in (range(60), range(40, 100), range(60, 120)):
            keys = [key(n) for n in numbers]
            for _ in range(2):
                with Reader(remote, keys, batch_size=5, local_cache=place, local_bytes=nbytes, depth=1) as reader:
                    remote.read = 0
                    for _ in range(2):
                        for batch in reader:
                            assert used(place) <= nbytes
                            for rows, n in zip(batch.activations, batch.documents.tolist(), strict=True):
                                n = numbers[n]
                                np.testing.assert_array_equal(rows[: 1 + n % 9], values[n])
                    reads = remote.read
                assert used(place) <= nbytes
            # A scan of more than fits finds again what there was room for: nothing in use was evicted for the rest.
            assert reads < 2 * len(keys) * (0.999 if nbytes < 300_000 else 0.8)
            assert segments(place)


def test_what_is_in_use_is_not_evicted(tmp_path, place, space, remote, monkeypatch):
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 1000)
    put(space, range(100, 200))
    space.flush()
    nbytes = 600_000
    first = reading(remote, place, KEYS[:10], nbytes)
    check(first)
    first._local._opened._writer.flush()
    held = segments(place)
    assert held
    others = [key(n) for n in range(100, 200)]
    with reading(remote, place, others, nbytes, documents=range(100, 200)) as other:
        check(other)
    assert set(held) <= set(segments(place))
    # As long as the first one lives, in another process too.
    code = """
import sys, actcache
from actcache.reader.caches.local_folder import in_use
from actcache.reader.caches.local_cache import LocalCache
from tests.support import *
space = actcache.open(sys.argv[1], "r").space(recipe())
cache = LocalCache(space, sys.argv[2], 600_000)
assert cache.use([key(n) for n in range(100, 200)]) > 0
print("ready", flush=True)
sys.stdin.read()
"""
    mine = set(segments(place)) - set(held)
    first.close()
    del first
    child = start(code, tmp_path / "store", place, stdin=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "ready\n"
        folder = LocalCache(remote, place, nbytes)._opened._folder
        with folder.changing() as allowed:
            assert allowed
            assert folder.make_room(nbytes - used(place) + 4096, "")
        assert mine <= set(segments(place))
        assert not set(held) <= set(segments(place))
        child.send_signal(signal.SIGKILL)  # the lease of a killed process counts no more
        child.wait(DEADLINE)
        with folder.changing():
            assert folder.make_room(nbytes - 100_000, "")
        assert not mine <= set(segments(place))
    finally:
        child.kill()
        child.communicate()


READER = """
import sys, actcache, numpy as np
from tests.support import *
from tests.reader.remote import Remote, check, reading
space = actcache.open(sys.argv[1], "r").space(recipe())
remote = Remote(space)
from pathlib import Path
from actcache.reader.caches import local_entries as localentries
localentries._SEGMENT_BYTES = 1500
"""


def test_killed_in_the_middle(tmp_path, space, place):
    code = (
        READER
        + """
reader = reading(remote, Path(sys.argv[2]))
while True:
    print(len(check(reader)), flush=True)
    reader._local._opened._paused = 0
    for path in sorted(Path(sys.argv[2]).glob("spaces/*/segments/*"))[::2]:
        path.unlink()
    reader._local._opened.refresh()
"""
    )
    remote = Remote(space)
    for delay in (0.0, 0.03, 0.11):
        child = start(code, tmp_path / "store", place)
        assert child.stdout.readline() == "60\n"
        time.sleep(delay)
        child.kill()
        child.communicate()
        with reading(remote, place) as reader:
            assert sorted(check(reader)) == list(range(COUNT))
        assert list((place / "tmp").iterdir()) == []
    remote.read = 0
    with reading(remote, place) as reader:
        assert sorted(check(reader)) == list(range(COUNT))
    assert remote.read == 0


def test_two_processes_share_a_folder(tmp_path, space, place):
    """As two ranks of one machine: what one has read, the other need not read again."""
    code = (
        READER
        + """
rank = int(sys.argv[3])
with reading(remote, Path(sys.argv[2]), ranks=(rank, 2)) as reader:
    seen = [n for _ in range(20) for n in check(reader)]
    read, remote.read = remote.read, 0
assert len(seen) == 600, len(seen)
print(read)
"""
    )
    children = [start(code, tmp_path / "store", place, rank) for rank in range(2)]
    reads = []
    for child in children:
        out, err = child.communicate(timeout=100)
        assert child.returncode == 0, err
        reads.append(int(out))
    assert sum(reads) < 4 * COUNT  # of 20 * COUNT
    remote = Remote(space)
    with reading(remote, place) as reader:
        assert sorted(check(reader)) == list(range(COUNT))
    assert remote.read == 0


def test_a_full_disk_ends_no_epoch(remote, small_disk, caplog, monkeypatch):  # noqa: F811
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 1500)
    (small_disk / "ballast").write_bytes(bytes((2 << 20) - 80_000))
    with caplog.at_level(logging.WARNING), reading(remote, small_disk / "cache", nbytes="1GiB") as reader:
        for _ in range(3):
            assert sorted(check(reader)) == list(range(COUNT))
    assert [record for record in caplog.records if "adding no more" in record.message] == caplog.records
    assert len(caplog.records) == 1
    assert remote.read > COUNT
    with open(small_disk / "more", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    caplog.clear()
    with caplog.at_level(logging.WARNING), reading(remote, small_disk / "other") as reader:
        assert sorted(check(reader)) == list(range(COUNT))
    assert len(caplog.records) == 1
    assert "without a local cache" in caplog.text


def test_a_folder_that_is_removed_meanwhile(remote, place, caplog, monkeypatch):
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 1500)
    with reading(remote, place) as reader:
        iterator = iter(reader)
        check([next(iterator)])
        place.rename(f"{place}-gone")
        check(iterator)
        assert sorted(check(reader)) == list(range(COUNT))
    assert len(caplog.records) <= 2
    with reading(remote, place) as reader:  # and it can be made anew
        check(reader)


def test_a_cache_is_no_store_and_a_store_no_cache(tmp_path, remote, place):
    with reading(remote, place) as reader:
        check(reader)
    for mode in ("r", "a"):
        with pytest.raises(NotAStoreError):
            actcache.open(place, mode)
    with pytest.raises(UsageError, match="evicts"):
        reading(remote, tmp_path / "store")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thing").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for bad in ("other", "file"):
        with pytest.raises(NotAStoreError):
            reading(remote, tmp_path / bad)
    (place / "actcache-cache.json").write_text("{}")
    with pytest.raises(NotAStoreError, match="remove the folder"):
        reading(remote, place)
    for options in ({"local_cache": place}, {"local_bytes": "1GiB"}, {"local_cache": place, "local_bytes": "much"}):
        with pytest.raises(UsageError):
            Reader(remote, KEYS, **options)


def test_another_recipe_shares_the_folder(tmp_path, remote, place):
    with reading(remote, place) as reader:
        check(reader)
    with actcache.open(tmp_path / "store") as store, store.space(recipe(layer=2)) as other:
        put(other, range(COUNT), version=5)
        other.flush()
        with reading(Remote(other), place) as reader:
            assert sorted(check(reader, dict.fromkeys(range(COUNT), 5))) == list(range(COUNT))
    remote.read = 0
    with reading(remote, place) as reader:
        check(reader)
    assert remote.read == 0


def test_leaving_it_to_the_collector(remote, place):
    check(reading(remote, place))
    gc.collect()
    until(lambda: segments(place))
    with reading(remote, place) as reader:
        check(reader)
    assert remote.read == COUNT


def test_at_the_end_of_the_process(tmp_path, space, place):
    run(READER + "reader = reading(remote, Path(sys.argv[2])); check(reader)", tmp_path / "store", place)
    remote = Remote(space)
    with reading(remote, place) as reader:
        check(reader)
    assert remote.read == 0
    assert list((place / "leases").iterdir()) == []


def test_a_forks_child_has_a_lease_of_its_own(remote, place):
    reader = reading(remote, place)
    check(reader)
    (lease,) = (place / "leases").iterdir()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if sorted(check(reader)) == list(range(COUNT)):
                code = 0 if len(list((place / "leases").iterdir())) == 2 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lease.exists()
    reader.close()
    assert not lease.exists()


def test_a_lease_ends_with_the_parent_though_a_child_lives(remote, place):
    """The child has the parent's lease open, too, until it lets go of it."""
    with reading(remote, place) as reader:
        check(reader)
    end, told = os.pipe()
    with reading(remote, place) as reader:
        check(reader)
        used = in_use(place / "leases")
        assert used
        pid = os.fork()
        if not pid:
            os.close(told)
            os.read(end, 1)  # until the parent has closed its reader, and looked
            os._exit(0)
        assert in_use(place / "leases") == used
    try:
        assert in_use(place / "leases") == set()
    finally:
        os.close(told)
        os.close(end)
        assert os.waitpid(pid, 0)[1] == 0


def test_a_childs_end_does_not_end_the_parents_lease(remote, place):
    with reading(remote, place) as reader:
        check(reader)
    with reading(remote, place) as reader:
        check(reader)
        used = in_use(place / "leases")
        assert used
        child = multiprocessing.get_context("fork").Process(target=gc.collect)
        child.start()
        child.join(DEADLINE)
        assert child.exitcode == 0
        assert in_use(place / "leases") == used
    assert in_use(place / "leases") == set()


def test_a_cache_whose_folder_was_moved_writes_nowhere_else(remote, place, tmp_path, caplog):
    """Neither into a new folder nor into a store that was made there: reading goes on."""
    with reading(remote, place) as reader:
        next(iter(reader))
        place.rename(tmp_path / "moved")
        actcache.open(place).close()
        before = sorted(path.name for path in place.rglob("*"))
        check(reader)
    assert sorted(path.name for path in place.rglob("*")) == before
    assert "no local cache any more" in caplog.text


def test_a_relative_cache_stays_where_it_was_opened(remote, tmp_path, monkeypatch):
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with reading(remote, "cache") as reader:
        os.chdir("../elsewhere")
        for _ in range(2):
            check(reader)
    assert remote.read == COUNT
    assert segments(tmp_path / "here" / "cache")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_forks_child_does_not_keep_the_folder_locked(remote, place):
    with reading(remote, place) as reader:
        folder = reader._local._opened._folder
        with folder.changing():
            pid = os.fork()
            if pid == 0:
                time.sleep(600)
                os._exit(0)
        with folder.changing() as allowed:
            assert allowed
        os.kill(pid, signal.SIGKILL)  # it was there all the time
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_workers_of_a_loader(space, place):
    reader = space.reader(KEYS, labels=np.arange(COUNT), local_cache=place, local_bytes="4MiB")
    data = reader.dataset()
    loader = DataLoader(data, batch_size=7, collate_fn=data.collate, num_workers=2, multiprocessing_context="fork")
    seen = [n for batch in loader for n in batch["labels"].tolist()]
    assert seen == list(range(COUNT))
    del loader
    remote = Remote(space)
    with reading(remote, place) as again:
        check(again)
    assert remote.read == 0
    reader.close()


def test_threads(remote, place, monkeypatch):
    monkeypatch.setattr(localentries, "_SEGMENT_BYTES", 1500)
    failures = []

    def work(seed):
        try:
            with reading(remote, place, seed=seed) as reader:
                for _ in range(4):
                    assert sorted(check(reader)) == list(range(COUNT))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_an_object_store_is_not_asked_again(place, monkeypatch):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    url = f"memory://{place.parent.name}/store"
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(COUNT))
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        with space.reader(KEYS, batch_size=7, local_cache=place, local_bytes="1MiB") as reader:
            assert check(reader) == list(range(COUNT))
        monkeypatch.setattr(space, "read_into", None)
        with space.reader(KEYS, batch_size=7, local_cache=place, local_bytes="1MiB") as reader:
            memory.rm(f"/{place.parent.name}", recursive=True)
            assert check(reader) == check(reader) == list(range(COUNT))


def test_what_travels_is_small(space, place):
    cache = LocalCache(space, place, 1 << 20)
    assert len(pickle.dumps(cache)) < 2000
    cache.close()
