"""The hdf5 store as docs/format.md describes it, read by code that knows neither actcache nor its index.

The functions of the reader import h5py, NumPy, xxhash and json alone.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import xxhash

import actcache
from actcache.errors import FormatError
from actcache.segments.places.local_place import LocalSegment
from actcache_hdf5 import backend
from tests.support import HIDDEN, check, ids, key, make_store, put, recipe, rows, run, segment_files

# --- an independent reader, from docs/format.md ----------------------------------------------------------------------


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def read_store(root):
    """Return fingerprint -> {key: (rows, token ids or None, extras)} of all spaces of a store."""
    marker = json.loads((root / "actcache.json").read_text())
    assert len(marker.pop("id")) == 32
    assert marker == {"format": "actcache", "format_version": 1, "backend": "hdf5"}
    spaces = sorted((root / "spaces").iterdir()) if (root / "spaces").is_dir() else []
    return {space.name: read_space(space) for space in spaces}


def read_space(space):
    description = json.loads((space / "recipe.json").read_text())
    assert description["format_version"] == 1
    identity = description["identity"]
    dead = {}
    for path in sorted((space / "tombstones").glob("*.json")):
        tombstone = json.loads(path.read_text())
        assert tombstone["checksum"] == xxhash.xxh3_64_hexdigest(canonical(tombstone["deleted"]))
        for segment, entries in tombstone["deleted"].items():
            dead.setdefault(segment, set()).update(entries)
    held = {}
    for path in sorted((space / "segments").glob("*.h5")):  # the last name is served
        with h5py.File(path, "r") as file:
            claims = {name: text.decode() for name, text in file.attrs.items()}
            assert claims == {"actcache_segment": "1", "space": space.name, "segment": path.stem}
            arrays = {name: file[name][...] for name in file}
        offsets = arrays["offsets"].tolist()
        for i, name in enumerate(arrays["keys"]):
            if i in dead.get(path.stem, ()):
                continue
            entry = {n: array[offsets[i] : offsets[i + 1]] for n, array in arrays.items() if n not in FIXED}
            verify(space.name, identity, name.tobytes(), entry, int(arrays["checksums"][i]), arrays, i)
            held[name.tobytes()] = entry
    return held


FIXED = ("offsets", "keys", "checksums", "extra_checksums")
P = [0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5]


def verify(fingerprint, identity, name, entry, checksum, arrays, i):
    c = xxhash.xxh3_64_intdigest(f"{fingerprint} {identity['dtype']} {identity['hidden_size']}".encode())
    for n, word in enumerate(np.frombuffer(name, "<u8").tolist()):
        c ^= word * P[n] % 2**64
    c ^= len(entry["values"]) * P[4] % 2**64
    if "token_ids" in entry:
        c = xxhash.xxh3_64_intdigest(entry["token_ids"].tobytes(), c ^ 0x5851F42D4C957F2D)
    c = xxhash.xxh3_64_intdigest(entry["values"].tobytes(), c)
    assert c == checksum
    if "extra_checksums" in arrays:
        for extra in ("spans", "type_ids", "word_ids"):
            if extra in entry:
                c = xxhash.xxh3_64_intdigest(entry[extra].tobytes(), c)
        assert c == arrays["extra_checksums"][i]


# --- what actcache writes --------------------------------------------------------------------------------------------


def extents_of(path):
    """Where the arrays lie, as the backend tells the core."""
    return backend.layout(LocalSegment(path)).extents


def test_a_whole_store_read_by_others(tmp_path):
    """Several spaces and codecs, overwritten and deleted entries, entries with and without token ids."""
    expected = {}
    with actcache.open(tmp_path / "store") as store:
        for dtype in ("float32", "float16", "bfloat16"):
            here = recipe(dtype=dtype)
            held = expected[here.fingerprint] = {}
            with store.space(here, segment_bytes=300) as space:
                for version in range(3):
                    put(space, range(version, 20, 2), version=version, overwrite=True)
                    held.update({key(n): rows(n, version) for n in range(version, 20, 2)})
                    space.flush()
                gone = [key(n) for n in (3, 4, 18)]
                space.delete(gone)
                for name in gone:
                    held.pop(name)
                put(space, [4], version=7)
                held[key(4)] = rows(4, 7)
                space.put([key(100)], [rows(100)])
                held[key(100)] = rows(100)
    found = read_store(tmp_path / "store")
    assert set(found) == set(expected)
    for fingerprint, held in expected.items():
        assert set(found[fingerprint]) == set(held)
        for name, values in held.items():
            stored = found[fingerprint][name]["values"]
            if stored.dtype == np.uint16:  # bfloat16's bits
                stored = (stored.astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(stored, values)  # small integers are exact in all three
        assert "token_ids" not in found[fingerprint][key(100)]
        np.testing.assert_array_equal(found[fingerprint][key(4)]["token_ids"], ids(4, 7))


def test_optional_arrays_read_by_others(tmp_path):
    count = len(rows(1))
    extras = {"spans": np.arange(2 * count).reshape(-1, 2), "word_ids": np.arange(count) - 1}
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.put([key(1)], [rows(1)], [ids(1)], **{name: [array] for name, array in extras.items()})
    entry = read_store(tmp_path / "store")[recipe().fingerprint][key(1)]
    assert set(entry) == {"values", "token_ids", "spans", "word_ids"}
    for name, array in extras.items():
        np.testing.assert_array_equal(entry[name], array)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", np.uint16)]
)
def test_a_segment_is_what_the_schema_says(tmp_path, dtype, stored):
    (path,) = segment_files(make_store(tmp_path / "store", range(10), dtype=dtype))
    tokens = sum(len(rows(n)) for n in range(10))
    schema = {
        "values": (stored, (tokens, HIDDEN)),
        "offsets": (np.int64, (11,)),
        "keys": (np.uint8, (10, 32)),
        "checksums": (np.uint64, (10,)),
        "token_ids": (np.int32, (tokens,)),
    }
    data = path.read_bytes()
    with h5py.File(path, "r") as file:
        assert set(file) == set(schema)
        here = {"space": recipe(dtype=dtype).fingerprint, "segment": path.stem}
        claims = {name: text.decode() for name, text in file.attrs.items()}
        assert claims == {"actcache_segment": "1", **here}
        ends = []
        for name, (kind, shape) in schema.items():
            dataset = file[name]
            assert dataset.dtype == kind
            assert dataset.shape == shape
            assert dataset.chunks is None
            assert dataset.compression is None
            assert dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS
            offset = dataset.id.get_offset()
            assert offset % 4096 == 0
            assert data[offset : offset + dataset.nbytes] == dataset[...].tobytes()
            ends.append((offset, offset + dataset.nbytes, name))
        assert min(ends)[2] == "values", "the rows come first"
        assert [b for _, b, _ in sorted(ends)] == sorted(b for _, b, _ in ends), "extents do not overlap"
        i = 3
        begin, end = file["offsets"][i], file["offsets"][i + 1]
        assert file["keys"][i].tobytes() == key(3)
        if dtype != "bfloat16":
            np.testing.assert_array_equal(file["values"][begin:end], rows(3))
    layout = extents_of(path)
    assert {name: (np.dtype(e.dtype), e.shape) for name, e in layout.items()} == {
        name: (np.dtype(kind), shape) for name, (kind, shape) in schema.items()
    }


def test_the_independent_reader_needs_no_actcache(tmp_path):
    """It runs where actcache cannot be imported."""
    make_store(tmp_path / "store", range(5))
    source = Path(__file__).read_text()
    reader = source[source.index("def canonical") : source.index("# --- what actcache writes")]
    head = "import json, sys, h5py, numpy as np, xxhash\nfrom pathlib import Path\nsys.modules['actcache'] = None\n"
    code = f"{head}{reader}\n(space,) = read_store(Path(sys.argv[1])).values(); print(len(space))"
    assert run(code, tmp_path / "store").strip() == "5"


# --- a golden store --------------------------------------------------------------------------------------------------


def test_a_golden_store_of_version_1(tmp_path):
    """Bytes that a release wrote once stay readable: this store was made by hand, with h5py."""
    root = tmp_path / "store"
    golden = recipe()
    space = root / "spaces" / golden.fingerprint
    (space / "segments").mkdir(parents=True)
    (space / "tombstones").mkdir()
    (root / "actcache.json").write_text('{"format": "actcache", "format_version": 1, "backend": "hdf5"}\n')
    (space / "recipe.json").write_text(json.dumps({"format_version": 1, **golden.to_json()}))
    numbers = [3, 5, 8]
    names = [f"{1:012x}-{'ab' * 8}", f"{2:012x}-{'cd' * 8}"]
    for name, version in zip(names, (0, 1), strict=True):
        sums = []
        for n in numbers:
            c = xxhash.xxh3_64_intdigest(f"{golden.fingerprint} float32 {HIDDEN}".encode())
            for i, word in enumerate(np.frombuffer(key(n), "<u8").tolist()):
                c ^= word * P[i] % 2**64
            c ^= len(rows(n, version)) * P[4] % 2**64 ^ 0x5851F42D4C957F2D
            c = xxhash.xxh3_64_intdigest(ids(n, version).astype("<i4").tobytes(), c)
            sums.append(xxhash.xxh3_64_intdigest(rows(n, version).tobytes(), c))
        with h5py.File(space / "segments" / f"{name}.h5", "w") as file:
            file["values"] = np.concatenate([rows(n, version) for n in numbers])
            file["offsets"] = np.cumsum([0, *(len(rows(n, version)) for n in numbers)])
            file["keys"] = np.frombuffer(b"".join(map(key, numbers)), np.uint8).reshape(-1, 32)
            file["checksums"] = np.array(sums, np.uint64)
            file["token_ids"] = np.concatenate([ids(n, version) for n in numbers]).astype("<i4")
            claims = {"actcache_segment": "1", "space": golden.fingerprint, "segment": name}
            file.attrs.update({field: np.bytes_(text) for field, text in claims.items()})
    deleted = {names[1]: [2]}
    tombstone = {"deleted": deleted, "checksum": xxhash.xxh3_64_hexdigest(canonical(deleted))}
    (space / "tombstones" / f"{1:012x}-{'ef' * 8}.json").write_text(json.dumps(tombstone))
    for mapped in (True, False):
        with actcache.open(root, "r", mapped=mapped) as store, store.space(golden) as opened:
            check(opened, {3: 1, 5: 1, 8: 0}, range(10))


# --- foreign and lying files ------------------------------------------------------------------------------------------


@pytest.fixture
def segment(tmp_path):
    return segment_files(make_store(tmp_path / "store", range(10)))[0]


def replaced(file, name, make):
    array = file[name][...]
    del file[name]
    make(array)


def soft_link(file, name):
    file[f"hidden_{name}"] = file[name]
    del file[name]
    file[name] = h5py.SoftLink(f"/hidden_{name}")


def external_link(file, name):
    with h5py.File(f"{file.filename}.other", "w") as other:
        other[name] = file[name][...]
    del file[name]
    file[name] = h5py.ExternalLink(f"{file.filename}.other", f"/{name}")


def virtual(file, name):
    dataset = file[name]
    layout = h5py.VirtualLayout(dataset.shape, dataset.dtype)
    layout[...] = h5py.VirtualSource(file.filename, f"hidden_{name}", dataset.shape, dataset.dtype)
    file.move(name, f"hidden_{name}")
    file.create_virtual_dataset(name, layout)


def external_storage(file, name):
    array = file[name][...]
    Path(f"{file.filename}.raw").write_bytes(array.tobytes())
    del file[name]
    file.create_dataset(name, array.shape, array.dtype, external=[(f"{file.filename}.raw", 0, array.nbytes)])


def with_array(change):
    def lie(file, name):
        replaced(file, name, lambda array: file.create_dataset(name, data=change(array)))

    return lie


def with_options(**options):
    def lie(file, name):
        replaced(file, name, lambda array: file.create_dataset(name, data=array, **options))

    return lie


def unallocated(file, name):
    replaced(file, name, lambda array: file.create_dataset(name, array.shape, array.dtype))


def group(file, name):
    replaced(file, name, lambda array: file.create_group(name))


def compact(file, name):
    def make(array):
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(array.shape)
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, dcpl=properties)

    replaced(file, name, make)


LIES = {
    "soft link": soft_link,
    "external link": external_link,
    "virtual": virtual,
    "external storage": external_storage,
    "chunked": with_options(chunks=True),
    "compressed": with_options(compression="gzip"),
    "shuffled": with_options(shuffle=True, chunks=True),
    "checked": with_options(fletcher32=True),
    "unallocated": unallocated,
    "group": group,
    "compact": compact,
    "absent": lambda file, name: file.__delitem__(name),
    "longer": with_array(lambda array: np.concatenate([array, array])),
    "shorter": with_array(lambda array: array[:-1]),
    "empty": with_array(lambda array: array[:0]),
    "big-endian": with_array(lambda array: array.astype(array.dtype.newbyteorder(">"))),
    "wider": with_array(lambda array: array.astype(np.complex128)),
    "scalar": with_array(lambda array: array.reshape(-1)[0]),
    "flat": with_array(lambda array: array.reshape(-1, 1, 1)),
    "strings": with_array(lambda array: np.full(len(array), b"x", "S4")),
    "objects": with_array(lambda array: np.array(["x"] * len(array), h5py.string_dtype())),
    "compound": with_array(lambda array: np.zeros(len(array), [("a", "i4"), ("b", "f4")])),
}
ARRAYS = ["values", "offsets", "keys", "checksums", "token_ids"]


@pytest.mark.parametrize(
    "name",
    [name if name in ("values", "offsets") else pytest.param(name, marks=pytest.mark.long) for name in ARRAYS],
)
@pytest.mark.parametrize("lie", LIES)
def test_lying_segments_are_refused(segment, lie, name):
    if (lie, name) == ("absent", "token_ids"):
        pytest.skip("entries may be without token ids; their checksums then fail")
    if lie == "big-endian" and name == "keys":
        pytest.skip("bytes have no order")
    try:
        with h5py.File(segment, "r+") as file:
            LIES[lie](file, name)
    except (ValueError, OSError) as error:
        pytest.skip(f"h5py does not write such a file: {error}")
    root = segment.parents[3]
    for mode in ("r", "a"):
        with actcache.open(root, mode) as store, store.space(recipe()) as space:
            assert list(space.damaged()) == [segment.stem]
            assert space.get([key(n) for n in range(10)]) == [None] * 10
    with actcache.open(root) as store, store.space(recipe()) as space:
        put(space, range(10))
        space.flush()
        check(space, dict.fromkeys(range(10), 0), range(10))


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o[::-1],
        lambda o: o * 0,
        lambda o: o + 1,
        lambda o: np.r_[0, o[2:], o[-1]],
        lambda o: np.r_[o[:-1], 2**62],
        lambda o: np.r_[o[:3], -5, o[4:]],
        lambda o: np.r_[-(2**63), o[1:]],
    ],
)
def test_lying_offsets_are_refused(segment, change):
    with h5py.File(segment, "r+") as file:
        file["offsets"][...] = change(file["offsets"][...])
    with actcache.open(segment.parents[3], "r") as store, store.space(recipe()) as space:
        assert list(space.damaged()) == [segment.stem]


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + b"\0" * 5000, b"\x89HDF\r\n\x1a\n" + b"\xff" * 5000],
    ids=["empty", "one byte", "signature", "zeros", "ones"],
)
def test_what_is_no_hdf5_file(tmp_path, content):
    path = tmp_path / "file.h5"
    path.write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FormatError, match=r"truncated or no HDF5 file"):
        extents_of(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_every_truncation_of_a_segment(segment):
    """At any length: refused, or described by extents that do not fit it."""
    good = segment.read_bytes()
    before = len(os.listdir("/proc/self/fd"))
    for size in [*range(0, 2000, 89), *range(2000, len(good), 997), len(good) - 1]:
        segment.write_bytes(good[:size])
        try:
            layout = extents_of(segment)
        except FormatError:
            continue
        assert any(extent.offset + extent.nbytes > size for extent in layout.values())
    segment.write_bytes(good)
    assert set(extents_of(segment)) == set(ARRAYS)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_segment_of_another_space(tmp_path):
    """Copied over: it says where it belongs. Where it lies about that, every entry's checksum binds it to its space."""
    mine = make_store(tmp_path / "store", [1])
    other = make_store(tmp_path / "store", [2], layer=2)
    copy = mine / "segments" / f"{9:012x}-{'ab' * 8}.h5"
    shutil.copy(segment_files(other)[0], copy)
    for field in ("space", "segment"):
        with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
            check(space, {1: 0}, [1, 2])
            assert list(space.damaged()) == [copy.stem]
            assert f"says {field}" in space.damaged()[copy.stem]
        lie(copy, field)
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        check(space, {1: 0}, [1])
        with pytest.raises(actcache.errors.CorruptEntryError):
            space.get([key(2)])


def lie(path, *fields):
    """Have a segment say that it belongs where it lies."""
    place = {"space": path.parents[1].name, "segment": path.stem}
    with h5py.File(path, "r+") as file:
        file.attrs.update({field: np.bytes_(place[field]) for field in fields})


def test_a_segment_under_the_name_of_another(tmp_path):
    """Tombstones name segments: what changes places would bring back what was deleted, and lose others."""
    folder = make_store(tmp_path / "store", range(20), segments=2)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        space.delete([key(3)])
    shutil.rmtree(folder / "index")
    first, second = segment_files(folder)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        assert list(space.damaged()) == [first.stem, second.stem]
        check(space, {}, range(20))


def test_segments_of_another_width_or_dtype(tmp_path):
    mine = make_store(tmp_path / "store", [1])
    for number, change in enumerate(({"hidden_size": HIDDEN * 2}, {"dtype": "float16"})):
        with actcache.open(tmp_path / f"other{number}") as store, store.space(recipe(**change)) as space:
            values = np.ones((3, change.get("hidden_size", HIDDEN)), np.float32)
            space.put([key(5)], [values])
        (path,) = (tmp_path / f"other{number}").glob("spaces/*/segments/*.h5")
        shutil.copy(path, mine / "segments" / path.name)
        lie(mine / "segments" / path.name, "space", "segment")
    with actcache.open(tmp_path / "store", "r") as store, store.space(recipe()) as space:
        assert len(space.damaged()) == 2
        assert all("does not fit its space" in what for what in space.damaged().values())
        check(space, {1: 0}, [1, 5])


def attributes(*texts):
    def write(file):
        for number, text in enumerate(texts):
            file.attrs[f"x{number}"] = text

    return write


@pytest.mark.parametrize(
    "write",
    [
        attributes("of variable length"),  # in a heap, where a damaged file makes the library loop for ever
        attributes(np.bytes_(b"x" * 5000)),
        attributes(*[np.bytes_(b"x")] * 20),
        attributes(np.array([b"one", b"two"])),
        attributes(5),
        attributes(np.zeros(1 << 20, np.uint8)[:60_000]),
        attributes(np.bytes_(b"\xff\xfe")),
        attributes(h5py.Empty("S5")),
    ],
    ids=["variable", "long", "many", "array", "number", "large", "no text", "empty"],
)
def test_attributes_that_a_segment_has_not(segment, write):
    with h5py.File(segment, "r+") as file:
        write(file)
    with actcache.open(segment.parents[3], "r") as store, store.space(recipe()) as space:
        assert list(space.damaged()) == [segment.stem]


def test_a_damaged_heap_does_not_hang(segment):
    """The library looks for ever for an object of a heap that was zeroed; no text of ours lies in one."""
    with h5py.File(segment, "r+") as file:
        for name in ("space", "segment"):
            file.attrs[name] = file.attrs[name].decode()
    data = segment.read_bytes()
    at = data.index(b"GCOL")
    segment.write_bytes(data[: at + 16] + bytes(4000) + data[at + 4016 :])
    code = f"""
import signal, actcache
from tests.support import *
signal.alarm(90)
with actcache.open({str(segment.parents[3])!r}, "r") as store, store.space(recipe()) as space:
    assert list(space.damaged()) == [{segment.stem!r}]
"""
    run(code)
