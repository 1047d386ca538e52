"""Arenas: rows of odd sizes in many files, read by many threads while more are placed."""

from __future__ import annotations

import gc
import itertools
import os
import re
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import actcache
from actcache.errors import ClosedError, FormatError, SegmentGoneError, StorageIOError
from actcache.io import loops, mmap
from actcache.io.loops import Column
from actcache.io.mmap import Arena
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.rows import MappedRows, ReadRows, RowPlan
from actcache.segments.segment import Segment
from tests.support import HIDDEN, key, make_store, recipe, rows, run, segment_files
from tests.support.waiting import DEADLINE, ended, ours

pytestmark = pytest.mark.processes


def write(path, offset, array):
    path.write_bytes(b"\xaa" * offset + array.tobytes())
    return array


def mappings(path) -> int:
    return Path("/proc/self/maps").read_text().count(f"{path}/")


@pytest.mark.parametrize(
    ("hidden", "dtype", "offset"),
    [(384, "<f2", 4096), (768, "<f2", 0), (20, "|u1", 4096), (384, "<f2", 256), (4096, "<f4", 0), (24, "<f2", 96)],
)
def test_huge_pages_lie_in_the_range_as_in_the_file(tmp_path, hidden, dtype, offset):
    """Else the kernel maps a huge page of a file as 512 small ones, which the processor has to look for."""
    arena = Arena(dtype, (hidden,), reserve=1 << 16)  # which has to grow
    row_bytes = np.dtype(dtype).itemsize * hidden
    placed = []
    for number in range(3):
        count = 12_000_000 // row_bytes + number
        array = write(tmp_path / str(number), offset, np.full((count, hidden), number + 1, dtype))
        placed.append((arena.place(tmp_path / str(number), offset, count), array))
    small = arena.place(tmp_path / "0", offset, 2)
    for first, array in placed:
        np.testing.assert_array_equal(arena.rows()[first : first + len(array)], array)
        address = arena.rows().ctypes.data + first * row_bytes
        assert (address - offset) % (2 << 20) == 0
    end = (placed[-1][0] + len(placed[-1][1])) * row_bytes
    assert end < 2 * 3 * 12_000_100, "no more addresses than rows"
    assert end <= small * row_bytes < end + (row_bytes + 1) * 4096, "few rows are not worth addresses"


def test_odd_rows_do_without_huge_pages(tmp_path):
    """What falls on whole rows nowhere near goes to the next page."""
    arena = Arena("<f2", (1023,))
    for number in range(3):
        array = write(tmp_path / str(number), 4096, np.full((2000, 1023), number + 1, "<f2"))
        first = arena.place(tmp_path / str(number), 4096, len(array))
        np.testing.assert_array_equal(arena.rows()[first : first + len(array)], array)


@pytest.mark.parametrize("hidden", [1, 3, 7, 384, 1023])
@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_rows_of_odd_sizes(tmp_path, hidden, dtype):
    rng = np.random.default_rng(hidden)
    arena = Arena(dtype, (hidden,))
    held = {}
    for number in range(20):
        count = int(rng.integers(1, 3000 // hidden + 3))
        array = rng.standard_normal((count, hidden)).astype(dtype)
        write(tmp_path / str(number), 4096 * int(rng.integers(0, 3)), array)
        offset = (tmp_path / str(number)).stat().st_size - array.nbytes
        held[arena.place(tmp_path / str(number), offset, count)] = array
    for first, array in held.items():
        np.testing.assert_array_equal(arena.rows()[first : first + len(array)], array)
        np.testing.assert_array_equal(np.take(arena.rows(), [0, first], axis=0)[1], array[0])
        arena.will_need(np.array([first]) * arena.row_bytes, np.array([array.nbytes]))
    assert not arena.rows()[0].any(), "row 0 stands for padding"
    with pytest.raises(ValueError, match="read-only"):
        arena.rows()[0] = 1
    places = sorted((first, first + len(array)) for first, array in held.items())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


@given(
    st.sampled_from(["|u1", "<u2", "<i4", "<f8"]),
    st.sampled_from([(), (2,), (5,), (24,), (32,)]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 2000)), min_size=1, max_size=6),
)
def test_any_offset_is_right_or_refused(tmp_path_factory, dtype, trailing, files):
    folder = tmp_path_factory.mktemp("arena")
    arena = Arena(dtype, trailing, reserve=1 << 16)
    placed = []
    for number, (offset, count) in enumerate(files):
        array = np.random.default_rng(number).integers(0, 200, (count, *trailing)).astype(dtype)
        write(folder / str(number), offset, array)
        try:
            placed.append((arena.place(folder / str(number), offset, count), array))
        except FormatError as error:
            refused = str(error)
            assert "cannot be aligned" in refused
            assert offset % np.gcd(4096, arena.row_bytes)
    for first, array in placed:
        np.testing.assert_array_equal(arena.rows()[first : first + len(array)], array)


def test_growth_keeps_old_arrays_and_files_that_lost_their_names(tmp_path):
    arena = Arena("<f4", (16,), reserve=1 << 16)
    arrays, views = [], []
    for number in range(40):
        array = np.full((500, 16), number, np.float32)
        path = tmp_path / f"{number}"
        write(path, 4096, array)
        first = arena.place(path, 4096, 500)
        arrays.append((first, array))
        views.append((arena.rows(), first, array))
        path.unlink()  # as a compaction does; the arena has to grow all the same
    for first, array in arrays:
        np.testing.assert_array_equal(arena.rows()[first : first + 500], array)
    assert len({id(view) for view, _, _ in views}) > 3, "it grew several times"
    for view, first, array in views:
        np.testing.assert_array_equal(view[first : first + 500], array)


def test_threads_read_while_files_are_placed(tmp_path):
    """Ranges come and go under the readers; every row is right, and what nobody reads any more is unmapped."""
    arenas = [Arena("<i4", (64,), reserve=1 << 16)]
    placed, wrong, done = [], [], threading.Event()

    def read(seed):
        rng = np.random.default_rng(seed)
        while not done.is_set():
            known = list(placed)
            if known:
                wanted = [known[i] for i in rng.integers(0, len(known), 20)]
                out = np.empty((20, 64), np.int32)
                np.take(arenas[0].rows(), [first for first, _ in wanted], axis=0, out=out, mode="clip")
                if not (out == [[number] for _, number in wanted]).all():
                    wrong.append((out, wanted))

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for number in range(150):
        write(tmp_path / str(number), 4096, np.full((100, 64), number, np.int32))
        placed.append((arenas[0].place(tmp_path / str(number), 4096, 100), number))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert mappings(tmp_path) == 150
    arenas.clear()
    gc.collect()
    assert mappings(tmp_path) == 0


def test_what_does_not_fit_is_refused(tmp_path):
    arena = Arena("<f4", (8,))
    write(tmp_path / "file", 4096, np.ones((10, 8), np.float32))
    for offset, count in ((4096, 11), (8192, 10), (4096, 10**15), (1 << 62, 1)):
        with pytest.raises(FormatError, match="truncated"):
            arena.place(tmp_path / "file", offset, count)
    with pytest.raises(FileNotFoundError):
        arena.place(tmp_path / "absent", 0, 1)
    with pytest.raises((FormatError, OSError)):
        arena.place(tmp_path, 0, 1)
    first = arena.place(tmp_path / "file", 4096, 10)
    assert (arena.rows()[first : first + 10] == 1).all()


def test_no_descriptor_stays_open(tmp_path):
    arena = Arena("<f4", (8,))
    write(tmp_path / "file", 4096, np.ones((10, 8), np.float32))
    before = os.listdir("/proc/self/fd")
    for _ in range(50):
        arena.place(tmp_path / "file", 4096, 10)
        with pytest.raises(FormatError):
            arena.place(tmp_path / "file", 4096, 11)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.parametrize("rounds", [4, pytest.param(20, marks=pytest.mark.long)])
def test_closing_unmaps(tmp_path, rounds):
    make_store(tmp_path / "store", range(30), segments=5)
    size = lambda: int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # noqa: E731
    before = size()
    for _ in range(rounds):
        with actcache.open(tmp_path / "store", "r", mapped=True) as store, store.space(recipe()) as space:
            space.get([key(n) for n in range(30)])
            assert mappings(tmp_path) > 5
            assert size() > before + (64 << 20)
        del space, store
        gc.collect()
    assert mappings(tmp_path) == 0
    assert size() < before + (64 << 20)


def test_a_limited_address_space(tmp_path):
    """``ulimit -v``, as batch systems set it: the reservation is made smaller, and reading goes on."""
    make_store(tmp_path / "store", range(30), segments=3)
    code = """
import resource, sys
import actcache, psutil
from tests.support import *
limit = psutil.Process().memory_info().vms + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
with actcache.open(sys.argv[1], "r", mapped=True) as store, store.space(recipe()) as space:
    check(space, dict.fromkeys(range(30), 0), range(31))
"""
    run(code, tmp_path / "store")


def test_a_process_that_ends_while_threads_read(tmp_path):
    """Nothing is unmapped under a daemon thread at exit: that would be a SIGSEGV."""
    make_store(tmp_path / "store", range(50))
    code = """
import atexit, sys, threading, time
import actcache
from tests.support import *
space = actcache.open(sys.argv[1], "r", mapped=True).space(recipe())
keys = [key(n) for n in range(50)] * 20
space.get(keys)
mapped = space._driver.catalog._rows._columns["values"]
arena, firsts = mapped.arena, mapped.firsts
rows, first, spare = arena.rows(), firsts[0], np.empty((1000, HIDDEN), np.float32)
def hammer():
    while True:
        np.take(rows, np.full(1000, first), axis=0, out=spare, mode="clip")
for _ in range(3):
    threading.Thread(target=hammer, daemon=True).start()
atexit.register(lambda: (time.sleep(0.3), rows[first].sum()))
"""
    for _ in range(3):
        run(code, tmp_path / "store")


def segments_of(folder):
    from actcache.entries.entry import columns_of
    from actcache_hdf5 import backend

    columns = columns_of(recipe())
    return [Segment.open(backend, LocalSegment(p), p.stem, folder.name, columns) for p in segment_files(folder)]


@pytest.mark.parametrize("source", [MappedRows, ReadRows])
def test_row_sources_name_the_segment_that_is_gone(tmp_path, source):
    folder = make_store(tmp_path / "store", range(20), segments=4)
    segments = segments_of(folder)
    segments[1].files.path.unlink()
    os.truncate(segments[2].files.path, 5000)
    opened = source(segments)
    where = np.array([0, 3, 1]), np.zeros(3, np.int64), np.ones(3, np.int64)
    out = np.empty((3, HIDDEN), np.float32)
    with pytest.raises(SegmentGoneError, match=re.escape(segments[1].files.where)):
        opened.gather(RowPlan(*where), {"values": out}, None, None)
    cut = RowPlan(np.array([2]), np.array([0]), np.array([1]))
    if source is MappedRows:
        with pytest.raises(FormatError, match=r"truncated"):
            opened.gather(cut, {"values": out}, None, None)
    else:
        assert opened.gather(cut, {"values": out}, None, None).tolist() == [0]
    whole = RowPlan(np.array([3, 0]), where[1][:2], where[2][:2])
    assert not len(opened.gather(whole, {"values": out}, None, None))
    np.testing.assert_array_equal(out[:2], [rows(15)[0], rows(0)[0]])
    opened.close()


def test_too_many_open_files_is_an_error_of_ours(tmp_path):
    make_store(tmp_path / "store", range(30), segments=6)
    code = """
import os, resource, sys
import actcache
from tests.support import *
space = actcache.open(sys.argv[1], "r", mapped=sys.argv[2] == "True").space(recipe())
limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit))
for call in (lambda: space.get([key(n) for n in range(30)]), space.refresh):
    try:
        call()
    except actcache.errors.StorageIOError as error:
        assert "open files" in str(error), error
    else:
        raise SystemExit("no error")
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
check(space, dict.fromkeys(range(30), 0), range(31))
assert space.damaged() == {}
"""
    for mapped in (True, False):
        run(code, tmp_path / "store", mapped)


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_many_small_segments(tmp_path, count):
    """Made by the segment format directly; read by both sources, in any order; few descriptors, one mapping each."""
    from actcache.entries.entry import columns_of
    from actcache.entries.writer import Builder
    from actcache.segments.segment import metadata, next_name
    from actcache_hdf5 import backend

    descriptors = len(os.listdir("/proc/self/fd"))
    folder = make_store(tmp_path / "store", [])
    (folder / "segments").mkdir(exist_ok=True)
    seed = actcache.store.space.checksum.space_seed(recipe().fingerprint, "float32", HIDDEN)
    for number in range(count):
        builder = Builder(
            columns_of(recipe()), frozenset(["values", "token_ids"]), 16, 0.0, lambda name, *of: np.empty(*of)
        )
        arrays = {"values": rows(number), "token_ids": np.arange(len(rows(number)), dtype="<i4")}

        def fill(out, arrays=arrays):
            for name, array in arrays.items():
                out[name][:] = array

        builder.add(np.frombuffer(key(number), np.uint8).reshape(1, 32), np.array([len(rows(number))]), fill)
        name = next_name([f"{number:012x}-"])
        backend.write(folder / "segments" / f"{name}.h5", builder.block(seed), metadata(name, recipe().fingerprint))
    order = np.random.default_rng(0).permutation(count).tolist()
    expected = np.concatenate([rows(n) for n in order])
    for mapped in (True, False):
        with actcache.open(tmp_path / "store", mapped=mapped) as store, store.space(recipe()) as space:
            out = np.empty(expected.shape, np.float32)
            space.read_into([key(n) for n in order], out)
            np.testing.assert_array_equal(out, expected)
            assert len(os.listdir("/proc/self/fd")) < descriptors + 100
            assert space.usage().segments == count


def test_closing_while_threads_read(tmp_path):
    """They get what they asked for, or ``ClosedError``; nothing else, and no thread is left."""
    before = ours()
    with actcache.open(tmp_path / "store") as store, store.space(recipe(hidden_size=256)) as space:
        keys = [key(n) for n in range(200)]
        space.put(keys, [np.full((100, 256), n, np.float32) for n in range(200)])
    for options in ({"mapped": True}, {"mapped": False}):
        for _ in range(15):
            strange, started = [], threading.Barrier(4)
            store = actcache.open(tmp_path / "store", "r", **options)
            space = store.space(recipe(hidden_size=256))

            def read(space=space, started=started, strange=strange):
                out = np.empty((20000, 256), np.float32)
                started.wait()
                try:
                    while True:
                        space.read_into(keys, out, verify=False)
                        if not (out[::100, 0] == np.arange(200)).all():
                            strange.append("wrong")
                except ClosedError:
                    pass
                except BaseException as error:  # what the test is after
                    strange.append(error)
                    raise SystemExit from None

            threads = [threading.Thread(target=read) for _ in range(3)]
            for thread in threads:
                thread.start()
            started.wait()
            store.close()
            for thread in threads:
                thread.join(DEADLINE)
                assert not thread.is_alive()
            assert strange == []
    ended(before)


def test_a_mapping_that_is_refused_is_an_error_of_ours():
    with pytest.raises(StorageIOError, match="mapped=False"):
        Arena("<f4", (8,), reserve=1 << 60)._grow(1 << 62)


def test_entries_of_all_lengths_are_gathered(tmp_path):
    make_store(tmp_path / "store", range(40), segments=5)
    rng = np.random.default_rng(1)
    with actcache.open(tmp_path / "store", "r", mapped=True) as store, store.space(recipe()) as space:
        for _ in range(30):
            numbers = rng.integers(0, 45, 17).tolist()
            lengths = [len(rows(n)) if n < 40 else 0 for n in numbers]
            packed, padded = np.full((200, HIDDEN), 7, np.float32), np.full((17, 11, HIDDEN), 7, np.float32)
            for out in (packed, padded):
                assert space.read_into([key(n) for n in numbers], out).lengths.tolist() == lengths
            begin = 0
            for i, (n, length) in enumerate(zip(numbers, lengths, strict=True)):
                expected = rows(n)[:length]
                np.testing.assert_array_equal(packed[begin : begin + length], expected)
                np.testing.assert_array_equal(padded[i, :length], expected)
                assert not padded[i, length:].any()
                begin += length
            assert (packed[begin:] == 7).all()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="whether a page is in memory is asked with preadv2")
@pytest.mark.parametrize("in_one_call", [True, False])
def test_what_will_be_needed_is_loaded(monkeypatch, in_one_call):
    """1,000 scattered rows of a file that is not in memory: in a moment, they are; most of the others are not."""
    monkeypatch.setattr("actcache.io.mmap._in_one_call", in_one_call and hasattr(os, "pidfd_open"))
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path, rows = Path(folder) / "rows", 20_000
        with open(path, "wb") as file:
            file.write(os.urandom(4096 * rows))
            os.fsync(file.fileno())
        arena = Arena("|u1", (4096,))
        first = arena.place(path, 0, rows)
        wanted = np.arange(0, rows, 20)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if in_memory(descriptor, wanted[:100]).any():
                pytest.skip("this file system keeps all in memory")
            arena.will_need((first + wanted) * 4096, np.full(len(wanted), 4096))
            end = time.monotonic() + DEADLINE
            while not in_memory(descriptor, wanted).all() and time.monotonic() < end:
                time.sleep(0.05)
            assert in_memory(descriptor, wanted).all()
            assert in_memory(descriptor, wanted[:-1] + 10).mean() < 0.9
        finally:
            os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="whether a page is in memory is asked with preadv2")
def test_what_is_not_in_memory_is_seen():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path, rows = Path(folder) / "rows", 10_000
        with open(path, "wb") as file:
            file.write(os.urandom(4096 * rows))
            os.fsync(file.fileno())
        arena = Arena("|u1", (1024,))
        first = arena.place(path, 0, 4 * rows)
        begins, lengths = (first + 4 * np.arange(0, rows, 10) + 1) * 1024, np.full(rows // 10, 5)  # two pages

        def is_absent(which):
            return loops.seems_absent(Column(1024, memory=arena.rows(), begins=begins[which]), lengths[which])

        descriptor = os.open(path, os.O_RDONLY)
        try:
            assert not is_absent(slice(None))
            assert not is_absent(slice(1))
            assert not is_absent(slice(0))
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # a part would stay, in folios of megabytes
            os.pread(descriptor, 4096 * rows // 2, 0)
            if in_memory(descriptor, np.array([rows - 1])).all():
                pytest.skip("this file system keeps all in memory")
            assert is_absent(slice(None)), "half of them are gone"
            assert not is_absent(slice(100))
        finally:
            os.close(descriptor)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user for a moment")
def test_of_files_of_others_the_kernel_does_not_tell(tmp_path):
    """mincore(2) says of their pages that all are in memory: they are asked for, whatever it says."""
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith(tempfile.gettempdir()) or "pytest" in str(folder):
            folder.chmod(0o755)
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    write(theirs, 0, np.ones((8, 1024), np.uint8))
    write(mine, 0, np.ones((8, 1024), np.uint8))
    theirs.chmod(0o644)
    os.chown(mine, 65534, 65534)
    os.seteuid(65534)
    try:
        assert not mmap.tells(theirs)
        assert mmap.tells(mine)
        arena = Arena("|u1", (1024,))
        arena.place(mine, 0, 8)
        assert arena.is_told
        arena.place(theirs, 0, 8)
        assert not arena.is_told, "one file of others is enough"
    finally:
        os.seteuid(0)


def in_memory(descriptor: int, pages: np.ndarray) -> np.ndarray:
    """Return which pages of a file can be read without waiting for the disk."""
    found = []
    for page in pages.tolist():
        try:
            found.append(os.preadv(descriptor, [bytearray(1)], 4096 * page, os.RWF_NOWAIT) == 1)
        except BlockingIOError:
            found.append(False)
    return np.array(found)
