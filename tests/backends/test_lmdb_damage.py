"""Damaged data files: an error, a miss or the right numbers, in a process of its own, so that a signal fails the test.

What a damaged page can still do inside of the library is said in docs/format.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import actcache
from tests.support import put, recipe, run

pytestmark = pytest.mark.processes

READ = """
import random, sys
import numpy as np
from pathlib import Path
import actcache
from actcache.errors import ActcacheError, CorruptEntryError, FormatError
from tests.support import key, recipe, rows

VERSIONS = {n: [0] for n in range(60)} | {n: [0, 1] for n in range(10, 20)}
DELETED = range(20, 25)


def read(root, counts):
    try:
        with actcache.open(root, "r") as store, store.space(recipe()) as space:
            space.usage(), space.damaged()
            try:
                space.keys()
            except ActcacheError:
                pass
            for group in (range(70), *([n] for n in range(0, 70, 7))):
                try:
                    entries = space.get([key(n) for n in group])
                except ActcacheError as error:
                    counts[type(error).__name__] = counts.get(type(error).__name__, 0) + 1
                    continue
                for n, entry in zip(group, entries, strict=True):
                    if entry is None:
                        counts["miss"] = counts.get("miss", 0) + 1
                        continue
                    assert n < 60 and n not in DELETED, n
                    assert any(np.array_equal(entry.activations, rows(n, v)) for v in VERSIONS[n][-1:]), n
                    counts["right"] = counts.get("right", 0) + 1
    except ActcacheError as error:
        counts["refused"] = counts.get("refused", 0) + 1
"""

TRUNCATED = (
    READ
    + """
root, data = sys.argv[1], Path(sys.argv[2])
whole = data.read_bytes()
counts = {}
for size in [0, 1, 100, 4095, *range(4096, len(whole), 4096), len(whole) - 1]:
    data.write_bytes(whole[:size])
    print(size, flush=True)
    before = counts.get("refused", 0)
    read(root, counts)
    assert counts.get("refused", 0) == before + 1, f"{size} bytes of {len(whole)} were not refused"
data.write_bytes(whole)
counts.clear()
read(root, counts)
assert counts["right"] > 60 and set(counts) == {"right", "miss"}, counts
"""
)

UNDER_A_READER = (
    READ
    + """
root, data = sys.argv[1], Path(sys.argv[2])
store = actcache.open(root, "r")
space = store.space(recipe())
assert all(entry is not None for entry in space.get([key(n) for n in range(20)]))
size = data.stat().st_size
with open(data, "r+b") as file:
    for cut in (1, 4096, size // 2, size - 8192, size - 4096, size):
        file.truncate(size - cut)
        keys = [key(n) for n in range(20)]
        calls = (lambda: space.get(keys), space.refresh, lambda: list(space._driver.snapshot().keys()))
        for call in (*calls, lambda: space.read_ahead(keys)):
            try:
                call()
                raise AssertionError("a truncated file was not noticed")
            except (CorruptEntryError, FormatError):
                pass
"""
)

METAS = (
    READ
    + """
root, data = sys.argv[1], Path(sys.argv[2])
whole = data.read_bytes()
rng = random.Random(5)
counts = {}
for number in range(int(sys.argv[3])):
    damaged = bytearray(whole)
    page = rng.randrange(2) * 4096
    at, length = page + rng.randrange(0, 152), rng.choice([1, 2, 4, 8, 152, 4096])
    fill = rng.choice([b"\\0", b"\\xff", None])
    for i in range(at, min(at + length, page + 4096)):
        damaged[i] = rng.randrange(256) if fill is None else fill[0]
    data.write_bytes(damaged)
    print(number, at, length, fill, flush=True)
    read(root, counts)
print(counts)
"""
)

ENTRIES = (
    READ
    + """
root, data = sys.argv[1], Path(sys.argv[2])
whole = data.read_bytes()
rng = random.Random(int(sys.argv[3]))
pages = [i for i in range(2, len(whole) // 4096) if whole[i * 4096 + 10] & 4]  # those of entries
trees = [i for i in range(2, len(whole) // 4096) if i not in pages]
counts = {}
for number in range(150):
    damaged = bytearray(whole)
    page = rng.choice(pages) * 4096
    match rng.randrange(4):
        case 0:
            damaged[page + rng.randrange(4096)] ^= 1 << rng.randrange(8)
        case 1:
            at = page + rng.randrange(16, 4096)
            length = rng.choice([1, 8, 64, 512])
            damaged[at : at + length] = rng.randbytes(len(damaged[at : at + length]))
        case 2:  # another entry's page
            other = rng.choice(pages) * 4096
            damaged[page : page + 4096] = whole[other : other + 4096]
        case 3:  # keys and heads in the B-tree, which may be old pages, but not its structure
            name = key(rng.randrange(25, 60))
            places = [at for i in trees if (at := whole.find(name, i * 4096, i * 4096 + 4096)) >= 0]
            damaged[rng.choice(places) + rng.randrange(88)] ^= 1 << rng.randrange(8)
    data.write_bytes(damaged)
    print(number, page, flush=True)
    read(root, counts)
print(counts)
"""
)


@pytest.fixture
def store(tmp_path):
    root = tmp_path / "store"
    with actcache.open(f"lmdb:{root}") as made, made.space(recipe()) as space:
        put(space, range(60))
        space.flush()
        put(space, range(10, 20), version=1, overwrite=True)
        space.flush()
        space.delete([actcache.document_key(f"document {n}") for n in range(20, 25)])
    return root


def data_file(root: Path) -> Path:
    return next(root.glob("spaces/*/lmdb/*/data.mdb"))


def test_every_truncation_is_refused(store):
    run(TRUNCATED, store, data_file(store), timeout=200)


def test_a_file_that_is_truncated_under_a_reader(store):
    run(UNDER_A_READER, store, data_file(store))


@pytest.mark.parametrize("count", [80, pytest.param(250, marks=pytest.mark.long)])
def test_damaged_meta_pages(store, count):
    run(METAS, store, data_file(store), count, timeout=200)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))])
def test_damaged_entries(store, seed):
    run(ENTRIES, store, data_file(store), seed, timeout=200)


def test_a_damaged_head_is_a_miss_that_a_put_mends(store, caplog):
    data = data_file(store)
    content = bytearray(data.read_bytes())
    name = actcache.document_key("document 3")
    places = [i for i in range(len(content)) if content[i : i + 32] == name]
    for place in places:
        content[place + 40] ^= 1  # of the entry's number, in a head; elsewhere in the header of an entry
    data.write_bytes(content)
    with actcache.open(f"lmdb:{store}") as opened, opened.space(recipe()) as space:
        assert name not in space
        assert put(space, [3]) == 1
        space.flush()
        assert name in space
        assert len(space) == 55 == space.usage().entries


def test_a_file_of_something_else(store):
    data = data_file(store)
    for content in (b"", b"text", bytes(1 << 16), data.read_bytes()[4096:]):
        data.write_bytes(content)
        with pytest.raises(actcache.errors.FormatError):
            actcache.open(f"lmdb:{store}").space(recipe())
    shutil.rmtree(data.parent)
    data.parent.write_text("a file")
    with pytest.raises(actcache.errors.StoreError):
        actcache.open(f"lmdb:{store}").space(recipe())
