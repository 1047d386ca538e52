"""A zarr segment as docs/format.md describes it, read and written by code that knows neither actcache nor its index.

The functions of the reader import zarr, NumPy and json alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import random
import shutil
import signal
import time
import tracemalloc

import numpy as np
import pytest
import xxhash
import zarr
from zarr.storage import LocalStore, MemoryStore

import actcache
from actcache.backend import Block
from actcache.errors import CorruptEntryError, FormatError
from actcache.io.files import Files
from actcache.segments.places.local_place import LocalSegment
from actcache.segments.segment import Segment
from actcache_zarr import _crc32c, backend
from tests.support import HIDDEN, check, ids, key, make_store, put, recipe, rows, run, segment_files

# --- an independent reader, from docs/format.md ----------------------------------------------------------------------

FIXED = ("offsets", "keys", "checksums", "extra_checksums")


def read_space(space):
    """Return {key: {array: rows}} of a space."""
    dead = {}
    for path in sorted((space / "tombstones").glob("*.json")):
        for segment, entries in json.loads(path.read_text())["deleted"].items():
            dead.setdefault(segment, set()).update(entries)
    held = {}
    for path in sorted((space / "segments").glob("*.zarr")):  # the last name is served
        group = zarr.open_group(path, mode="r")
        assert dict(group.attrs) == {"actcache_segment": "1", "space": space.name, "segment": path.stem}
        arrays = dict(group.arrays())
        offsets = arrays["offsets"][:].tolist()
        for i, name in enumerate(arrays["keys"][:]):
            if i not in dead.get(path.stem, ()):
                ragged = {n: a[offsets[i] : offsets[i + 1]] for n, a in arrays.items() if n not in FIXED}
                held[name.tobytes()] = ragged
    return held


# --- what actcache writes --------------------------------------------------------------------------------------------


def make(tmp_path, numbers=range(10), **options):
    make_store(f"zarr:{tmp_path}/store", numbers, **options)
    return folder_of(tmp_path / "store"), tmp_path / "store"


def folder_of(root):
    return root / "spaces" / recipe().fingerprint


def extents_in(path):
    """Where the arrays lie, as the backend tells the core."""
    return backend.layout(LocalSegment(path)).extents


def extent_bytes(segment, extent):
    """What the core reads."""
    data = (segment / extent.path).read_bytes()[extent.offset : extent.offset + extent.nbytes]
    return np.frombuffer(data, extent.dtype).reshape(extent.shape)


def block_of(lengths, hidden, dtype="<f2", seed=0, zeros=False):
    rng, tokens = np.random.default_rng(seed), int(sum(lengths))
    values = rng.integers(0, 256, (tokens, hidden * np.dtype(dtype).itemsize), np.uint8).view(dtype)
    return Block(
        rng.integers(0, 256, (len(lengths), 32), np.uint8),
        np.cumsum([0, *lengths]),
        rng.integers(0, 2**63, len(lengths), np.uint64),
        {"values": np.zeros_like(values) if zeros else values, "token_ids": np.arange(tokens, dtype=np.int32)},
    )


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    """zarr-python's own thread goes on when the wait for it was interrupted."""
    for kind in (LocalStore, MemoryStore):
        monkeypatch.setattr(kind, "set", slowly(kind.set))
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for seconds in (0.1, 0.3):  # in the midst of the group's metadata, and of an array's
            signal.setitimer(signal.ITIMER_REAL, seconds)
            with pytest.raises(KeyboardInterrupt):
                Files(tmp_path).publish(
                    tmp_path / "segment.zarr", lambda path: backend.write(path, block_of([3], 2), {})
                )
            time.sleep(0.6)
            assert list((tmp_path / "tmp").iterdir()) == []
    finally:
        signal.signal(signal.SIGALRM, before)


def slowly(write):
    async def later(*given):
        await asyncio.sleep(0.2)
        await write(*given)

    return later


def test_a_whole_space_read_by_others(tmp_path):
    """Overwritten and deleted entries, all-zero rows, optional arrays."""
    held = {}
    with actcache.open(f"zarr:{tmp_path}/store") as store, store.space(recipe(), segment_bytes=300) as space:
        for version in range(3):
            put(space, range(version, 20, 2), version=version, overwrite=True)
            held.update({key(n): rows(n, version) for n in range(version, 20, 2)})
            space.flush()
        gone = [key(n) for n in (3, 4, 18)]
        space.delete(gone)
        held = {name: values for name, values in held.items() if name not in gone}
        spans = np.arange(10).reshape(5, 2)
        space.put([key(100)], [np.zeros((5, HIDDEN), np.float32)], [np.arange(5)], spans=[spans])
    found = read_space(folder_of(tmp_path / "store"))
    np.testing.assert_array_equal(found[key(100)]["spans"], spans)
    held[key(100)] = np.zeros((5, HIDDEN))
    assert found.keys() == held.keys()
    for name, values in held.items():
        np.testing.assert_array_equal(found[name]["values"], values)
    np.testing.assert_array_equal(found[key(16)]["token_ids"], ids(16, 2))


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", np.uint16)]
)
@pytest.mark.parametrize("hidden", [1, 3, 7, 769])
@pytest.mark.parametrize("mapped", [True, False])
def test_odd_widths_and_entries_of_one_row(tmp_path, dtype, stored, hidden, mapped):
    here = recipe(dtype=dtype, hidden_size=hidden)
    rng = np.random.default_rng(hidden)
    documents = [rng.integers(-100, 100, (1 + n % 3 * (n % 5), hidden)).astype(np.float32) for n in range(40)]
    keys = [key(n) for n in range(40)]
    with actcache.open(f"zarr:{tmp_path}/store", mapped=mapped) as store, store.space(here) as space:
        for part in (slice(0, 13), slice(13, 40)):
            space.put(keys[part], documents[part])
            space.flush()
        for entry, document in zip(space.get(keys), documents, strict=True):
            np.testing.assert_array_equal(entry.activations, document)
    (first, _) = sorted((tmp_path / "store").glob("spaces/*/segments/*.zarr"))
    values = zarr.open_group(first, mode="r")["values"]
    assert values.dtype == stored
    layout = extents_in(first)
    assert {extent.offset for extent in layout.values()} == {0}
    np.testing.assert_array_equal(values[:], extent_bytes(first, layout["values"]))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("lengths", "hidden", "dtype"),
    [
        ([1], 1, "<f2"),
        ([300, 1, 999, 4], 768, "<f4"),  # 4 blocks, the last one padded
        ([2, 3], 300_001, "<f4"),  # rows larger than a block should be
        ([700_000, 1, 5], 3, "|u1"),  # token ids in blocks of their own
    ],
)
def test_shards_are_what_zarr_writes(tmp_path, lengths, hidden, dtype, zeros):
    """Byte for byte; and parts of them are read in blocks of about 1 MiB."""
    block = block_of(lengths, hidden, dtype, zeros=zeros)
    backend.write(tmp_path / "ours.zarr", block, {"a": "b"})
    ours = zarr.open_group(tmp_path / "ours.zarr", mode="r")
    theirs = zarr.create_group(tmp_path / "theirs.zarr", attributes={"a": "b"})
    layout = extents_in(tmp_path / "ours.zarr")
    assert layout.keys() == block.arrays().keys() == set(ours.array_keys())
    for name, array in block.arrays().items():
        mine = ours[name]
        with zarr.config.set({"array.write_empty_chunks": True}):
            theirs.create_array(
                name,
                data=array,
                chunks=mine.chunks,
                shards=mine.shards,
                compressors=None,
                filters=None,
                chunk_key_encoding={"name": "default", "separator": "."},
            )
        for file in (tmp_path / "ours.zarr" / name).iterdir():
            assert file.read_bytes() == (tmp_path / "theirs.zarr" / name / file.name).read_bytes()
        np.testing.assert_array_equal(extent_bytes(tmp_path / "ours.zarr", layout[name]), array)
        np.testing.assert_array_equal(mine[len(array) // 3 : -1].view("u1"), array[len(array) // 3 : -1].view("u1"))
        assert mine.chunks[0] * layout[name].row_bytes <= max(1 << 20, layout[name].row_bytes)
        assert mine.shards[0] - len(array) < max(2, mine.shards[0] // mine.chunks[0])
    assert extents_in(tmp_path / "theirs.zarr") == layout


def test_a_golden_store_of_version_1(tmp_path):
    """Bytes that a release wrote once stay readable: this store was made by hand, with zarr-python."""
    root, golden = tmp_path / "store", recipe()
    space = folder_of(root)
    (space / "segments").mkdir(parents=True)
    (root / "actcache.json").write_text('{"format": "actcache", "format_version": 1, "backend": "zarr"}\n')
    (space / "recipe.json").write_text(json.dumps({"format_version": 1, **golden.to_json()}))
    primes = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]
    numbers, sums = [3, 5, 8], []
    for n in numbers:
        c = xxhash.xxh3_64_intdigest(f"{golden.fingerprint} float32 {HIDDEN}".encode()) ^ 0x5851F42D4C957F2D
        for word, prime in zip([*np.frombuffer(key(n), "<u8").tolist(), len(rows(n))], primes, strict=True):
            c ^= word * prime % 2**64
        c = xxhash.xxh3_64_intdigest(ids(n).astype("<i4").tobytes(), c)
        sums.append(xxhash.xxh3_64_intdigest(rows(n).tobytes(), c))
    arrays = {
        "values": np.concatenate([rows(n) for n in numbers]),
        "offsets": np.cumsum([0, *(len(rows(n)) for n in numbers)]),
        "keys": np.frombuffer(b"".join(map(key, numbers)), np.uint8).reshape(-1, 32),
        "checksums": np.array(sums, np.uint64),
        "token_ids": np.concatenate([ids(n) for n in numbers]).astype("<i4"),
    }
    segment = f"{1:012x}-{'ab' * 8}"
    attributes = {"actcache_segment": "1", "space": golden.fingerprint, "segment": segment}
    group = zarr.create_group(space / "segments" / f"{segment}.zarr", attributes=attributes)
    for name, array in arrays.items():
        blocks = -(-len(array) // 2)
        made = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=(2, *array.shape[1:]),
            shards=(2 * blocks, *array.shape[1:]),
            compressors=None,
            chunk_key_encoding={"name": "default", "separator": "."},
            config={"write_empty_chunks": True},
        )
        made[...] = array
    for mapped in (True, False):
        with actcache.open(root, "r", mapped=mapped) as store, store.space(golden) as opened:
            assert opened.damaged() == {}
            check(opened, dict.fromkeys(numbers, 0), range(10))


# --- foreign and lying folders ----------------------------------------------------------------------------------------

ARRAYS = ["values", "offsets", "keys", "checksums", "token_ids"]
MISSING = np.iinfo(np.uint64).max


@pytest.fixture
def segment(tmp_path):
    """A segment whose arrays have several blocks each."""
    path = tmp_path / "segment.zarr"
    write_in_small_blocks(path, block_of([1, 2, 3, 1, 5], 3, "<f4"))
    return path


def write_in_small_blocks(path, block, most=16):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actcache_zarr._BLOCK_BYTES", most)
        backend.write(path, block, {"actcache_segment": "1", "space": "x", "segment": path.stem})


def opened(path):
    """The segment as the core opens it."""
    columns = {"values": ("<f4", (3,)), "token_ids": ("<i4", ())}
    return Segment.open(backend, LocalSegment(path), path.stem, "x", columns)


def shard(path):
    (found,) = path.glob("c.*")
    return found


def described(change):
    """A lie told by an array's zarr.json."""

    def lie(path):
        metadata = json.loads((path / "zarr.json").read_text())
        change(metadata)
        (path / "zarr.json").write_text(json.dumps(metadata))

    return lie


def within(*place, value):
    def change(metadata):
        for step in place[:-1]:
            metadata = metadata[step]
        metadata[place[-1]] = value

    return described(change)


def resized(change):
    def lie(path):
        data = shard(path).read_bytes()
        shard(path).write_bytes(change(data))

    return lie


def indexed(change):
    """Another index, with the right CRC."""

    def lie(path):
        codec = json.loads((path / "zarr.json").read_text())
        blocks = (
            codec["chunk_grid"]["configuration"]["chunk_shape"][0]
            // codec["codecs"][0]["configuration"]["chunk_shape"][0]
        )
        data = shard(path).read_bytes()
        index = np.frombuffer(data[-16 * blocks - 4 : -4], "<u8").reshape(-1, 2).copy()
        change(index)
        text = index.tobytes()
        shard(path).write_bytes(data[: -16 * blocks - 4] + text + _crc32c(text).to_bytes(4, "little"))

    return lie


def moved(name):
    """A link in the place of a part."""

    def lie(path):
        part = path / name if name else path
        part = shard(path) if name == "shard" else part
        target = path.parent.parent / "elsewhere"
        part.rename(target)
        part.symlink_to(target)

    return lie


def absolute(path):
    return shard(path).rename(path / "outside")


def pipe(path):
    place = shard(path)
    place.unlink()
    os.mkfifo(place)


def folder(path):
    place = shard(path)
    place.unlink()
    place.mkdir()


def huge(path):
    """Terabytes, sparse, that the metadata declare as well."""
    described(lambda metadata: metadata["shape"].__setitem__(0, 1 << 40))(path)
    within("chunk_grid", "configuration", "chunk_shape", 0, value=1 << 40)(path)
    within("codecs", 0, "configuration", "chunk_shape", 0, value=1 << 25)(path)
    metadata = json.loads((path / "zarr.json").read_text())
    width = np.dtype(metadata["data_type"]).itemsize * int(np.prod(metadata["shape"][1:]))
    with contextlib.suppress(OSError):  # more than the file system's files can have
        os.truncate(shard(path), (width << 40) + (16 << 15) + 4)


def swap(index):
    index[[0, 1]] = index[[1, 0]]


CODEC = ("codecs", 0, "configuration")
LIES = {
    "longer": described(lambda metadata: metadata["shape"].__setitem__(0, metadata["shape"][0] + 1000)),
    "huge": huge,
    "declared huge": within("shape", 0, value=1 << 62),
    "beyond huge": within("shape", 0, value=10**400),
    "empty": within("shape", 0, value=0),
    "negative": within("shape", 0, value=-1),
    "fraction": within("shape", 0, value=1.5),
    "true": within("shape", 0, value=True),
    "scalar": within("shape", value=[]),
    "no list": within("shape", value="12"),
    "other dtype": within("data_type", value="complex128"),
    "extension dtype": within("data_type", value={"name": "numpy.datetime64", "configuration": {}}),
    "version 2": within("zarr_format", value=2),
    "a group": within("node_type", value="group"),
    "other grid": within("chunk_grid", "name", value="rectilinear"),
    "many shards": within("chunk_grid", "configuration", "chunk_shape", 0, value=1),
    "blocks of nothing": within(*CODEC, "chunk_shape", 0, value=0),
    "other blocks": within(*CODEC, "chunk_shape", 0, value=7),
    "keys with slashes": within("chunk_key_encoding", "configuration", "separator", value="/"),
    "keys that lead away": within("chunk_key_encoding", "configuration", "separator", value="/../../"),
    "keys of version 2": within("chunk_key_encoding", "name", value="v2"),
    "no codec": within("codecs", value=[]),
    "two codecs": described(lambda metadata: metadata["codecs"].append({"name": "gzip"})),
    "no shard": within("codecs", value=[{"name": "bytes", "configuration": {"endian": "little"}}]),
    "compressed": described(lambda m: m["codecs"][0]["configuration"]["codecs"].append({"name": "zstd"})),
    "transposed": described(lambda m: m["codecs"][0]["configuration"]["codecs"].insert(0, {"name": "transpose"})),
    "index without a CRC": described(lambda m: m["codecs"][0]["configuration"]["index_codecs"].pop()),
    "index first": within(*CODEC, "index_location", value="start"),
    "transformed": within("storage_transformers", value=[{"name": "x"}]),
    "unknown member": within("must_be_known", value={"name": "x"}),
    "nested": lambda path: (path / "zarr.json").write_text("[" * 60000),
    "nested further": lambda path: (path / "zarr.json").write_text('{"a":' * 10000),
    "long": lambda path: (path / "zarr.json").write_text(" " * 70000 + "{}"),
    "a list": lambda path: (path / "zarr.json").write_text("[]"),
    "digits": lambda path: (path / "zarr.json").write_text("9" * 5000),
    "no text": lambda path: (path / "zarr.json").write_bytes(b"\xff\xfe{}"),
    "truncated": resized(lambda data: data[:-1]),
    "beheaded": resized(lambda data: data[1:]),
    "emptied": resized(lambda data: b""),
    "grown": resized(lambda data: data + b"\0"),
    "CRC": resized(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "index": resized(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
    "blocks swapped": indexed(swap),
    "block missing": indexed(lambda index: index.__setitem__(0, MISSING)),
    "block shared": indexed(lambda index: index.__setitem__((1, 0), 0)),
    "block far away": indexed(lambda index: index.__setitem__((0, 0), 1 << 63)),
    "no shard file": lambda path: shard(path).unlink(),
    "shard elsewhere": absolute,
    "no zarr.json": lambda path: (path / "zarr.json").unlink(),
    "no files": lambda path: [file.unlink() for file in path.iterdir()],
    "linked folder": moved(""),
    "linked shard": moved("shard"),
    "linked zarr.json": moved("zarr.json"),
    "pipe": pipe,
    "folder": folder,
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
    "a strange file": lambda path: (path.parent / "what is this").write_text("x"),
    "many names": lambda path: [(path.parent / f"n{i}").mkdir() for i in range(300)],
    "a name out of Unicode": lambda path: shutil.copytree(path, os.fsdecode(os.fsencode(path.parent) + b"/\xff")),
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("values", "offsets") else pytest.param(name, marks=pytest.mark.long) for name in ARRAYS],
)
@pytest.mark.parametrize("lie", LIES)
def test_lying_segments_are_refused(segment, lie, name):
    if (lie, name) == ("no files", "token_ids"):
        pytest.skip("entries may be without token ids; their checksums then fail")
    assert opened(segment).extents.keys() == set(ARRAYS)
    before = len(os.listdir("/proc/self/fd"))
    LIES[lie](segment / name)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            opened(segment)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", '{"zarr_format": 2, "node_type": "group"}', '{"zarr_format": 3}', "[" * 9999]
)
def test_what_is_no_group(segment, text):
    (segment / "zarr.json").write_text(text)
    with pytest.raises(FormatError):
        extents_in(segment)


def test_what_is_no_folder(segment, tmp_path):
    with pytest.raises(FileNotFoundError):
        extents_in(tmp_path / "nothing.zarr")
    (tmp_path / "file.zarr").write_text("x")
    with pytest.raises(FormatError, match="is a file"):
        extents_in(tmp_path / "file.zarr")
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(FormatError, match="missing"):
        extents_in(tmp_path / "empty.zarr")
    (tmp_path / "group.zarr").symlink_to(segment)  # a large segment may live on another disk
    assert extents_in(tmp_path / "group.zarr") == extents_in(segment)
    (segment / ".DS_Store").write_text("x")
    assert extents_in(segment).keys() == set(ARRAYS)


def nodes(value, place=()):
    yield place
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, member in members:
        yield from nodes(member, (*place, step))


STRANGE = [None, True, 0, -1, 1, 2, 3, 4, 1 << 63, 1e300, "", "x", "bytes", [], [1], {}, {"name": "bytes"}, [[]] * 9]


def test_metadata_that_are_wrong_somewhere(segment):
    """Each member replaced by each of many values: refused, or described by extents inside of their files."""
    for name in ("values", "keys"):
        good = json.loads((segment / name / "zarr.json").read_text())
        for place in nodes(good):
            for value in STRANGE:
                bad = copy.deepcopy(good)
                part = bad
                for step in place[:-1]:
                    part = part[step]
                if place:
                    part[place[-1]] = value
                (segment / name / "zarr.json").write_text(json.dumps(bad if place else value))
                try:
                    extent = extents_in(segment)[name]
                except FormatError:
                    continue
                assert extent.nbytes <= (segment / extent.path).stat().st_size
        (segment / name / "zarr.json").write_text(json.dumps(good))


# --- damaged stores --------------------------------------------------------------------------------------------------


def damage(rng, files):
    """Hurt one file of a segment; return how."""
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip", "truncate", "delete", "swap", "zero"])
    at = rng.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[at:]
    elif how == "zero":
        data[at : at + 64] = bytes(len(data[at : at + 64]))
    path.write_bytes(data)
    if how == "delete":
        path.unlink()
    elif how == "swap":
        other = rng.choice(files)
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    return f"{how} {path.relative_to(path.parents[2])} at {at}"


def test_damage_anywhere_gives_right_numbers_or_none(tmp_path):
    """In two segments of equal shapes, so that swapped files fit."""
    with actcache.open(f"zarr:{tmp_path}/good") as store, store.space(recipe()) as space:
        for part in (range(9), range(9, 18)):  # the lengths repeat after 9 documents
            put(space, part)
            space.flush()
    seen = set()
    for seed in range(80):  # tests/store/test_corruption.py has thousands
        rng = random.Random(seed)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        if seed % 2:
            shutil.rmtree(folder_of(tmp_path / "bad") / "index", ignore_errors=True)
        segments = segment_files(folder_of(tmp_path / "bad"))
        what = damage(rng, [file for path in segments for file in sorted(path.rglob("*")) if file.is_file()])
        with (
            actcache.open(tmp_path / "bad", "r", mapped=bool(seed % 3)) as store,
            store.space(recipe()) as space,
        ):
            for number in range(18):
                try:
                    entry = space.get([key(number)])[0]
                except (CorruptEntryError, FormatError) as error:
                    seen.add(type(error).__name__)
                    continue
                if entry is None:
                    seen.add("miss")
                    continue
                np.testing.assert_array_equal(entry.activations, rows(number), err_msg=what)
                if entry.token_ids is not None:
                    np.testing.assert_array_equal(entry.token_ids, ids(number), err_msg=what)
            seen.update(f"damaged {len(space.damaged())}" for _ in space.damaged())
        shutil.rmtree(tmp_path / "bad")
    assert {"CorruptEntryError", "miss", "damaged 1"} <= seen


def test_a_part_that_an_index_knows_is_lost(tmp_path):
    """The segment still stands: it is damaged, not retired."""
    space, root = make(tmp_path, range(20), segments=2)
    assert list((space / "index").iterdir())
    first, second = segment_files(space)
    (first / "values" / "c.0.0").unlink()
    with actcache.open(root, "r") as store, store.space(recipe()) as opened:
        assert list(opened.damaged()) == [first.stem]
        check(opened, dict.fromkeys(range(10, 20), 0), range(20))
    shutil.rmtree(second)  # and one that is gone as a whole is no damage
    with actcache.open(root, "r") as store, store.space(recipe()) as opened:
        assert list(opened.damaged()) == [first.stem]
        check(opened, {}, range(20))


FORKING = """
import os, sys, warnings
from tests.support import make_store
warnings.simplefilter("ignore")  # of forking a process with threads
make_store(sys.argv[1], range(3))
child = os.fork()
if child == 0:
    make_store(sys.argv[1], range(3, 6))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_process_writes_after_its_parent_did(tmp_path):
    """zarr-python has a thread of its own, which does not survive a fork."""
    assert run(FORKING, f"zarr:{tmp_path}/store").strip() == "7"
    assert len(segment_files(folder_of(tmp_path / "store"))) == 2
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as opened:
        check(opened, dict.fromkeys(range(6), 0), range(6))
