"""Rows that are not in memory: read through the page cache where it can hold them, and past it else."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import CorruptEntryError
from actcache.io import loops, memory
from actcache.segments import rows as rows_module
from tests.support import key, make_store, recipe, segment_files

WIDE = {"hidden_size": 512}


def wide(n: int) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((n % 40 + 1, 512)).astype(np.float32)


@pytest.fixture(params=["hdf5", "zarr"])
def store(request):
    """A store on a disk, of a few MiB in three segments."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        url = f"{request.param}:{folder}/store"
        with actcache.open(url) as opened, opened.space(recipe(**WIDE)) as space:
            for first in (0, 200, 400):
                numbers = range(first, first + 200)
                space.put(
                    [key(n) for n in numbers], [wide(n) for n in numbers], [np.arange(n % 40 + 1) for n in numbers]
                )
                space.flush()
        drop(Path(folder))
        yield url, Path(folder)


def drop(folder: Path) -> None:
    """Drop a folder's files from the page cache; skips where they stay (a file system in memory)."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


@pytest.fixture
def asked(monkeypatch):
    """How rows were brought, one for each batch: (whether from files, whether past the page cache)."""
    calls = []

    def gather(columns, *given, **options):
        calls.append((any(column.files is not None for column in columns), options.get("direct", False)))
        return original(columns, *given, **options)

    def gather_if_present(*given):
        bad = if_present(*given)
        if bad is not None:
            calls.append((False, False))
        return bad

    original, if_present = loops.gather, loops.gather_if_present
    monkeypatch.setattr(loops, "gather", gather)
    monkeypatch.setattr(loops, "gather_if_present", gather_if_present)
    return calls


def check(space, numbers):
    out = np.full((len(numbers), 40, 512), 7, np.float32)
    ids = np.full((len(numbers), 40), 7, np.int32)
    report = space.read_into([key(n) for n in numbers], out, token_ids=ids)
    for i, n in enumerate(numbers):
        expected = wide(n) if n < 600 else wide(n)[:0]
        assert report.lengths[i] == len(expected)
        np.testing.assert_array_equal(out[i, : len(expected)], expected)
        assert not out[i, len(expected) :].any()
        assert ids[i].tolist() == [*range(len(expected)), *[0] * (40 - len(expected))]


def shuffled(count=150):
    return np.random.default_rng(4).permutation(620)[:count].tolist()


@pytest.mark.parametrize("room", ["enough", "too little"])
def test_what_is_not_in_memory_is_read(store, asked, monkeypatch, room):
    if room == "too little":
        monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    url, _ = store
    with actcache.open(url, "r", mapped=True) as opened, opened.space(recipe(**WIDE)) as space:
        check(space, shuffled())
        if asked == [(False, False)]:
            pytest.skip("this file system keeps all in memory")
        assert asked == [(True, room == "too little")]
        check(space, shuffled())
        if room == "enough":  # by now the pages are there
            assert asked[-1] == (False, False)
        else:  # they are not: nobody else's were evicted for them
            assert asked[-1] == (True, True)
        check(space, range(620))


def test_a_part_of_a_large_space_stays_in_memory(store, asked, monkeypatch):
    """Who reads some documents of a space that is larger than the memory finds them there the next time."""
    monkeypatch.setattr(memory, "available", lambda: 8 << 20)  # an eighth of it is a MiB
    url, _ = store
    with actcache.open(url, "r", mapped=True) as opened, opened.space(recipe(**WIDE)) as space:
        check(space, [1, 201, 300])
        if asked == [(False, False)]:
            pytest.skip("this file system keeps all in memory")
        check(space, [1, 201, 300])
        assert asked == [(True, False), (False, False)]
        check(space, shuffled())
        assert asked[-1] == (True, True)


def test_one_flipped_byte_is_found_on_a_cold_read(store):
    url, folder = store
    segment = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(data)
    drop(folder)
    with actcache.open(url, "r", mapped=True) as opened, opened.space(recipe(**WIDE)) as space:
        with pytest.raises(CorruptEntryError) as caught:
            check(space, range(600))
        assert len(caught.value.keys) == 1
        out = np.zeros((600, 40, 512), np.float32)
        bad = [n for n in range(600) if key(n) in caught.value.keys]
        check(space, [n for n in range(600) if n not in bad])
        del out


def test_a_file_system_without_direct_reads_is_read_through_the_page_cache(store, asked, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    original = os.open

    def refusing(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return original(path, flags, *rest, **options)

    monkeypatch.setattr(rows_module.os, "open", refusing)
    url, _ = store
    with actcache.open(url, "r", mapped=True) as opened, opened.space(recipe(**WIDE)) as space:
        check(space, shuffled())
        assert asked[0][1] is False


def test_a_segment_that_lost_its_name_is_read_from_its_mapping(store):
    url, folder = store
    with actcache.open(url, "r", mapped=True) as opened, opened.space(recipe(**WIDE)) as space:
        check(space, [0, 200, 400])  # all are mapped
        drop(folder)
        for path in segment_files(next((folder / "store" / "spaces").iterdir())):
            path.rename(folder / path.name)
        check(space, shuffled())


def test_more_segments_than_files_may_be_open(asked):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        make_store(Path(folder) / "store", range(210), segments=70)
        drop(Path(folder))
        with actcache.open(f"{folder}/store", "r", mapped=True) as opened, opened.space(recipe()) as space:
            space.get([key(n) for n in range(210)])
            assert asked[0] == (False, False)
