"""``cachectl inspect`` of a space and a segment, and ``ls --tree``: against what was put."""

from __future__ import annotations

import getpass
import json
import os
import pwd

import h5py
import numpy as np
import pytest

import actcache
from actcache.admin import report
from actcache.admin.report.statistics import Numbers
from actcache.errors import UsageError
from actcache.format.codecs import floats
from tests.cli.inspected import COUNT, NAME, damage, filled, strict
from tests.cli.running import cachectl
from tests.support import compact, key, make_store, put, recipe, rows, segment_files
from tests.support.backends import each


@pytest.fixture
def store(tmp_path):
    return filled(tmp_path / "store")


# --- a space ----------------------------------------------------------------------------------------------------------


@each()
def test_a_space_in_full(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT), segments=3, provenance={"device": "abacus"})
    with actcache.open(url) as opened, opened.space(recipe()) as space:
        put(space, range(5), version=1, overwrite=True)
        space.delete([key(29)])
    found = strict(cachectl("inspect", url, "--space", NAME[:8], "--all", "--json"))
    (space,) = found["spaces"]
    held = {n: rows(n, 1 if n < 5 else 0) for n in range(COUNT - 1)}
    lengths = np.array([len(values) for values in held.values()])
    everything = np.concatenate(list(held.values())).astype(np.float64)
    assert (space["entries"], space["tokens"]) == (len(held), lengths.sum())
    assert space["provenance"]["device"] == "abacus"
    assert space["identity"]["layer"] == 1
    assert space["owner"] == pwd.getpwuid(os.geteuid()).pw_name
    assert 0 <= space["written"] <= space["made"] + 1 < 600
    assert space["computed_bytes"] == lengths.sum() * 8 * 4
    assert space["bytes_per_token"] == pytest.approx(space["nbytes"] / lengths.sum())
    assert space["ratio"] == pytest.approx(space["nbytes"] / everything.size / 4)

    told = space["lengths"]
    assert (told["shortest"], told["longest"], told["mean"]) == (lengths.min(), lengths.max(), lengths.mean())
    assert told["median"] == np.median(lengths)
    assert (lengths <= told["p95"]).mean() >= 0.95 > (lengths < told["p95"]).mean()
    counts, _ = np.histogram(lengths, told["histogram"]["edges"])
    assert told["histogram"]["counts"] == counts.tolist()
    assert sum(counts) == len(held)

    sample = space["sample"]
    assert (sample["entries"], sample["of"], sample["corrupt"]) == (len(held), len(held), [])
    statistics, norms = sample["statistics"], np.linalg.norm(everything, axis=1)
    assert statistics["mean"] == pytest.approx(everything.mean())
    assert statistics["std"] == pytest.approx(everything.std())
    for name, norm in (("norm_min", norms.min()), ("norm_mean", norms.mean()), ("norm_max", norms.max())):
        assert statistics[name] == pytest.approx(norm)
    assert sum(statistics["norms"]["counts"]) == len(norms)

    segments = space["segment_list"]
    assert sum(one["entries"] for one in segments) == len(held)
    assert sum(one["tokens"] for one in segments) == lengths.sum()
    if kind.segmented:
        folder = tmp_path / "store" / "spaces" / NAME
        assert {one["name"] for one in segments} == {path.name for path in segment_files(folder)}
    shown = cachectl("inspect", url, "--space", NAME[:8]).out
    for fact in ("abacus", f"{len(held)} entries", "tokens of an entry: 1 to 9", "norms", "0 NaN", "intact", "█"):
        assert fact in shown
    assert found["store"] == url


def test_segments_are_what_their_files_say(store):
    folder = store / "spaces" / NAME
    os.utime(segment_files(folder)[1], (0, segment_files(folder)[1].stat().st_mtime - 3600))
    (space,) = strict(cachectl("inspect", store, "--space", NAME, "--json"))["spaces"]
    for one, path in zip(space["segment_list"], segment_files(folder), strict=True):
        with h5py.File(path) as file:
            assert (one["entries"], one["tokens"]) == (len(file["keys"]), len(file["values"]))
        assert (one["name"], one["nbytes"], one["state"]) == (path.name, path.stat().st_size, "served")
    assert [round(one["age"] / 3600) for one in space["segment_list"]] == [0, 1, 0]


def test_a_sample_is_drawn_by_its_seed(store):
    def drawn(*options):
        return strict(cachectl("inspect", store, "--space", NAME, "--json", *options))["spaces"][0]["sample"]

    assert drawn("--sample", 7) == drawn("--sample", 7)
    assert (drawn("--sample", 7)["entries"], drawn("--sample", 7)["of"]) == (7, COUNT)
    assert len({json.dumps(drawn("--sample", 7, "--seed", seed)) for seed in range(5)}) > 1
    nothing = drawn("--sample", 0)
    assert (nothing["entries"], nothing["statistics"]["norm_min"], nothing["corrupt"]) == (0, None, [])
    with actcache.open(store, "r") as opened:
        for options in ({"sample": -1}, {"seed": -1}):
            with pytest.raises(UsageError):
                report.store_detail(opened, **options)
    cachectl("inspect", store, "--space", NAME, "--sample", -1).refused(2)


def test_what_is_corrupt_is_named_and_left_out(store):
    bad = {damage(segment_files(store / "spaces" / NAME)[1], entry) for entry in (0, 3)}
    result = cachectl("inspect", store, "--space", NAME, "--all", "--json")
    assert result.code == 4
    sample = strict(result)["spaces"][0]["sample"]
    assert {bytes.fromhex(name) for name in sample["corrupt"]} == bad
    good = [n for n in range(COUNT) if key(n) not in bad]
    everything = np.concatenate([rows(n) for n in good]).astype(np.float64)
    assert sample["statistics"]["tokens"] == len(everything)
    assert sample["statistics"]["std"] == pytest.approx(everything.std())
    shown = cachectl("inspect", store, "--space", NAME, "--all")
    assert "2 fail their checksums" in shown.out
    assert all(name.hex() in shown.out for name in bad)
    assert cachectl("inspect", store, "--space", NAME, "--sample", 0).code == 0
    assert cachectl("inspect", store).code == 0  # reads no entries


def test_what_is_no_number_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(floats, "_all_finite", lambda rows: True)
    values = np.ones((5, 8), np.float32)
    values[0, :3], values[1, 0], values[2, 0], values[3] = np.nan, np.inf, -np.inf, 0
    with actcache.open(tmp_path / "store") as opened, opened.space(recipe()) as space:
        space.put([key(0)], [values])
    statistics = strict(cachectl("inspect", tmp_path / "store", "--space", NAME, "--json"))["spaces"][0]["sample"]
    statistics = statistics["statistics"]
    assert (statistics["nan"], statistics["infinite"], statistics["zero_rows"]) == (3, 2, 1)
    assert (statistics["norm_min"], statistics["norm_max"]) == (0, pytest.approx(8**0.5))
    assert statistics["mean"] == pytest.approx(values[np.isfinite(values)].mean())


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_statistics_piece_by_piece_are_those_of_the_whole(dtype):
    """Also where the mean is far larger than the deviation, and beyond what squares in float32 hold."""
    rng = np.random.default_rng(3)
    scale = 1e4 if dtype == np.float16 else 1e30
    for values in (rng.normal(100, 0.1, (5000, 16)), rng.normal(0, scale, (400, 16))):
        given = values.astype(dtype)
        numbers = Numbers()
        for part in np.array_split(given, 7):
            numbers.add(part)
        found, wide = numbers.statistics(), given.astype(np.float64)
        assert found.mean == pytest.approx(wide.mean(), rel=1e-9, abs=1e-9 * scale)
        assert found.std == pytest.approx(wide.std(), rel=1e-9)
        norms = np.linalg.norm(wide, axis=1)
        assert (found.norm_min, found.norm_max) == (pytest.approx(norms.min()), pytest.approx(norms.max()))
        counts, _ = np.histogram(norms, found.norms.edges)
        assert list(found.norms.counts) == counts.tolist()
        assert len(counts) <= 32


@pytest.mark.parametrize("longest", [1, 7, 24, 25, 512, 8192, 10**9])
def test_lengths_are_counted_in_round_ranges(longest):
    lengths = np.random.default_rng(longest).integers(1, longest + 1, 1000)
    lengths[0] = longest
    found = report.Lengths.of(lengths).histogram
    widths = set(np.diff(found.edges).tolist())
    assert len(widths) == 1
    assert str(int(widths.pop())).rstrip("0") in ("1", "2", "5")
    assert len(found.counts) <= 24
    assert list(found.counts) == np.histogram(lengths, found.edges)[0].tolist()
    assert sum(found.counts) == 1000


# --- a segment --------------------------------------------------------------------------------------------------------


@each()
def test_a_segment(kind, tmp_path):
    url = kind.url(tmp_path / "store")
    make_store(url, range(COUNT), segments=3, provenance={"device": "abacus"})
    listed = strict(cachectl("inspect", url, "--space", NAME, "--json"))["spaces"][0]["segment_list"]
    for one in listed:
        found = strict(cachectl("inspect", url, "--segment", one["name"], "--json", "--all"))
        assert {**found["segment"], "age": 0} == {**one, "age": 0}
        assert found["sample"]["entries"] == one["entries"] == found["lengths"]["entries"]
        assert found["sample"]["statistics"]["tokens"] == one["tokens"]
        assert (found["space"], found["intact"]) == (NAME, True)
    shown = cachectl("inspect", url, "--segment", listed[0]["name"]).out
    for fact in (listed[0]["name"], f"by {getpass.getuser()}", "abacus", "served", "intact"):
        assert fact in shown


def test_segments_that_are_replaced_damaged_or_not_there(store):
    folder = store / "spaces" / NAME
    first, second, third = (path.name for path in segment_files(folder))
    assert cachectl("inspect", store, "--segment", first.split(".")[0]).code == 0
    damage(folder / "segments" / second)
    result = cachectl("inspect", store, "--segment", second, "--all", "--json")
    assert (result.code, len(strict(result)["sample"]["corrupt"])) == (4, 1)
    data = (folder / "segments" / third).read_bytes()
    (folder / "segments" / third).write_bytes(data[:-50])
    result = cachectl("inspect", store, "--segment", third, "--json")
    assert (result.code, strict(result)["segment"]["state"]) == (4, "damaged")
    assert "truncated" in cachectl("inspect", store, "--segment", third).out
    (folder / "segments" / third).write_bytes(data)
    with actcache.open(store) as opened, opened.space(recipe()) as space:
        space.repair()
        compact(space, grace=600)
    shown = strict(cachectl("inspect", store, "--segment", first, "--json"))
    assert (shown["segment"]["state"], shown["segment"]["entries"]) == ("unused", 0)
    assert "segments begin with 0000" in cachectl("inspect", store, "--segment", "0000").refused(2)
    for name in ("ffff", ""):
        assert "ls --tree" in cachectl("inspect", store, "--segment", name).refused(2)


# --- ls --tree --------------------------------------------------------------------------------------------------------


def test_the_tree(store):
    make_store(store, range(5), layer=2)
    with actcache.open(store) as opened:
        opened.put_collection("corpus", [key(n) for n in (0, 1, 7, 50)])
    found = strict(cachectl("ls", store, "--tree", "--json"))
    assert found["collection_list"] == [{"collection": "corpus", "documents": 4}]
    branches = {one["space"]: one for one in found["spaces"]}
    assert [one["entries"] for one in branches[NAME]["segment_list"]] == [10, 10, 10]
    assert branches[NAME]["coverage"] == [{"collection": "corpus", "documents": 4, "present": 3}]
    assert branches[recipe(layer=2).fingerprint]["coverage"] == [{"collection": "corpus", "documents": 4, "present": 2}]
    lines = cachectl("ls", store, "--tree").out.splitlines()
    assert lines[0] == str(store)
    for fact in (f"space {NAME[:12]}  tests layer 1 float32: 30 entries", "collection corpus: 3 of 4 documents"):
        assert len([line for line in lines if fact in line]) == 1
    assert len([line for line in lines if "10 entries" in line]) == 3
    (store / "collections" / "corpus.safetensors").write_bytes(b"x")
    found = strict(cachectl("ls", store, "--tree", "--json"))
    assert isinstance(found["collection_list"][0]["error"], str)
    assert cachectl("ls", store, "--tree", "--space", NAME[:5]).code == 0
    cachectl("ls", store, "--tree", "--space", "zz").refused(2)
