"""``cachectl bench``: what it measures is what it says, cold is cold, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import json
import math
import mmap
import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from actcache.admin import benchmark
from actcache.admin.benchmark import SHAPES, Shape, Spread, disk, limits, plot
from actcache.admin.benchmark.caches import evict, evict_surely, resident
from actcache.admin.benchmark.corpus import Documents, StoredCorpus
from actcache.admin.benchmark.limits import FlatFile
from actcache.errors import MissingExtraError, StorageIOError
from actcache.io import loops
from actcache.io.files import mount_of
from tests.cli.running import cachectl
from tests.support import MEMORY_FOLDER

TINY = ("--shape", "tiny", "--size", "3MiB", "--rounds", "3", "--quiet")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A shape whose batches are small."""
    monkeypatch.setitem(SHAPES, "tiny", Shape("tiny", 8, 48, 384, 32))


@pytest.fixture
def on_disk():
    """A folder on a disk, for ``tmp_path`` may be in memory."""
    folder = Path(tempfile.mkdtemp(prefix="actcache-test-", dir="/var/tmp"))
    try:
        if mount_of(folder)[1] in ("tmpfs", "ramfs", ""):
            pytest.skip("no folder on a disk")
        yield folder
    finally:
        shutil.rmtree(folder)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_figures_are_medians_of_paired_rounds(on_disk):
    """Computed again from the seconds of the rounds."""
    given = ("bench", on_disk, "--backend", "hdf5", "--backend", "lmdb", "--mode", "cold", "--mode", "warm", *TINY)
    found = cachectl(*given, "--json").json()
    assert list(on_disk.iterdir()) == []
    assert found["command"].startswith(f"cachectl bench {on_disk} --backend hdf5")
    assert {"processor", "system", "folder", "load"} <= found["facts"].keys()
    assert {"actcache", "numpy", "h5py"} <= found["versions"].keys()
    assert [one["mode"] for one in found["comparisons"]] == ["cold", "warm"]
    for one in found["comparisons"]:
        seconds = {row["name"]: np.array(row["seconds"]) for row in one["contestants"]}
        speeds = {row["name"]: row["gb_per_s"] for row in one["contestants"]}
        nbytes = np.array(one["bytes_read"])
        if one["mode"] == "cold":
            limit, together = seconds[one["limit"]], seconds[one["one_coalesced_read"]]
            raw = ("direct x8", "direct x16", "native direct x16", "native direct x32")
            assert np.median(limit) == min(np.median(seconds[name]) for name in raw)
        else:
            limit = sum(seconds[part] for part in one["limit"].split(" + "))
            together = sum(seconds[part] for part in one["one_coalesced_read"].split(" + "))
            ways = ("native", "index_select", "memcpy", "preadv", "take")
            raw = [name for name in seconds if name.split(" x")[0] in ways]
            assert np.median(seconds[one["limit"].split(" + ")[0]]) == min(np.median(seconds[name]) for name in raw)
        for name in ("hdf5", "lmdb"):
            (row,) = [row for row in one["contestants"] if row["name"] == name]
            np.testing.assert_allclose(row["of_the_limit"]["median"], np.median(limit / seconds[name]))
            np.testing.assert_allclose(row["of_one_coalesced_read"]["median"], np.median(together / seconds[name]))
            np.testing.assert_allclose(speeds[name]["median"], np.median(nbytes / seconds[name] / 1e9))


def test_the_text_is_enough_for_a_sceptic(tmp_path):
    short = cachectl("bench", tmp_path, "--backend", "hdf5", "--mode", "warm", *TINY).out
    assert (
        len([line for line in short.splitlines() if "[" in line and line.strip()[0].isalnum()]) == 4
    )  # and the rounds
    out = cachectl("bench", tmp_path, "--backend", "hdf5", "--mode", "warm", "--verbose", *TINY).out
    for word in (
        "cachectl bench",
        "processor:",
        "folder:",
        "versions: actcache",
        "the limit:",
        "[95 % interval]",
        "hdf5",
    ):
        assert word in out
    assert "[bold]" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [9, 15, 25])
def test_intervals_hold_the_median_in_95_of_100_cases(count):
    """By the binomial: the true median lies between two order statistics unless too many figures fall on one side."""
    spread = Spread.of(list(range(count)))
    low, high = int(spread.low), int(spread.high)
    covered = sum(math.comb(count, below) for below in range(low + 1, high + 1)) / 2**count
    assert covered >= 0.95
    assert spread.median == (count - 1) / 2


# --- cold -------------------------------------------------------------------------------------------------------------


def test_evicted_is_not_in_memory(on_disk):
    path = on_disk / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        file.read()
    assert resident(on_disk) == 1
    evict(on_disk)
    assert resident(on_disk) == 0
    path.read_bytes()
    assert evict_surely(on_disk, 0.0) == 0


def test_pages_that_stay_are_an_error(on_disk):
    """As on a file system that keeps what it was asked to drop; here somebody has them mapped."""
    path = on_disk / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            assert len(bytes(memory)) == 1 << 20
            with pytest.raises(StorageIOError, match="stayed in memory"):
                evict_surely(on_disk, 0.001)


def test_a_cold_turn_reads_no_document_twice(on_disk, monkeypatch):
    turns = []
    given = StoredCorpus.turns

    def watched(*arguments):
        turns.extend(given(*arguments))
        return turns

    monkeypatch.setattr(StoredCorpus, "turns", watched)
    benchmark.run(on_disk, backends=["hdf5"], shapes=["tiny"], nbytes=2 << 20, rounds=1, batches=100)
    for turn in turns:
        read = np.concatenate(turn)
        assert len(set(read.tolist())) == len(read) >= 32


@pytest.mark.skipif(MEMORY_FOLDER is None, reason="no folder in memory")
def test_in_memory_there_is_no_cold_read():
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:
        assert "is memory" in cachectl("bench", folder, *TINY).refused(3)
        assert os.listdir(folder) == []


# --- the limit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("without", ["nothing", "torch", "compiler"])
def test_raw_ways_bring_the_right_rows(tmp_path, monkeypatch, without, padded):
    if without == "torch":
        monkeypatch.setattr(limits, "find_spec", lambda name: None)
    if without == "compiler":
        monkeypatch.setattr(loops, "missing", "there is no compiler")
    flat, which, documents = some_of_a_flat_file(tmp_path)
    width = max(map(len, documents))
    if padded:
        documents = [np.pad(rows, ((0, width - len(rows)), (0, 0))) for rows in documents]
    expected = np.concatenate(documents)
    ways = flat.warm(padded=padded)
    assert ("index_select" in ways) == (without != "torch")
    assert {"native x1", "native x2"} <= ways.keys() or without == "compiler"
    for read in ways.values():
        flat.smear()
        read(which)
        np.testing.assert_array_equal(flat.filled[: len(expected)], expected)
    flat.close()


def test_native_direct_reads_bring_the_right_rows(on_disk):
    flat, which, documents = some_of_a_flat_file(on_disk)
    expected = np.concatenate(documents)
    for name in ("native direct x16", "native direct x32"):
        flat.smear()
        flat.cold()[name](which)
        np.testing.assert_array_equal(flat.filled[: len(expected)], expected)
        flat.cold()[name](np.tile(which, 20))  # more than the buffer holds
    flat.close()


def test_native_digests_are_those_of_the_documents(tmp_path):
    """Packed, they lie in the buffer one after another, and each has a digest."""
    flat, which, documents = some_of_a_flat_file(tmp_path)
    wanted = [xxhash.xxh3_64_intdigest(rows.tobytes()) for rows in documents]
    for threads in (1, 2):
        flat.smear()
        flat.warm()[f"native x{threads}"](which)
        flat.digests()[f"xxh3 native x{threads}"](which)
        assert flat.sums.tolist() == wanted
    flat.close()


def some_of_a_flat_file(folder):
    """Return a flat file, some positions, and what lies there."""
    documents = Documents(SHAPES["tiny"], 1 << 20)
    corpus = StoredCorpus(documents, {}, {}, folder / "rows")
    flat = FlatFile(folder / "rows", corpus.lengths, 384, [corpus.buffer()], 2)
    which = np.random.default_rng(0).permutation(len(corpus.lengths))[:32]
    return flat, which, [documents.split()[i] for i in which]


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (StorageIOError("the disk is gone"), 3)])
def test_nothing_is_left_behind(tmp_path, monkeypatch, error, code):
    def broken(*arguments):
        raise error

    monkeypatch.setattr(disk, "warm", broken)
    cachectl("bench", tmp_path, "--mode", "warm", "--backend", "hdf5", *TINY).refused(code)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_by_a_sigterm(tmp_path, monkeypatch):
    given = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(disk, "warm", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    assert cachectl("bench", tmp_path, "--mode", "warm", "--backend", "hdf5", *TINY).code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is given


def test_what_is_kept(tmp_path):
    cachectl("bench", tmp_path, "--mode", "warm", "--backend", "hdf5", "--keep", *TINY)
    (kept,) = tmp_path.iterdir()
    assert (kept / "hdf5" / "actcache.json").exists()


def test_arguments_that_make_no_sense(tmp_path):
    for options, code, said in (
        (["--backend", "nonsense"], 2, "keeps a store in a folder; there are hdf5"),
        (["--backend", "s3"], 2, "keeps a store in a folder"),
        (["--mode", "tepid"], 2, "cold, warm"),
        (["--shape", "huge"], 2, "paper, short"),
        (["--size", "little"], 2, "8GiB"),
        (["--size", "900TiB", "--mode", "warm"], 3, "GiB free"),
        (["--plot", tmp_path / "plot.jpeg"], 2, "png"),
        (["--plot", tmp_path / "none" / "plot.png"], 2, "no folder"),
    ):
        if "--plot" in options and importlib.util.find_spec("matplotlib") is None:
            continue
        assert said in cachectl("bench", tmp_path, *options).refused(code)
    assert "no folder" in cachectl("bench", tmp_path / "none").refused(2)
    assert list(tmp_path.iterdir()) == []


def test_a_plot(tmp_path):
    pytest.importorskip("matplotlib")
    given = ("bench", tmp_path, "--mode", "warm", "--backend", "hdf5", *TINY)
    assert "plot.png" in cachectl(*given, "--plot", tmp_path / "plot.png").out
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[place : place + 4]) for place in (16, 20))
    assert width > 1000
    assert height > 200
    assert len(data) > 10_000
    assert json.loads(cachectl(*given, "--json", "--plot", tmp_path / "plot.svg").out)
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_without_matplotlib_it_says_so_before_anything_is_written(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(plot, "importlib", SimpleNamespace(import_module=missing))  # others' imports go on
    given = ("bench", tmp_path, "--mode", "warm", "--plot", tmp_path / "plot.png", *TINY)
    assert "pip install 'actcache[plots]'" in cachectl(*given).refused(2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingExtraError):
        plot.check(tmp_path / "plot.png")
