"""Full disks and read-only media: clear errors, nothing lost, and work goes on when the cause is mended."""

from __future__ import annotations

import contextlib
import shutil
import subprocess

import numpy as np
import pytest

import actcache
from actcache.errors import OutOfSpaceError, ReadOnlyError
from tests.support import check, key, put, recipe
from tests.support.backends import each

HELD = dict.fromkeys(range(10), 0)
WIDE = recipe(hidden_size=200)


def mount(kind, place, *options):
    """Mount something for as long as the test runs; skip where that is not allowed."""
    place.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", "-t", kind, *options, str(place)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let us mount")


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    mount("tmpfs", place, "-o", "size=2M", "tmpfs")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True, capture_output=True)


@each(segmented=True)  # others keep a file open for writing: the kernel does not remount under them
def test_a_read_only_mount(kind, small_disk):
    url = kind.url(small_disk / "store")
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, HELD)
    writer = actcache.open(url)
    space = writer.space(recipe())
    put(space, [20])
    remount(small_disk, "ro")
    with pytest.raises(ReadOnlyError):
        space.flush()
    check(space, {**HELD, 20: 0}, [*range(10), 20])
    for call in (lambda: space.delete([key(1)]), space.compact, lambda: space.put_blob("x", b"")):
        with pytest.raises(ReadOnlyError):
            call()
    for mode in ("r", "a"):
        for options in kind.options:
            with actcache.open(url, mode, **options) as store, store.space(recipe()) as other:
                check(other, HELD, range(11))
                assert other.verify().intact
    with pytest.raises(ReadOnlyError):
        actcache.open(kind.url(small_disk / "new"))
    with actcache.open(url) as store, pytest.raises(ReadOnlyError):
        store.space(recipe(layer=9))
    remount(small_disk, "rw")
    space.flush()
    writer.close()
    with actcache.open(url, "r") as store, store.space(recipe()) as other:
        check(other, {**HELD, 20: 0}, [*range(10), 20])


@each()
def test_a_copy_on_read_only_media(kind, small_disk, tmp_path):
    """A store that was never open there: nothing has to be written to read it."""
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        put(space, HELD)
    shutil.copytree(tmp_path / "store", small_disk / "store")
    remount(small_disk, "ro")
    for options in kind.options:
        with actcache.open(kind.url(small_disk / "store"), "r", **options) as store, store.space(recipe()) as space:
            check(space, HELD, range(11))
            assert space.verify().intact


def large(number):
    return np.full((50, 200), number, np.float32)  # 40,000 bytes


def right(space, numbers):
    for number, entry in zip(numbers, space.get([key(n) for n in numbers]), strict=True):
        assert entry is not None, number
        np.testing.assert_array_equal(entry.activations, large(number))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("segment_bytes", [100_000, 1 << 20])
@each()
def test_a_full_disk(kind, small_disk, segment_bytes):
    """Flushed entries stay, others wait in memory; after some space is freed, flush publishes all of them."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1_000_000))
    url = kind.url(small_disk / "store")
    store = actcache.open(url)
    space = store.space(WIDE, segment_bytes=segment_bytes)
    flushed, put_at_all, failures = 0, 0, 0
    for number in range(40):
        try:
            space.put([key(number)], [large(number)])
            put_at_all = number + 1
            space.flush()
            flushed = put_at_all
        except OutOfSpaceError as error:
            failures += 1
            said = str(error)
            assert "free some space" in said
        if failures == 4:
            break
    assert failures == 4
    assert flushed > 5
    if kind.segmented:
        assert list((small_disk / "store/tmp").iterdir()) == []
    held = [n for n in range(number + 1) if key(n) in space]
    right(space, held)  # reading works all the time, of what is flushed and of what is not
    with actcache.open(url, "r") as other, other.space(WIDE) as reader:
        right(reader, range(flushed))
        assert reader.damaged() == {}
    for call in (
        lambda: store.put_collection("c", [key(0)] * 30_000),
        lambda: space.put_blob("blob", bytes(1_500_000)),
        lambda: space.delete([key(0)]),  # what waits would have to be published first
        space.compact,
    ):
        with pytest.raises(OutOfSpaceError):
            call()
    ballast.unlink()
    space.flush()
    with actcache.open(url, "r") as other, other.space(WIDE) as reader:
        right(reader, held)
        assert len(reader) == len(held)
    store.close()


@each()
def test_a_disk_that_is_too_full_to_compact(kind, small_disk):
    """Compaction needs room for what it writes; without, nothing changes, and with, space is given back."""
    url = kind.url(small_disk / "store")
    with actcache.open(url) as store, store.space(WIDE) as space:
        for number in range(0, 24, 6):
            space.put([key(n) for n in range(number, number + 6)], [large(n) for n in range(number, number + 6)])
            space.flush()
        space.delete([key(n) for n in range(12, 18)])
        held = [*range(12), *range(18, 24)]
        ballast = small_disk / "ballast"
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        with contextlib.suppress(OutOfSpaceError):  # it may find room in what it has
            space.compact(waste=0.1, grace=0.0)
        right(space, held)
        with actcache.open(url, "r") as other, other.space(WIDE) as reader:
            right(reader, held)
            assert len(reader) == len(held)
        ballast.unlink()
        before = sum(path.stat().st_size for path in (small_disk / "store").rglob("*") if path.is_file())
        for _ in range(2):
            space.compact(waste=0.1, grace=0.0)
        right(space, held)
        after = sum(path.stat().st_size for path in (small_disk / "store").rglob("*") if path.is_file())
        assert after < before
        assert space.verify().entries == len(held)


@each()
def test_closing_on_a_full_disk(kind, small_disk):
    """It says so, ends, and every space of the store gets its turn."""
    store = actcache.open(kind.url(small_disk / "store"))
    one, two = store.space(WIDE), store.space(recipe())
    put(two, range(5))
    for number in range(60):
        one.put([key(number)], [large(number)])
    with pytest.raises(OutOfSpaceError):
        store.close()
    with actcache.open(kind.url(small_disk / "store"), "r") as again, again.space(recipe()) as reader:
        check(reader, dict.fromkeys(range(5), 0), range(6))
    with actcache.open(kind.url(small_disk / "store")) as again, again.space(WIDE) as writer:
        assert len(writer) == 0
