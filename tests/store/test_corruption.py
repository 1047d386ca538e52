"""Random damage to any file of a store: right numbers, a miss, or an error of ours. Never a hang, nor much memory.

Where the core reads, never a signal either.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

import actcache
from tests.support import check, compact, damage, key, put, recipe, run, stored_as
from tests.support.backends import each

pytestmark = pytest.mark.processes

_GOLDEN = {}


@pytest.fixture
def golden(kind, tmp_path_factory):
    """The store that is damaged, made once a backend."""
    if kind.name not in _GOLDEN:
        _GOLDEN[kind.name] = tmp_path_factory.mktemp("golden") / "store"
        damage.make(kind, _GOLDEN[kind.name])
    return _GOLDEN[kind.name]


@pytest.fixture
def work():
    """A folder in memory: thousands of small files are written and removed."""
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    yield Path(folder)
    shutil.rmtree(folder)


def examine(kind, golden, work, first, last):
    """Damages first..last-1, each in a process of its own: a mapping that goes wrong is a signal there."""
    code = "import sys; from tests.support.damage import main; main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))"
    out = run(code, kind.name, golden, work, first, last, timeout=60 + last - first)
    return Counter(json.loads(out.splitlines()[-1]))


@pytest.mark.timeout(250)
@each(everyday=("safetensors", "lmdb"))
@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        ("int8+zstd", 15),
        *(pytest.param(dtype, 150, marks=pytest.mark.long) for dtype in ("int8", "float16+zstd", "int8+zstd")),
    ],
)
def test_damages_of_codecs(kind, work, dtype, count):
    with stored_as(dtype):
        damage.make(kind, work / "whole")
        counts = examine(kind, work / "whole", work / "work", 0, count)
    assert counts["right"] > count * len(kind.options) * 8


@pytest.mark.timeout(250)
@each(everyday=("hdf5", "safetensors", "lmdb"))  # a store of zarr has ten times the files, each read by the same code
@pytest.mark.parametrize(("first", "count"), [(20, 20), pytest.param(0, 150, marks=pytest.mark.long)])
def test_damages(kind, golden, work, first, count):
    """The everyday twenty have each kind of outcome among them."""
    counts = examine(kind, golden, work, first, first + count)
    # The damages did something, and mostly left the rest alone.
    ways = len(kind.options)
    assert counts["right"] > count * ways * 8
    assert counts["absent"] > count * ways * 20 / 150 or not kind.segmented
    assert counts["corrupt"] > count * ways / 150 or not kind.segmented
    assert counts["store refused"] + counts["space refused"] > count * ways * 5 / 150


@each(everyday=("hdf5",))
def test_a_damage_that_once_hung(kind, golden, work):
    """Seed 112, which had the HDF5 library look for a text for ever; the everyday ones do not come to it."""
    counts = examine(kind, golden, work, 112, 113)
    assert sum(counts.values()) > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
@each()
@pytest.mark.parametrize("part", range(4))
def test_many_damages(kind, golden, work, part):
    print(kind.name, examine(kind, golden, work, 1000 * (part + 1), 1000 * (part + 2)))


@each()
def test_the_store_that_is_damaged_is_whole(kind, golden):
    """The test of the test: without damage, all is read and right."""
    counts = Counter()
    damage.examine(kind, golden, "", counts)
    assert counts == {"right": len(kind.options) * (24 - len(damage.DELETED)), "absent": 0}


@each(segmented=True)
@pytest.mark.parametrize("array", ["origins", "origin", "origin_entries", "sources", "origins_checksum"])
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_origins_that_are_wrong_are_refused(kind, array, stride, tmp_path):
    """A tombstone names an entry by its origin: with another one, what was deleted would be served again."""
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        for numbers in (range(5), range(5, 10)):
            put(space, numbers)
            space.flush()
        compact(space)
        space.delete([key(3)])
        (segment,) = space._driver.catalog.described()
        extent = segment.extents[array]
        path = segment.file(array)
    data = bytearray(path.read_bytes())
    shutil.rmtree(tmp_path / "store/spaces" / recipe().fingerprint / "index", ignore_errors=True)
    for position in range(extent.offset, extent.offset + extent.nbytes, stride):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with actcache.open(kind.url(tmp_path / "store"), "r") as store, store.space(recipe()) as space:
            assert len(space.damaged()) == 1
            check(space, {}, range(10))
    path.write_bytes(data)
    with actcache.open(kind.url(tmp_path / "store"), "r") as store, store.space(recipe()) as space:
        check(space, {n: 0 for n in range(10) if n != 3}, range(10))
