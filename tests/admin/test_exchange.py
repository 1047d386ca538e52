"""Export and import: what the file holds, by other libraries, and that it comes back as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pyarrow.parquet
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import actcache
from actcache.admin import exchange
from actcache.admin.exchange import exporting, importing
from actcache.errors import CorruptEntryError, FormatError, MissingEntryError
from actcache.io.progress import Meter
from tests.cli.running import cachectl
from tests.store.test_disk import mount
from tests.support import check, ids, key, length, make_store, put, recipe, rows, segment_files
from tests.support.backends import each

HELD = dict.fromkeys(range(30), 0)


SUFFIXES = [".safetensors", ".npz"]


def extras_of(numbers, names=("spans", "word_ids", "type_ids")):
    """Optional arrays of documents by number."""
    made = {
        "spans": [np.arange(2 * length(n)).reshape(-1, 2) + 100 * n for n in numbers],
        "word_ids": [np.arange(length(n)) - 1 for n in numbers],
        "type_ids": [np.arange(length(n)) % 2 + n % 3 for n in numbers],
    }
    return {name: made[name] for name in names}


def arrays_of(path):
    return load_file(path) if path.suffix == ".safetensors" else dict(np.load(path))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_by_another_library(tmp_path, suffix, dtype):
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype=dtype)) as space:
        put(space, range(30))
    path = tmp_path / f"out{suffix}"
    done = cachectl("export", tmp_path / "store", path, "--json").json()
    found = arrays_of(path)
    assert (done["entries"], done["nbytes"], done["token_ids"]) == (30, path.stat().st_size, True)
    numbers = {key(n): n for n in range(30)}
    assert {row.tobytes() for row in found["keys"]} == set(numbers)
    for i, name in enumerate(found["keys"]):
        part = slice(found["offsets"][i], found["offsets"][i + 1])
        values = found["values"][part]
        if dtype == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_array_equal(values, rows(numbers[name.tobytes()]))
        np.testing.assert_array_equal(found["token_ids"][part], ids(numbers[name.tobytes()]))


@each(everyday=("hdf5", "lmdb"))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_there_and_back(kind, suffix, tmp_path):
    make_store(kind.url(tmp_path / "store"), range(30), segments=2)
    path = tmp_path / f"out{suffix}"
    assert "30 entries" in cachectl("export", kind.url(tmp_path / "store"), path).out
    for stored in (30, 0):
        done = cachectl("import", kind.url(tmp_path / "back"), path, "--json").json()
        assert (done["entries"], done["stored"], done["corrupt"]) == (30, stored, [])
    with actcache.open(kind.url(tmp_path / "back"), "r") as store, store.space(recipe()) as space:
        check(space, HELD, range(35))
        with actcache.open(kind.url(tmp_path / "store"), "r") as old, old.space(recipe()) as source:
            names = source.key_array()
            np.testing.assert_array_equal(space.stored_checksums(names), source.stored_checksums(names))
            assert space.recipe.to_json() == source.recipe.to_json()


def test_a_collection_in_its_order_and_entries_without_token_ids(tmp_path):
    with actcache.open(tmp_path / "store") as store:
        with store.space(recipe()) as space:
            put(space, range(10))
            space.put([key(50)], [rows(50)])
        store.put_collection("c", [key(n) for n in (7, 50, 2)])
        store.put_collection("missing", [key(n) for n in (7, 99)])
    path = tmp_path / "c.safetensors"
    assert not cachectl("export", tmp_path / "store", path, "--collection", "c", "--json").json()["token_ids"]
    found = load_file(path)
    assert [name.tobytes() for name in found["keys"]] == [key(n) for n in (7, 50, 2)]
    assert "token_ids" not in found
    np.testing.assert_array_equal(found["values"], np.concatenate([rows(n) for n in (7, 50, 2)]))
    cachectl("export", tmp_path / "store", tmp_path / "d.npz", "--collection", "missing").refused(3)
    with actcache.open(tmp_path / "store", "r") as store, pytest.raises(MissingEntryError):
        exchange.export_space(store.space(recipe()), tmp_path / "d.npz", [key(99)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.safetensors", "store"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_found_on_both_ways(suffix, tmp_path):
    folder = make_store(tmp_path / "store", range(10))
    path = tmp_path / f"out{suffix}"
    assert cachectl("export", tmp_path / "store", path).code == 0
    data = bytearray(path.read_bytes())
    data[data.index(rows(4).tobytes())] ^= 1
    path.write_bytes(data)
    result = cachectl("import", tmp_path / "back", path, "--json")
    assert result.code == 4
    assert json.loads(result.out)["corrupt"] == [key(4).hex()]
    with actcache.open(tmp_path / "back", "r") as store, store.space(recipe()) as space:
        check(space, {n: 0 for n in range(10) if n != 4}, range(12))
    (segment,) = segment_files(folder)
    data = bytearray(segment.read_bytes())
    data[data.index(rows(4).tobytes())] ^= 1
    segment.write_bytes(data)
    assert "checksum" in cachectl("export", tmp_path / "store", tmp_path / "again.npz").refused(4)
    with actcache.open(tmp_path / "store", "r") as store, pytest.raises(CorruptEntryError):
        exchange.export_space(store.space(recipe()), tmp_path / "again.npz")
    assert not list(tmp_path.glob("*again*"))


def test_what_is_refused(tmp_path):
    make_store(tmp_path / "store", range(3))
    cachectl("export", tmp_path / "store", tmp_path / "out.txt").refused(2)
    (tmp_path / "there.npz").write_text("mine")
    assert "stands already" in cachectl("export", tmp_path / "store", tmp_path / "there.npz").refused(2)
    assert (tmp_path / "there.npz").read_text() == "mine"
    cachectl("export", tmp_path / "store", tmp_path / "none" / "out.npz").refused(3)
    make_store(tmp_path / "store", range(3), layer=2)
    assert "--space" in cachectl("export", tmp_path / "store", tmp_path / "out.npz").refused(2)
    assert cachectl("export", tmp_path / "store", tmp_path / "out.npz", "--space", recipe().fingerprint).code == 0
    assert "cannot read" in cachectl("import", tmp_path / "new", tmp_path / "absent").refused(2)
    assert not (tmp_path / "new").exists()
    cachectl("import", tmp_path / "new", tmp_path / "there.npz").refused(4)
    cachectl("import", tmp_path / "new", next((tmp_path / "store").rglob("recipe.json"))).refused(4)


def test_impossible_files_are_refused(tmp_path):
    """Each array cut, of another type, or missing: an error that says so, and nothing is stored."""
    make_store(tmp_path / "store", range(10))
    path = tmp_path / "out.safetensors"
    cachectl("export", tmp_path / "store", path)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    whole = load_file(path)
    bad = tmp_path / "bad.safetensors"
    changes = [{name: array[:-1]} for name, array in whole.items()]
    changes += [{name: array.astype(np.float32)} for name, array in whole.items() if name != "values"]
    changes += [{"values": whole["values"][:, :-1].copy()}, {"keys": whole["keys"][[0] * 10]}]
    changes += [{"offsets": whole["offsets"][::-1].copy()}]
    for change in changes:
        save_file({**whole, **change}, bad, metadata)
        cachectl("import", tmp_path / "new", bad).refused(4)
    for name in set(whole) - {"token_ids"}:
        save_file({n: a for n, a in whole.items() if n != name}, bad, metadata)
        cachectl("import", tmp_path / "new", bad).refused(4)
    for other in ({}, {**metadata, "recipe": "{"}, {**metadata, "actcache_export": "9"}):
        save_file(whole, bad, other)
        cachectl("import", tmp_path / "new", bad).refused(4)
    save_file({name: array for name, array in whole.items() if name != "token_ids"}, bad, metadata)
    assert cachectl("import", tmp_path / "new", bad).code == 4  # another file, of corrupt entries
    with actcache.open(tmp_path / "new", "r") as store:
        assert store.recipes() == []


@pytest.mark.parametrize(
    ("dtype", "suffix"),
    [("float32", ".npz"), ("float16", ".safetensors"), ("bfloat16", ".safetensors"), ("bfloat16", ".npz")],
)
def test_nothing_is_lost_on_the_way_to_another_backend(tmp_path, suffix, dtype, monkeypatch):
    """hdf5 -> file -> lmdb -> file -> zarr: equal checksums everywhere, and files of equal arrays."""
    for module in (exporting, importing):
        monkeypatch.setattr(module, "PART_BYTES", 200)
    numbers = list(range(20))
    with actcache.open(tmp_path / "hdf5") as store, store.space(recipe(dtype=dtype)) as space:
        put(space, numbers, **extras_of(numbers))
    sums, files = [], []
    for source, target in (("hdf5", "lmdb"), ("lmdb", "zarr")):
        path = tmp_path / f"{source}{suffix}"
        done = cachectl("export", tmp_path / source, path, "--json").json()
        assert (sorted(done["extras"]), done["left_out"]) == (["spans", "type_ids", "word_ids"], {})
        assert cachectl("import", f"{target}:{tmp_path / target}", path, "--json").json()["stored"] == 20
        files.append(arrays_of(path))
    for name in ("hdf5", "lmdb", "zarr"):
        with actcache.open(tmp_path / name, "r") as store, store.space(recipe(dtype=dtype)) as space:
            assert space.verify().intact
            sums.append(space.stored_checksums([key(n) for n in numbers]))
            check(space, dict.fromkeys(numbers, 0), range(22))
            for i, entry in enumerate(space.get([key(n) for n in numbers])):
                for column, arrays in extras_of(numbers).items():
                    np.testing.assert_array_equal(entry.extras[column], arrays[i])
    assert (sums[0] == sums[1]).all()
    assert (sums[0] == sums[2]).all()
    assert (sums[0] != 0).all()
    order = [np.argsort([row.tobytes() for row in one["keys"]]) for one in files]
    for one, rank in zip(files, order, strict=True):
        names = [one["keys"][i].tobytes() for i in rank]
        assert names == sorted(key(n) for n in numbers)
        for position, name in zip(rank, names, strict=True):
            number = next(n for n in numbers if key(n) == name)
            part = slice(one["offsets"][position], one["offsets"][position + 1])
            for column, arrays in extras_of(numbers).items():
                np.testing.assert_array_equal(one[column][part], arrays[number])
            assert one["checksums"][position] == sums[0][number, 1]
            assert one["extra_checksums"][position] == sums[0][number, 2]


def test_arrays_are_aligned(tmp_path):
    """torch refuses others."""
    with actcache.open(tmp_path / "store") as store, store.space(recipe(dtype="float16", hidden_size=3)) as space:
        space.put([key(0)], [np.ones((5, 3), np.float16)], [np.arange(5)], type_ids=[np.zeros(5, int)])
    cachectl("export", tmp_path / "store", tmp_path / "out.safetensors")
    data = (tmp_path / "out.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    widths = {"U64": 8, "I64": 8, "I32": 4, "F16": 2, "U8": 1, "I8": 1}
    for name, one in header.items():
        if name != "__metadata__":
            assert (8 + size + one["data_offsets"][0]) % widths[one["dtype"]] == 0, name


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_only_some_entries_have_is_left_out_aloud(tmp_path, suffix):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(4), **extras_of(range(4)))
        put(space, range(4, 10), **extras_of(range(4, 10), ["spans"]))
    path = tmp_path / f"out{suffix}"
    result = cachectl("export", tmp_path / "store", path)
    assert "type_ids of 4 entries left out" in result.out
    assert "word_ids of 4 entries left out" in result.out
    assert cachectl("import", tmp_path / "back", path).code == 0
    with actcache.open(tmp_path / "back", "r") as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(10), 0), range(12))
        assert all(set(entry.extras) == {"spans"} for entry in space.get([key(n) for n in range(10)]))
        assert space.verify().intact


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_spans_are_found_on_the_way_back(tmp_path, suffix):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(6), **extras_of(range(6), ["spans"]))
    path = tmp_path / f"out{suffix}"
    cachectl("export", tmp_path / "store", path)
    wanted = extras_of([4], ["spans"])["spans"][0].astype(np.int32).tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(wanted)] ^= 1
    path.write_bytes(data)
    result = cachectl("import", tmp_path / "back", path, "--json")
    assert (result.code, json.loads(result.out)["corrupt"]) == (4, [key(4).hex()])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_document_that_stands_twice_in_a_collection(tmp_path, suffix):
    make_store(tmp_path / "store", range(5))
    with actcache.open(tmp_path / "store") as store:
        store.put_collection("c", [key(n) for n in (3, 1, 3, 0)], ["a", "b", "c", "d"])
    path = tmp_path / f"out{suffix}"
    assert cachectl("export", tmp_path / "store", path, "--collection", "c", "--json").json()["entries"] == 3
    assert [row.tobytes() for row in arrays_of(path)["keys"]] == [key(n) for n in (3, 1, 0)]
    assert cachectl("import", tmp_path / "back", path, "--json").json()["stored"] == 3


def test_parquet_by_its_library(tmp_path, monkeypatch):
    with actcache.open(tmp_path / "store") as store:
        with store.space(recipe()) as space:
            put(space, range(30))
            space.put([key(50)], [rows(50)])
        store.put_collection("c", [key(n) for n in (7, 50, 2, 7)], ["seven", "fifty", "", "again"])
        store.put_collection("bare", [key(2)])
    done = cachectl("export", tmp_path / "store", tmp_path / "c.parquet", "--collection", "c", "--json").json()
    assert (done["entries"], done["nbytes"], done["token_ids"]) == (4, (tmp_path / "c.parquet").stat().st_size, False)
    found = pyarrow.parquet.read_table(tmp_path / "c.parquet")
    assert found.schema.field("token_ids").type == pyarrow.list_(pyarrow.int32())
    assert found.schema.field("length").type == pyarrow.int32()
    assert json.loads(found.schema.metadata[b"actcache_recipe"]) == recipe().to_json()
    assert found.to_pylist() == [
        {"key": key(n).hex(), "id": name, "length": length(n), "token_ids": None if n == 50 else ids(n).tolist()}
        for n, name in ((7, "seven"), (50, "fifty"), (2, ""), (7, "again"))
    ]
    monkeypatch.setattr(exporting, "PART_BYTES", 200)
    monkeypatch.setattr(exporting, "_GROUP_TOKENS", 40)
    assert "31 entries" in cachectl("export", tmp_path / "store", tmp_path / "all.parquet").out
    file = pyarrow.parquet.ParquetFile(tmp_path / "all.parquet")
    assert file.num_row_groups > 2
    table = file.read()
    assert table.column_names == ["key", "length", "token_ids"]
    whole = {row["key"]: row for row in table.to_pylist()}
    assert set(whole) == {key(n).hex() for n in [*range(30), 50]}
    assert all(whole[key(n).hex()]["token_ids"] == ids(n).tolist() for n in range(30))
    assert cachectl("export", tmp_path / "store", tmp_path / "b.parquet", "--collection", "bare", "--json").json()[
        "token_ids"
    ]
    assert pyarrow.parquet.read_table(tmp_path / "b.parquet").column_names == ["key", "length", "token_ids"]
    assert "no activations" in cachectl("import", tmp_path / "new", tmp_path / "all.parquet").refused(2)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "actcache[corpora]" in cachectl("export", tmp_path / "store", tmp_path / "d.parquet").refused(2)
    assert not list(tmp_path.glob("*d.parquet*"))


def test_parquet_of_damaged_token_ids_is_not_written(tmp_path):
    (segment,) = segment_files(make_store(tmp_path / "store", range(10)))
    data = bytearray(segment.read_bytes())
    data[data.index(ids(4).astype(np.int32).tobytes())] ^= 1
    segment.write_bytes(data)
    assert "checksum" in cachectl("export", tmp_path / "store", tmp_path / "out.parquet").refused(4)
    assert not list(tmp_path.glob("*out*"))


def member(descr, shape, data=b"", order="False", magic=b"\x93NUMPY\x01\x00"):
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return magic + len(header).to_bytes(2 if magic[6] == 1 else 4, "little") + header + data


def test_impossible_npz_are_refused(tmp_path):
    """One line that says so, whatever its headers declare, and nothing is unpickled, unpacked or stored."""
    make_store(tmp_path / "store", range(10))
    good = tmp_path / "out.npz"
    cachectl("export", tmp_path / "store", good)
    arrays = dict(np.load(good, allow_pickle=False))
    bad, trap = tmp_path / "bad.npz", tmp_path / "trap"

    class Trap:
        def __reduce__(self):
            return open, (str(trap), "w")

    def refused():
        said = cachectl("import", tmp_path / "new", bad).refused(4)
        assert str(bad) in said
        assert not trap.exists()

    def saved(save=np.savez, **change):
        save(bad, **{name: array for name, array in {**arrays, **change}.items() if array is not None})
        refused()

    saved(np.savez_compressed)
    saved(keys=np.array([Trap()], object))
    saved(values=np.asfortranarray(arrays["values"]))
    saved(values=arrays["values"].astype(">f4"))
    saved(recipe=np.frombuffer(b"{" * 100_000, np.uint8))
    saved(recipe=np.zeros(2 << 20, np.uint8))
    for name, array in arrays.items():
        if name != "token_ids":  # without them it is another file, of corrupt entries
            saved(**{name: None})
        saved(**{name: array[:-1]} if name != "recipe" else {name: array[1:]})
    np.savez(bad, **arrays)
    assert cachectl("import", tmp_path / "same", bad, "--json").json()["stored"] == 10  # numpy's own writing is good
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    plain = member("'<f4'", "(1, 8)", bytes(32))
    for values in (
        b"",
        plain[:20],
        plain[:-1],
        member("'<f4'", "(1000000000000, 8)", bytes(32)),
        member("'<f4'", "(-1, 8)", bytes(32)),
        member("'<f4'", "(" + "9" * 5000 + ",)", bytes(32)),
        member("'|O'", "(1, 8)", bytes(32)),
        member("'<f3'", "(1, 8)", bytes(32)),
        member("[('a', '<f4')]", "(1, 8)", bytes(32)),
        member(f"__import__('pathlib').Path('{trap}').touch()", "(1, 8)", bytes(32)),
        member("(" * 3000 + ")" * 3000, "(1, 8)", bytes(32)),
        member("'<f4'", "(1, 8)", bytes(32), magic=b"\x93NUMPY\x03\x00"),
        member("'<f4'", "(1, 8)", bytes(32), magic=b"\x93NUMPY\x02\x00"),
    ):
        with zipfile.ZipFile(bad, "w") as archive:
            for name, data in {**members, "values.npy": values}.items():
                archive.writestr(name, data)
        refused()
    with zipfile.ZipFile(bad, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("keys.npy", members["keys.npy"])
    refused()
    with zipfile.ZipFile(bad, "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.npy", plain)
    refused()
    whole = good.read_bytes()
    rng = np.random.default_rng(0)
    central = whole.rindex(b"PK\x01\x02")
    with actcache.open(f"ram:{tmp_path / 'flips'}") as store:
        for at in [*range(0, len(whole), len(whole) // 40), *range(1, 30)]:
            bad.write_bytes(whole[:at])
            with pytest.raises(FormatError, match=r"bad\.npz"):
                exchange.import_file(store, bad)
        assert store.recipes() == []
        seen = set()
        for _ in range(200):  # anywhere, and in the directory
            data = bytearray(whole)
            at = rng.integers(len(whole)) if rng.random() < 0.5 else rng.integers(central, len(whole))
            data[int(at)] ^= 1 << int(rng.integers(8))
            bad.write_bytes(data)
            try:
                seen.add(bool(exchange.import_file(store, bad).corrupt))
            except FormatError:
                seen.add(None)
        assert seen == {None, True, False}
        with store.space(recipe()) as space:
            check(space, dict.fromkeys(range(10), 0), range(12))
    bad.write_bytes(b"")
    refused()


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".parquet"])
def test_an_interrupt_in_the_middle(suffix, tmp_path, monkeypatch):
    """Exit code 130, one line, no half of a file, and the same command ends the next time."""
    make_store(tmp_path / "store", range(20))
    path, commands = tmp_path / f"out{suffix}", ["export", "import"]
    tell = Meter.__call__

    def interrupted(self, *told):
        tell(self, *told)
        os.kill(os.getpid(), signal.SIGINT)

    for name in commands if suffix in SUFFIXES else commands[:1]:
        store = tmp_path / ("store" if name == "export" else "back")
        with monkeypatch.context() as patched:
            patched.setattr(Meter, "__call__", interrupted)
            assert "run it again" in cachectl(name, store, path).refused(130)
        if name == "export":
            assert not list(tmp_path.glob("*out*"))
        assert cachectl(name, store, path).code == 0
        with actcache.open(store, "r") as opened, opened.space(recipe()) as space:
            check(space, dict.fromkeys(range(20), 0), range(22))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".parquet"])
def test_a_full_disk(suffix, tmp_path):
    """It says so, nothing is left, and the same command ends when there is room."""
    disk, wide = tmp_path / "disk", recipe(hidden_size=2000)
    rng = np.random.default_rng(0)
    with actcache.open(tmp_path / "store") as store, store.space(wide) as space:
        keys = [key(n) for n in range(30)]
        tokens = [rng.integers(0, 1 << 30, 20) for _ in keys]
        space.put(keys, [np.ones((20, 2000), np.float32) for _ in keys], tokens)
    mount("tmpfs", disk, "-o", "size=8M", "tmpfs")
    try:
        room = 4096 if suffix == ".parquet" else 1 << 20  # of 4.8 MB of rows, or some thousand bytes of token ids
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize - room))
        assert "free some space" in cachectl("export", tmp_path / "store", disk / f"out{suffix}").refused(3)
        assert [path.name for path in disk.iterdir()] == ["ballast"]
        (disk / "ballast").unlink()
        assert cachectl("export", tmp_path / "store", disk / f"out{suffix}").code == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, capture_output=True)
