"""The benchmarks of this repository that look into the engine: they still run, and say what they should."""

import json
import sys

import pytest

from actcache.admin.benchmark import SHAPES, Shape
from actcache.errors import UsageError
from actcache.io import loops
from bench import stages, storage
from bench.threads import counts_of, sharing


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Run a command over tiny documents; return its tables by their titles."""
    monkeypatch.setitem(SHAPES, "short", Shape("short", 8, 48, 64, 64))

    def run(command, *options):
        path = tmp_path / "found.json"
        monkeypatch.setattr(sys, "argv", ["bench", *options, "--dir", str(tmp_path), "--json", str(path)])
        command.main()
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        return {table["title"]: table["rows"] for table in json.loads(path.read_text())["tables"] if "title" in table}

    return run


def test_what_a_batch_costs(given):
    tables = given(storage, *["--batch", "1,16", "--backends", "hdf5", "--gib", "0.0005", "--rounds", "2"])
    rows = {row[""]: row for title, table in tables.items() if title.endswith("batches of 16") for row in table}
    assert rows.keys() == {"memory-map loop", "native gather + digests", "hdf5: read_into", "hdf5: reader", "hdf5: get"}
    assert rows["memory-map loop"]["times as fast as the loop"]["median"] == 1
    assert all(0 < row["us a batch"]["median"] < 1e6 for row in rows.values())
    (medians,) = [table for title, table in tables.items() if "medians" in title]
    assert {row[""]: row["16"] for row in medians} == {name: row["us a batch"]["median"] for name, row in rows.items()}


def test_where_the_time_of_a_batch_goes(given):
    tables = given(stages, *["--batch", "16", "--threads", "1", "--callers", "1,2", "--gib", "0.0005", "--rounds", "2"])
    times, counts = tables.values()
    assert [row[""] for row in times] == [row[""] for row in counts]
    assert [row[""].split(",")[0] for row in times] == ["read_into", "read_into", "reader"]
    for row in times:
        assert row["GIL, us"] > 0
        assert row["native, us"] > 0
    assert all(1 <= row["calls of the loops"] <= 4 for row in counts)


def test_numbers_of_threads(monkeypatch):
    monkeypatch.setattr("bench.threads.available_cpus", lambda: 4)
    assert counts_of("1,2,4,8,16") == ([1, 2, 4], [8, 16])
    assert counts_of(None) == ([loops.THREADS], [])
    with pytest.raises(UsageError):
        counts_of("1,many")
    before = loops.THREADS
    with sharing(3):
        assert loops.THREADS == 3
    assert before == loops.THREADS
