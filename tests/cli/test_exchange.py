"""Export and import: what the file holds, by other libraries, and that it comes back as it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import actcache
from actcache import exchange
from actcache.errors import CorruptEntryError, MissingEntryError
from tests.backends import each
from tests.cli.running import cachectl
from tests.support import check, ids, key, make_store, put, recipe, rows, segment_files

HELD = dict.fromkeys(range(30), 0)


def arrays_of(path):
    return load_file(path) if path.suffix == ".safetensors" else dict(np.load(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
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


@each()
def test_there_and_back(kind, tmp_path):
    make_store(kind.url(tmp_path / "store"), range(30), segments=2)
    path = tmp_path / "out.safetensors"
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


def test_damage_is_found_on_both_ways(tmp_path):
    folder = make_store(tmp_path / "store", range(10))
    path = tmp_path / "out.safetensors"
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
    for name in ("there.npz", "out.npz"):
        cachectl("import", tmp_path / "new", tmp_path / name).refused(4)
    cachectl("import", tmp_path / "new", next((tmp_path / "store").rglob("recipe.json"))).refused(4)


def test_impossible_files_are_refused(tmp_path):
    """Each array cut, of another type, or missing: an error that says so, and nothing is stored."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

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
    with actcache.open(tmp_path / "new", "r") as store:
        assert store.recipes() == []
