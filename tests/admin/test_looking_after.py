"""ls, inspect, du, verify, repair, compact: what they say and do, against the store's own files."""

from __future__ import annotations

import json
import threading

import h5py
import numpy as np
import pytest

import actcache
from actcache.admin import inspection
from actcache.errors import SpaceNotFoundError, UsageError
from actcache.store import space as maintenance
from tests.cli.running import by_space, cachectl
from tests.support import check, ids, key, length, make_store, put, recipe, rows, segment_files
from tests.support.backends import each

LOOKING = ("ls", "inspect", "du", "verify")


@pytest.fixture
def store(tmp_path):
    """A store of two spaces, 12 documents in three segments and 5 in one, and a collection."""
    url = tmp_path / "store"
    make_store(url, range(12), segments=3)
    make_store(url, range(5), layer=2, model="other/model")
    with actcache.open(url) as opened:
        opened.put_collection("corpus", [key(n) for n in (0, 1, 2, 50)], ["a", "b", "c", "d"])
    return url


def folder(store, **changes):
    return store / "spaces" / recipe(**changes).fingerprint


def flip(path):
    """Change one bit of the rows of a segment's first entry."""
    with h5py.File(path) as file:
        begin = file["values"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[begin] ^= 1
    path.write_bytes(data)


def test_ls(store):
    listed = cachectl("ls", store, "--json").json()
    found = {row["space"]: row for row in listed["spaces"]}
    assert set(found) == {recipe().fingerprint, recipe(layer=2, model="other/model").fingerprint}
    row = found[recipe().fingerprint]
    assert (row["entries"], row["segments"], row["model"], row["damaged"]) == (12, 3, "tests", {})
    assert row["nbytes"] == sum(path.stat().st_size for path in segment_files(folder(store)))
    assert 0 <= row["written"] < 600
    assert listed["collections"] == ["corpus"]
    text = cachectl("ls", store).out
    for fact in (recipe().fingerprint[:12], "tests", "model", "float32", "12", "collections: corpus"):
        assert fact in text


def test_ls_of_one_space_shows_its_segments_and_what_it_has_of_collections(store):
    prefix = recipe().fingerprint[:6]
    (row,) = cachectl("ls", store, "--space", prefix, "--json").json()["spaces"]
    files = {path.name: path.stat().st_size for path in segment_files(folder(store))}
    assert {one["name"]: one["nbytes"] for one in row["segment_list"]} == files
    assert row["coverage"] == [{"collection": "corpus", "documents": 4, "present": 3}]
    text = cachectl("ls", store, "--space", prefix).out
    assert all(name in text for name in files)
    assert "3 of 4 documents" in text


@each()
def test_du_adds_up(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    with actcache.open(url) as opened, opened.space(recipe()) as space:
        put(space, range(10))
        opened.put_collection("c", [key(1)])
    (tmp_path / "store" / "tmp").mkdir(exist_ok=True)
    (tmp_path / "store" / "tmp" / "left").write_bytes(bytes(1234))
    found = cachectl("du", url, "--json").json()
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert found["nbytes"] == sum(path.stat().st_size for path in files)
    assert found["parts"]["temporary"] == 1234
    assert found["parts"]["collections"] == sum(
        path.stat().st_size for path in files if path.parent.name == "collections"
    )
    part = by_space(found)[recipe().fingerprint]["parts"]
    assert part["segments" if kind.segmented else "lmdb"] > 0
    blobs = [path for path in (tmp_path / "store/spaces" / recipe().fingerprint).iterdir() if path.is_file()]
    assert part["blobs"] == sum(path.stat().st_size for path in blobs)
    assert "1.2 KiB" in cachectl("du", url).out


def test_verify_finds_what_is_wrong_and_repair_mends_it(store):
    assert cachectl("verify", store).code == 0
    segment = segment_files(folder(store))[1]
    flip(segment)
    result = cachectl("verify", store, "--json")
    found = json.loads(result.out)
    assert result.code == 4
    corrupt = by_space(found)[recipe().fingerprint]["corrupt"]
    assert len(corrupt) == 1
    assert corrupt[0] in {key(n).hex() for n in range(12)}
    assert by_space(found)[recipe(layer=2, model="other/model").fingerprint]["intact"]
    assert "repair" in cachectl("verify", store).out
    assert cachectl("verify", store, "--space", recipe(layer=2, model="other/model").fingerprint).code == 0
    done = cachectl("repair", store, "--json").json()
    assert by_space(done)[recipe().fingerprint] == {
        "space": recipe().fingerprint,
        "quarantined": corrupt,
        "set_aside": [],
    }
    assert cachectl("verify", store).code == 0
    (bad,) = [n for n in range(12) if key(n).hex() == corrupt[0]]
    with actcache.open(store, "r") as opened, opened.space(recipe()) as space:
        check(space, {n: 0 for n in range(12) if n != bad}, range(12))
    assert "intact" in cachectl("repair", store).out


def test_verify_a_sample(store):
    found = cachectl("verify", store, "--sample", 4, "--json").json()
    assert [one["entries"] for one in found["spaces"]] == [4, 4]
    flip(segment_files(folder(store))[1])
    codes = {cachectl("verify", store, "--sample", 6).code for _ in range(20)}  # half of the entries each time
    assert codes == {0, 4}


@each()
def test_verify_finds_damaged_spans_among_entries_of_all_kinds(kind, tmp_path):
    url, numbers = kind.url(tmp_path / "store"), range(12)
    spans = {n: np.full((length(n), 2), 1000 + n, np.int32) for n in numbers}
    with actcache.open(url) as opened, opened.space(recipe()) as space:
        put(space, range(4))
        for some, more in ((range(4, 8), False), (range(8, 12), True)):
            types = [np.ones(length(n), np.int8) for n in some] if more else None
            entries = [[key(n) for n in some], [rows(n) for n in some], [ids(n) for n in some]]
            space.put(*entries, spans=[spans[n] for n in some], type_ids=types)
    assert cachectl("verify", url).code == 0
    for n in (5, 10):
        for path in (tmp_path / "store").rglob("*"):
            data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
            if (at := data.find(spans[n].tobytes())) >= 0:
                data[at] ^= 1
                path.write_bytes(data)
    result = cachectl("verify", url, "--json")
    assert result.code == 4
    (one,) = json.loads(result.out)["spaces"]
    assert set(one["corrupt"]) == {key(5).hex(), key(10).hex()}


def test_verify_reads_in_several_threads(store, monkeypatch):
    monkeypatch.setattr(maintenance, "available_cpus", lambda: 3)
    monkeypatch.setattr(maintenance, "_PART_BYTES", 100)
    meeting, real = threading.Barrier(3), maintenance.Space._corrupt
    met = []

    def slowly(space, keys):
        if not met:
            meeting.wait(90)  # breaks where fewer come
            met.append(1)
        return real(space, keys)

    monkeypatch.setattr(maintenance.Space, "_corrupt", slowly)
    with actcache.open(store, "r") as opened, opened.space(recipe()) as space:
        found = space.verify()
    assert (found.entries, found.corrupt, met) == (12, [], [1, 1, 1])


def test_one_damaged_recipe_hides_nothing_else(store):
    """Each command names the space, and goes on with the rest."""
    (folder(store) / "recipe.json").write_text('{"format_version": 1}')
    good, bad = recipe(layer=2, model="other/model").fingerprint, recipe().fingerprint
    for command in ("ls", "inspect", "verify"):
        result = cachectl(command, store, "--json")
        found = json.loads(result.out)
        assert result.code == (4 if command == "verify" else 0)
        names = list(by_space(found))
        assert names == [good]
        assert "recipe" in found["unreadable"][bad]
        assert bad[:12] in cachectl(command, store).out
    assert set(by_space(cachectl("du", store, "--json").json())) == {good, bad}
    for command in ("repair", "compact"):
        result = cachectl(command, store, "--json")
        assert result.code == 4
        assert (list(by_space(json.loads(result.out))), list(json.loads(result.out)["unreadable"])) == ([good], [bad])
    with actcache.open(store, "r") as opened:
        with pytest.raises(UsageError):
            inspection.select_spaces(opened, ["ffff-none"])
        with pytest.raises(SpaceNotFoundError, match="other/model"):  # and not what is wrong with another space
            opened.space(recipe(layer=3))


def test_a_space_without_a_recipe_is_named(store):
    (folder(store) / "recipe.json").unlink()
    found = cachectl("ls", store, "--json").json()
    assert "no recipe.json" in found["unreadable"][recipe().fingerprint]
    assert len(found["spaces"]) == 1


def test_a_newer_space_is_named(store):
    path = folder(store) / "recipe.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    assert "upgrade" in cachectl("ls", store, "--json").json()["unreadable"][recipe().fingerprint]


def test_compact(store):
    done = by_space(cachectl("compact", store, "--grace", 0, "--json").json())[recipe().fingerprint]
    assert (done["segments_merged"], done["segments_written"]) == (3, 1)
    assert cachectl("compact", store, "--grace", 0).code == 0
    assert len(segment_files(folder(store))) == 1
    with actcache.open(store, "r") as opened, opened.space(recipe()) as space:
        check(space, dict.fromkeys(range(12), 0), range(14))
    assert "--target" in cachectl("compact", store, "--target", "much").refused(2)


def test_looking_changes_nothing(store):
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    for command in LOOKING:
        assert cachectl(command, store).code == 0
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_a_prefix_fits_one_space(store):
    for command in ("ls", "inspect", "verify", "repair", "compact"):
        assert "no space begins with" in cachectl(command, store, "--space", "zz").refused(2)
        assert "no space begins with" in cachectl(command, store, "--space", "").refused(2)


def test_help_tells_the_exit_codes():
    shown = " ".join(cachectl("--help").out.split())
    assert all(f"{code} " in shown for code in (0, 2, 3, 4, 5))
    assert "130 interrupted" in shown
    for command, said in (("verify", "further off"), ("repair", "left alone"), ("export", "nothing is written")):
        assert said in " ".join(cachectl(command, "--help").out.split())
