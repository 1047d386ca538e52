"""The index: tables against dictionaries, files against damage, and what ten million entries would cost."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

import actcache
from actcache.errors import FormatError, FormatVersionError
from actcache.format import safetensors as tensorfile
from actcache.format.keys import join_keys, split_keys
from actcache.io.loops import Lookup, LookupTable
from actcache.segments.index import Table
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.segment import Access, Segment
from tests.support import check, key, make_store, put, recipe, run, segment_files
from tests.support.waiting import calls

COLUMNS = {"values": ("<f4", (2,))}


def a_segment(name: str, tokens: int) -> Segment:
    from actcache.backend import Extent

    extents = {
        "values": Extent("", 4096, "<f4", (tokens, 2)),
        "keys": Extent("", 0, "|u1", (1, 32)),
        "offsets": Extent("", 0, "<i8", (2,)),
        "checksums": Extent("", 0, "<u8", (1,)),
    }
    return Segment(nowhere(name), name, extents, 1, tokens=tokens)


def nowhere(name: str) -> LocalSegment:
    return LocalSegment(Path(f"/nowhere/{name}.h5"))


def inside(folder: Path) -> Access:
    """The segments of a space."""
    return lambda name: LocalSegment(folder / "segments" / f"{name}.h5")


def a_table(contents: dict[str, list[bytes]]) -> Table:
    """A table over segments with these names and keys; entry i of a segment is row 3 i, and has i + 1 tokens.

    All have their origin where they lie.
    """
    tables = []
    for name, keys in contents.items():
        prefix, rest = split_keys(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32))
        numbers = np.arange(len(keys))
        zeros = np.zeros(len(keys), "u4")
        arrays = (zeros, zeros, numbers.astype("u4"), numbers * 3, (numbers + 1).astype("u4"))
        tables.append(Table((a_segment(name, 100),), (name,), prefix, rest, *arrays, numbers.astype("u8")))
    return Table.merged(tables, frozenset(contents))


#: Keys from a small alphabet, so that prefixes are equal and rests differ, and whole keys are doubled.
_KEYS = st.builds(lambda head, tail: bytes([head]) * 8 + bytes([tail]) * 24, st.integers(0, 2), st.integers(0, 2))
_CONTENTS = st.dictionaries(st.sampled_from("abcdef"), st.lists(_KEYS, max_size=6, unique=True), max_size=5)


def oracle(contents, wanted, dead=frozenset(), gone=frozenset()):
    """What is served: of all live copies the one in the segment whose name is last."""
    for name in sorted(contents, reverse=True):
        if name not in gone and wanted in contents[name]:
            entry = contents[name].index(wanted)
            if (name, entry) not in dead:
                return name, entry
    return None


def find(table, prefix, rest, alive=None):
    """The position of each key's served copy in a table, -1 where it has none: entry i of the table is row i."""
    count = len(table)
    zeros, ones = np.zeros(count, np.uint32), np.ones(count, np.uint32)
    arrays = (table.prefix, table.rest, zeros, zeros, ones, np.arange(count), table.checksum)
    one = np.zeros(1, np.int64)
    lookup = Lookup([LookupTable(*arrays, alive, one, one)], np.array([count]), one)
    found = lookup.locate(join_keys(prefix, rest))
    assert not found.outside
    return np.where(found.tokens, found.row, -1)


def served(table, position):
    return (table.segments[table.segment[position]].name, int(table.entry[position])) if position >= 0 else None


@given(_CONTENTS, st.lists(_KEYS, min_size=1, max_size=8), st.data())
def test_find_against_a_dictionary(contents, wanted, data):
    table = a_table(contents)
    assert len(table) == sum(map(len, contents.values()))
    places = [(name, entry) for name, keys in contents.items() for entry in range(len(keys))]
    dead = set(data.draw(st.lists(st.sampled_from(places), unique=True))) if places else set()
    alive = np.array([served(table, i) not in dead for i in range(len(table))], bool)
    prefix, rest = split_keys(np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, 32))
    for mask, without in ((None, frozenset()), (alive, dead)):
        found = find(table, prefix, rest, mask)
        assert [served(table, i) for i in found] == [oracle(contents, k, without) for k in wanted]
    assert find(table, prefix[:0], rest[:0]).shape == (0,)
    one = wanted[:1]
    copies = {served(table, i) for i in table.copies(prefix[:1], rest[:1])}
    assert copies == {(name, keys.index(one[0])) for name, keys in contents.items() if one[0] in keys}


@given(_CONTENTS, _CONTENTS, st.sets(st.sampled_from("abcdefghijkl")))
def test_merging_is_making_anew(first, second, keep):
    """Of two disjoint tables, keeping some segments: the same as a table over those alone."""
    second = {chr(ord(name) + 6): keys for name, keys in second.items()}
    merged = Table.merged([a_table(first), a_table(second)], frozenset(keep))
    expected = {name: keys for name, keys in {**first, **second}.items() if name in keep}
    assert {segment.name for segment in merged.segments} == set(expected)
    assert len(merged) == sum(map(len, expected.values()))
    assert (np.diff(merged.prefix.astype(object)) >= 0).all()
    for wanted in {k for keys in [*first.values(), *second.values()] for k in keys}:
        prefix, rest = split_keys(np.frombuffer(wanted, np.uint8).reshape(1, 32))
        position = find(merged, prefix, rest)[0]
        assert served(merged, position) == oracle(expected, wanted)
        if position >= 0:
            entry = int(merged.entry[position])
            assert (merged.row[position], merged.tokens[position], merged.checksum[position]) == (
                3 * entry,
                entry + 1,
                entry,
            )


def test_the_copy_of_the_later_origin_is_served_wherever_it_lies():
    """A compacted segment has a later name than its sources, and its entries are as old as they were there."""
    wanted, other = bytes(32), bytes([1]) * 32
    prefix, rest = split_keys(np.frombuffer(wanted + other, np.uint8).reshape(-1, 32))
    zeros, numbers = np.zeros(2, "u4"), np.arange(2)
    arrays = (zeros, zeros, np.array([7, 9], "u4"), numbers * 3, (numbers + 1).astype("u4"), numbers.astype("u8"))
    compacted = Table((a_segment("d", 100),), ("a",), prefix, rest, *arrays)
    for tables in ([compacted, a_table({"b": [wanted]})], [a_table({"b": [wanted]}), compacted]):
        table = Table.merged(tables, frozenset("bd"))
        found = find(table, prefix, rest)
        assert [table.segments[table.segment[i]].name for i in found] == ["b", "d"]
        assert [(table.origins[table.origin[i]], table.entry[i]) for i in found] == [("b", 0), ("a", 9)]
        assert len(table.copies(prefix[:1], rest[:1])) == 2
        without = Table.merged([table], frozenset("d"))
        assert (without.origins, len(without)) == (("a",), 2)


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=20))
def test_keys_split_and_join(keys):
    array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    prefix, rest = split_keys(array)
    np.testing.assert_array_equal(join_keys(prefix, rest), array)
    # The order of prefixes is the order of the bytes.
    assert [keys[i][:8] for i in np.argsort(prefix, kind="stable")] == sorted(k[:8] for k in keys)


def test_a_file_holds_the_table(tmp_path):
    table = a_table({"000000000001-0123456789abcdef": [bytes([i]) * 32 for i in range(9)]})
    table.write(tmp_path / "one.index")
    again = Table.open(tmp_path / "one.index", nowhere, COLUMNS)
    for name in ("prefix", "rest", "segment", "origin", "entry", "row", "tokens", "checksum"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert again.segments == table.segments
    assert again.origins == table.origins == ("000000000001-0123456789abcdef",)
    # It is a safetensors file for anybody else.
    arrays = safetensors.numpy.load_file(tmp_path / "one.index")
    np.testing.assert_array_equal(arrays["rest"], table.rest)
    assert (tmp_path / "one.index").stat().st_size < 64 * 9 + 2000
    empty = Table.of_segments([])
    empty.write(tmp_path / "empty.index")
    assert len(Table.open(tmp_path / "empty.index", nowhere, COLUMNS)) == 0


@pytest.fixture
def indexed(tmp_path):
    """A store of 20 documents in 4 segments with an index; the folder of its space."""
    folder = make_store(tmp_path / "store", range(20), segments=4)
    assert len(list((folder / "index").iterdir())) == 1
    return folder


HELD = dict.fromkeys(range(20), 0)


def read_all(folder, **options):
    with actcache.open(folder.parent.parent, "r", **options) as store, store.space(recipe()) as space:
        check(space, HELD, range(25))
        assert len(space) == 20
        return bool(space._driver.catalog._index.tables)


def test_the_index_is_used(indexed):
    assert read_all(indexed)
    shutil.rmtree(indexed / "index")
    assert not read_all(indexed)
    with actcache.open(indexed.parent.parent) as store, store.space(recipe()):
        pass
    assert read_all(indexed), "a writer makes it anew when it closes"


@pytest.mark.filterwarnings("ignore")
def test_an_index_with_a_damaged_header_is_passed_over(indexed):
    (path,) = (indexed / "index").iterdir()
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    for position in range(0, 8 + length, 3):
        for flip in (1, 0x80):
            path.write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
            try:
                Table.open(path, inside(indexed), {**COLUMNS, **_columns()})
            except FormatError:
                continue
            # What still opens says the same, but for the blanks at the end.
            assert position >= good.rindex(b"}", 0, 8 + length) or read_all(indexed), position
    for position in range(0, 8 + length, 101):
        path.write_bytes(good[:position] + bytes([good[position] ^ 4]) + good[position + 1 :])
        read_all(indexed)


def _columns():
    from actcache.entries.entry import columns_of

    return columns_of(recipe())


def test_a_truncated_index_is_passed_over(indexed):
    (path,) = (indexed / "index").iterdir()
    good = path.read_bytes()
    for size in [*range(16), *range(16, len(good), 97), len(good) - 1]:
        path.write_bytes(good[:size])
        with pytest.raises(FormatError):
            Table.open(path, inside(indexed), _columns())
        if size % 5 == 0:
            assert not read_all(indexed)


def _with_metadata(path, good, **changes):
    """The index with another header, whose own checksum is right."""
    import xxhash

    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    for name, value in changes.items():
        if name == "header":
            header.update(value)
        else:
            header["__metadata__"][name] = value
    data = (header["__metadata__"]["segments"] + header["__metadata__"]["origins"]).encode()
    texts = data + header["__metadata__"].get("replaces", "").encode()
    header["__metadata__"]["texts_checksum"] = xxhash.xxh3_64_hexdigest(texts)
    for name in ("segment", "origin", "entry"):
        begin, end = header[name]["data_offsets"]
        data += good[8 + length + begin : 8 + length + end]
    header["__metadata__"]["checksum"] = xxhash.xxh3_64_hexdigest(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])


@pytest.mark.parametrize(
    "segments",
    [
        "",
        "null",
        "5",
        "{}",
        "[5]",
        '[{"name": "x"}]',
        "[" * 100_000,
        '[{"name": "a.h5", "nbytes": Infinity, "extents": {}}]',
        '[{"name": "../../../etc/passwd", "nbytes": 1, "extents": {"values": ["", 0, "<f4", [1e999, 8]]}}]',
        '[{"name": "a.h5", "nbytes": 1, "extents": {"values": ["../../x", 0, "<f4", [1, 8]]}}]',
        "[]",
    ],
    ids=lambda text: text[:20],
)
def test_an_index_that_lies_about_segments(indexed, segments):
    (path,) = (indexed / "index").iterdir()
    _with_metadata(path, path.read_bytes(), segments=segments)
    with pytest.raises(FormatError):
        Table.open(path, inside(indexed), _columns())
    assert not read_all(indexed)


@pytest.mark.parametrize(
    "origins",
    ["", "null", "5", "[]", "[" * 100_000, "[5]", '["../../x"]', '["x"]', '{"a": 1}', "[Infinity]", "[[]]"],
    ids=lambda text: text[:20],
)
def test_an_index_that_lies_about_origins(indexed, origins):
    (path,) = (indexed / "index").iterdir()
    _with_metadata(path, path.read_bytes(), origins=origins)
    with pytest.raises(FormatError):
        Table.open(path, inside(indexed), _columns())
    assert not read_all(indexed)


@pytest.mark.parametrize(
    "lie",
    [
        {"prefix": {"dtype": "U64", "shape": [20], "data_offsets": [0, 10**12]}},
        {"prefix": {"dtype": "U64", "shape": [10**18], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "U64", "shape": [-20], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "F64", "shape": [20], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": ["U64"], "shape": [20], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "U64", "shape": "20", "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "U64", "shape": [20.0], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "U64", "shape": [True], "data_offsets": [0, 8]}},
        {"prefix": {"dtype": "U64", "shape": [2, 10], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "I64", "shape": [20], "data_offsets": [0, 160]}},
        {"prefix": {"dtype": "U64", "shape": [20], "data_offsets": [160, 0]}},
        {"prefix": {"dtype": "U64", "shape": [20], "data_offsets": [-160, 0]}},
        {"prefix": {"dtype": "U64", "shape": [20]}},
        {"prefix": {"dtype": "U64", "shape": [], "data_offsets": [0, 8]}},
        {"entry": {"dtype": "U32", "shape": [], "data_offsets": [0, 4]}},
        {"entry": {"dtype": "U32", "shape": [0], "data_offsets": [0, 0]}},
        {"prefix": 5},
        {"__metadata__": 5},
        {"__metadata__": {}},
    ],
    ids=str,
)
def test_an_index_that_lies_about_its_arrays(indexed, lie):
    (path,) = (indexed / "index").iterdir()
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length]) | lie
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
    with pytest.raises(FormatError):
        Table.open(path, inside(indexed), _columns())
    assert not read_all(indexed)


def test_rows_outside_of_their_segments_are_absent(indexed, caplog):
    """An index whose numbers lie serves nothing wrong, and reads nowhere else."""
    (path,) = (indexed / "index").iterdir()
    metadata, arrays = tensorfile.mapped(path)
    for name, lie in (("row", 10**9), ("row", -1), ("row", 2**62), ("tokens", 2**32 - 1), ("tokens", 0)):
        bad = {n: np.array(array) for n, array in arrays.items()}
        bad[name][:] = lie
        path.unlink()
        tensorfile.write(path, bad, metadata)
        for options in ({}, {"mapped": False}):
            with actcache.open(indexed.parent.parent, "r", **options) as store, store.space(recipe()) as space:
                assert space.get([key(n) for n in range(20)]) == [None] * 20
    for name, lie in (("row", 1), ("checksum", 1)):
        bad = {n: np.array(array) for n, array in arrays.items()}
        bad[name] += np.array(lie).astype(bad[name].dtype)
        path.unlink()
        tensorfile.write(path, bad, metadata)
        with actcache.open(indexed.parent.parent, "r") as store, store.space(recipe()) as space:
            for n in range(20):
                try:
                    check(space, HELD if space.get([key(n)])[0] is not None else {}, [n])
                except actcache.errors.CorruptEntryError:
                    continue


def test_an_index_with_wrong_numbers_of_entries_is_passed_over(indexed):
    """Tombstones name entries by number: a wrong one would serve what was deleted, and delete what was not."""
    with actcache.open(indexed.parent.parent) as store, store.space(recipe()) as space:
        space.delete([key(3), key(12)])
    (path,) = (indexed / "index").iterdir()
    metadata, arrays = tensorfile.mapped(path)
    for name in ("entry", "segment", "origin"):
        for i in range(20):
            bad = {n: np.array(array) for n, array in arrays.items()}
            bad[name][i] ^= 1
            path.unlink()
            tensorfile.write(path, bad, metadata)
            with actcache.open(indexed.parent.parent, "r") as store, store.space(recipe()) as space:
                check(space, {n: 0 for n in range(20) if n not in (3, 12)}, range(20))
                assert not space._driver.catalog._index.tables


def test_newer_versions(indexed):
    (path,) = (indexed / "index").iterdir()
    _with_metadata(path, path.read_bytes(), actcache_index="2")
    with pytest.raises(FormatVersionError):
        Table.open(path, inside(indexed), _columns())
    assert not read_all(indexed), "the segments have all that it says"
    _with_metadata(path, path.read_bytes(), actcache_index="x")
    with pytest.raises(FormatError):
        Table.open(path, inside(indexed), _columns())


def test_an_index_of_segments_that_are_gone(indexed):
    """A segment that is removed takes its entries along, whatever the index says."""
    segment_files(indexed)[1].unlink()
    with actcache.open(indexed.parent.parent, "r") as store, store.space(recipe()) as space:
        assert bool(space._driver.catalog._index.tables)
        check(space, {n: 0 for n in range(20) if n not in range(5, 10)}, range(20))
        assert len(space) == 15


def test_a_truncated_segment_that_the_index_covers(indexed):
    """The index finds its entries without opening it; they must be absent or refused, never read beyond the end."""
    victim = segment_files(indexed)[2]
    os.truncate(victim, victim.stat().st_size // 2)
    for options in ({"mapped": True}, {"mapped": False}):
        with actcache.open(indexed.parent.parent, "r", **options) as store, store.space(recipe()) as space:
            assert list(space.damaged()) == [victim.stem]
            assert "truncated" in space.damaged()[victim.stem]
            check(space, {n: 0 for n in range(20) if n not in range(10, 15)}, range(20))


def test_a_foreign_file_with_the_highest_name(indexed):
    """Once a flush put entries behind a name that was too long to be listed; now it says so, and keeps them."""
    foreign = indexed / "segments" / "ffffffffffff-0123456789abcdef.h5"
    foreign.write_bytes(b"not ours")
    with actcache.open(indexed.parent.parent) as store, store.space(recipe()) as space:
        put(space, [50])
        with pytest.raises(FormatError, match="move it away"):
            space.flush()
        check(space, {**HELD, 50: 0}, [1, 50])
        foreign.unlink()
        space.flush()
        assert all(len(path.stem) == 29 for path in segment_files(indexed))
    with actcache.open(indexed.parent.parent, "r") as store, store.space(recipe()) as space:
        check(space, {**HELD, 50: 0}, [1, 50])


def test_snapshots_with_tombstones_and_an_index(indexed):
    """Deletions are found in the index, in what it does not cover, and after it was made again."""
    held = dict(HELD)
    for version in range(1, 5):
        with actcache.open(indexed.parent.parent) as store, store.space(recipe()) as space:
            deleted = [n for n in held if n % 5 == version]
            assert space.delete([key(n) for n in deleted]) == len(deleted)
            held = {n: v for n, v in held.items() if n not in deleted}
            put(space, range(version, 20, 4), version=version, overwrite=True)
            held |= dict.fromkeys(range(version, 20, 4), version)
            check(space, held, range(25))
        with actcache.open(indexed.parent.parent, "r") as store, store.space(recipe()) as space:
            check(space, held, range(25))
            assert sorted(space.keys()) == sorted(key(n) for n in held)
            assert space.usage().entries == len(held)


def test_an_index_that_another_process_writes_meanwhile(indexed):
    root = indexed.parent.parent
    code = """
import sys
import actcache
from tests.support import *
with actcache.open(sys.argv[1]) as store, store.space(recipe()) as space:
    put(space, range(20, 30))
    space.flush()
    put(space, [4], version=1, overwrite=True)
"""
    reader = actcache.open(root, "r").space(recipe())
    check(reader, HELD, range(30))
    (before,) = os.listdir(indexed / "index")
    run(code, root)
    (after,) = os.listdir(indexed / "index")
    assert after != before, "the other process replaced the index under the reader"
    check(reader, HELD, range(30))
    reader.refresh()
    check(reader, {**dict.fromkeys(range(30), 0), 4: 1}, range(32))
    reader.close()


def test_an_index_is_due_after_so_many_segments(tmp_path):
    """Also for a writer that never closes: without an index each of its segments has to be opened."""
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        for number in range(70):
            put(space, [number])
            space.flush()
        with actcache.open(tmp_path / "s", "r") as other, other.space(recipe()) as reader:
            check(reader, dict.fromkeys(range(70), 0), range(72))
            assert len(reader._driver.catalog.covered()) > 60
            assert len(reader._driver.catalog._recent.segments) < 10


def test_many_dead_copies_of_one_key(tmp_path):
    with actcache.open(tmp_path / "s") as store, store.space(recipe()) as space:
        for version in range(40):
            put(space, [7], version=version, overwrite=True)
            space.flush()
        check(space, {7: 39}, [7])
        assert space.delete([key(7)]) == 1
        check(space, {}, [7])
        put(space, [7], version=5)
        space.flush()
        check(space, {7: 5}, [7])


BIG = 2_000_000


@pytest.fixture(scope="module")
def big_index(tmp_path_factory):
    """A table of two million entries, written as an index file."""
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 256, (BIG, 32), np.uint8)
    numbers = np.arange(BIG)
    prefix, rest = split_keys(keys)
    segment = a_segment("000000000001-0123456789abcdef", BIG)
    zeros, ones = np.zeros(BIG, "u4"), np.ones(BIG, "u4")
    part = Table((segment,), (segment.name,), prefix, rest, zeros, zeros, numbers.astype("u4"), numbers, ones, prefix)
    path = tmp_path_factory.mktemp("big") / "big.index"
    Table.merged([part], frozenset([segment.name])).write(path)
    np.save(path.with_suffix(".npy"), keys[:100_000])
    yield path
    path.unlink()


@pytest.mark.processes
def test_two_million_entries(big_index):
    """They are opened and looked up without a step for each, and cost no memory of their own."""
    code = """
import sys, tracemalloc
from pathlib import Path
import numpy as np, psutil
from actcache.io.loops import Lookup
from actcache.segments.index import Table
from tests.segments.test_index import BIG, COLUMNS, nowhere
from tests.support.waiting import calls
path = Path(sys.argv[1])
private = lambda: (lambda m: m.rss - m.shared)(psutil.Process().memory_info())
keys = np.load(path.with_suffix(".npy"))
before, tables = private(), []
opened = calls(lambda: tables.append(Table.open(path, nowhere, COLUMNS)))
memory, table = private() - before, tables[0]
assert len(table) == 2_000_000
one = np.zeros(1, np.int64)
lookup = Lookup([table.searchable(None, one, one)], np.array([BIG]), one)
lookup.locate(keys)
found = calls(lambda: lookup.locate(keys))
tracemalloc.start()
located = lookup.locate(keys[:1000])
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()
assert (located.row == np.arange(1000)).all()
print(opened, found, peak, memory / len(table), (private() - before) / len(table))
"""
    opened, found, peak, opening_bytes, all_bytes = map(float, run(code, big_index).split())
    assert opened < 10_000  # of two million entries
    assert found < 1000  # of a hundred thousand keys
    assert peak < BIG / 2  # for a thousand keys: no pass over all
    assert opening_bytes < 8
    assert all_bytes < 64


@pytest.mark.processes
def test_lookups_of_absent_keys_and_of_equal_prefixes(big_index):
    table = Table.open(big_index, nowhere, COLUMNS)
    keys = np.load(big_index.with_suffix(".npy"))[:5000].copy()
    keys[:, 31] ^= 1  # the same prefixes, other keys
    found = []
    assert calls(lambda: found.append(find(table, *split_keys(keys)))) < 1000
    assert (found[0] == -1).all()
