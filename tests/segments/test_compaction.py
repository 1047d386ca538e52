"""Compaction: what is served stays the same, whoever deletes, puts, reads or compacts meanwhile."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import FormatError, OutOfSpaceError, UsageError
from actcache.format import safetensors as tensorfile
from actcache.segments import compaction
from actcache.segments import compaction as compactor
from actcache.store.space import Repair
from tests.support import check, ids, key, make_store, put, recipe, rows, segment_files

HELD = dict.fromkeys(range(20), 0)


@pytest.fixture(params=["hdf5", "zarr"])
def url(request, tmp_path):
    pytest.importorskip(request.param) if request.param == "zarr" else None
    return f"{request.param}:{tmp_path}/store"


@pytest.fixture
def folder(url):
    return Path(url.partition(":")[2]) / "spaces" / recipe().fingerprint


@pytest.fixture
def space(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        fill(space)
        yield space


def fill(space, segments=4):
    for part in np.array_split(range(20), segments):
        put(space, part.tolist())
        space.flush()


def another(url, **options):
    return actcache.open(url, **options).space(recipe())


def names(folder, kind):
    return sorted(os.listdir(folder / kind)) if (folder / kind).is_dir() else []


class Between:
    """Runs something of another process between the reading and the publishing of a compaction."""

    def __init__(self, monkeypatch, act):
        self.done = 0
        verify = compaction.Merger.verify

        def acting(merger, segment):
            verify(merger, segment)
            if not self.done:
                self.done += 1
                act()

        monkeypatch.setattr(compaction.Merger, "verify", acting)


def test_one_segment_has_what_many_had(url, folder, space):
    done = space.compact(grace=0)
    assert (done.segments_merged, done.segments_written, done.segments_removed) == (4, 1, 4)
    assert done.bytes_freed > 0
    assert len(segment_files(folder)) == space.usage().segments == 1
    check(space, HELD, range(25))
    check(another(url, mode="r"), HELD, range(25))
    assert space.verify().intact
    assert space.compact(grace=0) == actcache.backend.Compaction()  # there is nothing left to do


def test_space_is_given_back(url, folder, space):
    before = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    space.delete([key(n) for n in range(15)])
    put(space, [16], version=1, overwrite=True)
    space.compact(grace=0)
    held = {15: 0, 16: 1, 17: 0, 18: 0, 19: 0}
    check(space, held, range(25))
    check(another(url), held, range(25))
    assert space.usage().tokens == sum(map(len, (rows(n, v) for n, v in held.items())))
    assert (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < before * 0.7
    )  # small arrays take a page each


def test_nothing_is_left_of_a_space_that_was_emptied(folder, space):
    space.delete([key(n) for n in range(20)])
    assert space.compact(grace=0).segments_removed == 4
    assert segment_files(folder) == []
    put(space, [3], version=1)
    space.flush()
    check(space, {3: 1}, range(25))


def test_replaced_segments_stay_for_their_readers(url, folder, space):
    reader = another(url, mode="r")
    assert space.compact().segments_removed == 0
    assert len(segment_files(folder)) == 5
    assert space.usage().segments == 1
    check(reader, HELD, range(25))
    space.compact(grace=0)
    assert len(segment_files(folder)) == 1
    check(reader, HELD, range(25))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_reader_whose_segments_are_gone_looks_again(url, space, mapped):
    reader = another(url, mode="r", mapped=mapped)
    space.compact(grace=0)
    put(space, [2, 30], version=1, overwrite=True)
    space.flush()
    found = reader.get([key(n) for n in (0, 2, 19, 30)])
    assert all(entry is not None for entry in found[:3])
    assert any(np.array_equal(found[1].activations, rows(2, version)) for version in (0, 1))
    out = np.empty((200, 8), np.float32)
    reader.read_into([key(n) for n in range(5)], out)
    batches = list(another(url, mode="r", mapped=mapped).reader([key(n) for n in range(20)], batch_size=3))
    assert sum(len(batch.keys) for batch in batches) == 20


def test_a_deletion_that_arrives_meanwhile_applies(url, folder, space, monkeypatch):
    between = Between(monkeypatch, lambda: another(url).delete([key(3), key(18)]))
    space.compact(grace=0)
    assert between.done
    held = {n: 0 for n in HELD if n not in (3, 18)}
    check(space, held, range(25))
    space.compact(grace=0, waste=0)
    check(space, held, range(25))
    check(another(url), held, range(25))


def test_what_is_put_again_meanwhile_is_served(url, space, monkeypatch):
    def act():
        other = another(url)
        put(other, [3, 4], version=1, overwrite=True)
        other.delete([key(5)])
        put(other, [5], version=2)
        other.close()

    Between(monkeypatch, act)
    space.compact(grace=0)  # publishes the old copies of 3, 4 and 5 under a later name
    held = {**HELD, 3: 1, 4: 1, 5: 2}
    check(space, held, range(25))
    for _ in range(2):
        space.compact(grace=0, waste=0)
        check(space, held, range(25))
        check(another(url), held, range(25))


def test_two_compactors_at_once_only_duplicate(url, folder, space, monkeypatch):
    other = another(url)
    Between(monkeypatch, lambda: other._driver.compact(target_bytes=1 << 30, waste=0.1, grace=1e9))
    space.compact(grace=1e9)
    assert len(segment_files(folder)) == 6
    check(space, HELD, range(25))
    assert len(space) == 20
    # A deletion by somebody who sees one of the two only, when the other comes later, deletes both.
    other.delete([key(7)])
    held = {n: 0 for n in HELD if n != 7}
    for one in (space, other, another(url)):
        one.refresh()
        check(one, held, range(25))
    space.compact(grace=0)
    other.compact(grace=0)
    assert len(segment_files(folder)) == 1
    check(another(url), held, range(25))


def test_a_slow_compactor_brings_nothing_back(url, folder, space, monkeypatch):
    """While one compacts, another compacts, deletes, and compacts what it has compacted."""

    def act():
        other = another(url)
        other.compact(grace=0)
        other.delete([key(7), key(8)])
        put(other, [8], version=1)
        other.compact(grace=0, waste=0)
        other.compact(grace=0, waste=0)
        other.close()

    Between(monkeypatch, act)
    space.compact(grace=0)
    held = {n: 0 for n in HELD if n != 7} | {8: 1}
    for _ in range(3):
        check(space, held, range(25))
        check(another(url), held, range(25))
        space.compact(grace=0, waste=0)
    assert len(segment_files(folder)) == 1


def test_a_compactor_that_is_too_late_publishes_nothing(url, folder, space, monkeypatch):
    monkeypatch.setattr(compaction, "SECONDS", -1.0)
    before = names(folder, "segments")
    assert space.compact(grace=0).segments_written == 0
    assert names(folder, "segments") == before


def test_a_copy_that_differs_is_not_published(url, folder, space, monkeypatch):
    write = type(space._driver.catalog._format).write

    def wrong(self, path, block, metadata):
        write(self, path, block, metadata)
        # A disk, or memory, that flips a bit.
        file = next(p for p in ([path] if path.is_file() else sorted(path.glob("values/c*"))))
        data = bytearray(file.read_bytes())
        where = data.index(np.float32(rows(9)[0, 0]).tobytes() + np.float32(rows(9)[0, 1]).tobytes())
        data[where + 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(type(space._driver.catalog._format), "write", wrong)
    before = names(folder, "segments")
    space.compact(grace=0)
    assert names(folder, "segments") == before
    check(space, HELD, range(25))


def test_a_lost_copy_brings_back_what_it_replaced_but_nothing_deleted(url, folder, space):
    put(space, [2], version=1, overwrite=True)
    space.flush()
    space.compact()
    space.delete([key(2), key(3)])
    newest = segment_files(folder)[-1]
    space.close()
    with actcache.open(url) as store:
        os.rename(newest, folder.parent / "lost")
        with store.space(recipe()) as again:
            check(again, {n: 0 for n in HELD if n not in (2, 3)}, range(25))


def test_extras_and_entries_without_token_ids(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        for n in range(6):
            spans = {"spans": [np.full((len(rows(n)), 2), n)]} if n > 2 else {}
            space.put([key(n)], [rows(n)], None if n < 2 else [ids(n)], **spans)
            space.flush()
        assert space.compact(grace=0).segments_written == 2  # entries that lie together have the same arrays
        assert space.compact(grace=0, waste=0).segments_written == 3  # each is rewritten alone
        for n, entry in enumerate(space.get([key(n) for n in range(6)])):
            np.testing.assert_array_equal(entry.activations, rows(n))
            assert (entry.token_ids is None) == (n < 2)
            assert ("spans" in entry.extras) == (n > 2)
            assert n < 3 or (entry.extras["spans"] == n).all()
        assert space.verify().intact


def test_many_small_flushes_are_merged_by_the_writer(url, folder):
    with actcache.open(url) as store, store.space(recipe()) as space:
        for n in range(100):
            put(space, [n])
            space.flush()
        assert space.usage().segments < 35
        assert len(space._driver._tiers) < 35  # what was merged is merged again, when there is enough of its size
        check(space, dict.fromkeys(range(100), 0), range(105))
        space.compact(grace=0)
        assert space.usage().segments == 1
    check(another(url), dict.fromkeys(range(100), 0), range(105))


def test_deletions_are_joined_and_forgotten(url, folder, space, monkeypatch):
    for n in range(5):
        space.delete([key(n)])
    space.compact(grace=0)
    assert len(names(folder, "tombstones")) == 5  # a compactor that had begun before may bring their entries yet
    for module in (compaction, compactor):
        monkeypatch.setattr(module, "SECONDS", 0.0 if module is compactor else 1800.0)
    space.compact(grace=0)
    assert names(folder, "tombstones") == []
    held = {n: 0 for n in HELD if n > 4}
    check(space, held, range(25))
    space.delete([key(5)])
    space.delete([key(6)])
    space.compact(grace=0, waste=0.9)  # nothing is rewritten: the deletions are still needed, in one file
    assert len(names(folder, "tombstones")) == 1
    held = {n: 0 for n in HELD if n > 6}
    check(another(url), held, range(25))


def test_a_damaged_source_stays_where_it_is(url, folder, space):
    file = segment_files(folder)[1]
    file = file if file.is_file() else file / "keys/c.0.0"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    space.close()
    with actcache.open(url) as store, store.space(recipe()) as space:
        space.compact(grace=0)
        assert file.exists()
        assert len(space.damaged()) == 1
        held = {n: 0 for n in HELD if n not in range(5, 10)}
        check(space, held, range(25))
        file.write_bytes(data)  # a copy of it turns up
        space.refresh()
        check(another(url), HELD, range(25))


def test_memory_stays_small(tmp_path):
    """64 MiB in four segments: the rows go through in pieces."""
    import tracemalloc

    wide = recipe(hidden_size=1024)
    with actcache.open(tmp_path / "store") as store, store.space(wide) as space:
        for n in range(4):
            space.put([key(n)], [np.random.default_rng(n).standard_normal((4096, 1024), np.float32)])
            space.flush()
        gc.collect()
        tracemalloc.start()
        assert space.compact(grace=0).segments_written == 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 56 << 20
        assert space.verify().intact


def test_no_space_for_the_copy(url, folder, space, monkeypatch):
    def full(self, path, block, metadata):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(space._driver.catalog._format), "write", full)
        with pytest.raises(OutOfSpaceError):
            space.compact(grace=0)
    check(space, HELD, range(25))
    assert space.compact(grace=0).segments_removed == 4
    check(space, HELD, range(25))


@pytest.mark.parametrize("rounds", [4, pytest.param(12, marks=pytest.mark.long)])
def test_readers_in_threads_while_it_is_compacted(url, space, rounds):
    reader = another(url, mode="r", mapped=False)
    stop, failures = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                check(reader, HELD, range(25))
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(rounds):
        put(space, [100 + step])
        space.compact(grace=0, waste=0)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


# --- verify and repair -----------------------------------------------------------------------------------------------


def damage(folder, number):
    """Flip a bit in the activations of a document."""
    needle = rows(number)[0].tobytes()
    for file in sorted(path for path in (folder / "segments").rglob("*") if path.is_file()):
        data = bytearray(file.read_bytes())
        if needle in data:
            data[data.index(needle)] ^= 4
            file.write_bytes(data)
            return
    raise AssertionError(number)


def test_verify_finds_and_repair_quarantines(url, folder, space):
    seen = []
    assert space.verify(lambda done, total: seen.append((done, total))).intact
    assert seen[-1] == (20, 20)
    damage(folder, 7)
    damage(folder, 12)
    found = space.verify()
    assert sorted(found.corrupt) == sorted([key(7), key(12)])
    assert not found.intact
    repaired = space.repair()
    assert sorted(repaired.quarantined) == sorted([key(7), key(12)])
    held = {n: 0 for n in HELD if n not in (7, 12)}
    check(space, held, range(25))
    check(another(url), held, range(25))
    assert space.verify().intact
    put(space, [7, 12])
    check(space, HELD, range(25))
    # The bytes are kept, and any safetensors reader opens them.
    from safetensors.numpy import load_file

    (file,) = (folder / "quarantine").iterdir()
    kept = load_file(file)
    assert {row.tobytes() for row in kept["keys"]} == {key(7), key(12)}
    good = rows(7)
    i = [row.tobytes() for row in kept["keys"]].index(key(7))
    found = kept["values"][kept["offsets"][i] : kept["offsets"][i + 1]]
    assert found.shape == good.shape
    assert (found != good).sum() == 1


def test_repair_does_not_serve_an_older_copy(url, folder, space):
    put(space, [7], version=1, overwrite=True)
    space.flush()
    needle = rows(7, 1)[0].tobytes()
    for file in sorted(path for path in (folder / "segments").rglob("*") if path.is_file()):
        data = bytearray(file.read_bytes())
        if needle in data:
            data[data.index(needle)] ^= 4
            file.write_bytes(data)
    space.repair()
    check(space, {n: 0 for n in HELD if n != 7}, range(25))


def test_repair_sets_an_unreadable_segment_aside(url, folder, space):
    space.close()
    victim = segment_files(folder)[2]
    file = victim if victim.is_file() else victim / "zarr.json"
    file.write_bytes(b"nothing")
    for path in (folder / "index").iterdir():
        path.unlink()
    with actcache.open(url) as store, store.space(recipe()) as space:
        found = space.verify()
        assert list(found.damaged) == [victim.stem]
        assert space.repair(found).set_aside == [victim.stem]
        assert space.verify().intact
        assert (folder / "quarantine" / victim.name).exists()
        check(space, {n: 0 for n in HELD if n not in range(10, 15)}, range(25))
        put(space, range(10, 15))
        space.flush()
        check(another(url), HELD, range(25))


def test_what_only_the_index_can_read_is_written_anew(url, folder, space):
    space.close()
    with actcache.open(url) as store:
        store.space(recipe()).compact(grace=0)  # the index covers the one segment that there is
    victim = segment_files(folder)[0]
    if victim.is_file():
        os.rename(victim, folder / "aside")
        data = bytearray((folder / "aside").read_bytes())
        data[:8] = bytes(8)  # the signature of HDF5
        victim.write_bytes(data)
    else:
        (victim / "zarr.json").write_bytes(b"nothing")
    with actcache.open(url) as store, store.space(recipe()) as space:
        check(space, HELD, range(25))
        assert list(space.verify().damaged) == [victim.stem]
        assert space.repair().set_aside == [victim.stem]
        check(space, HELD, range(25))
        assert space.verify().intact
    for path in (folder / "index").iterdir():
        path.unlink()
    check(another(url), HELD, range(25))


def test_verify_changes_nothing_and_works_read_only(url, folder, space):
    damage(folder, 7)
    reader = another(url, mode="r")
    assert reader.verify().corrupt == [key(7)]
    with pytest.raises(actcache.errors.ReadOnlyError):
        reader.repair()
    with pytest.raises(actcache.errors.ReadOnlyError):
        reader.compact()


def test_an_empty_space(url):
    with actcache.open(url) as store, store.space(recipe()) as space:
        assert space.verify().entries == 0
        assert space.repair().quarantined == []
        assert space.compact().segments_written == 0


# --- what killed writers leave ---------------------------------------------------------------------------------------


def test_sweep(tmp_path):
    make_store(tmp_path / "store", range(3))
    with actcache.open(tmp_path / "store") as store:
        (tmp_path / "store/tmp/123-abc.h5").write_bytes(b"x" * 100)
        (tmp_path / "store/tmp/123-abd.zarr").mkdir()
        (tmp_path / "store/tmp/123-abd.zarr/c").write_bytes(b"x")
        assert store.sweep() == 0  # somebody may be writing them
        assert store.sweep(older_than=0) == 2
        assert os.listdir(tmp_path / "store/tmp") == []
        with store.space(recipe()) as space:
            check(space, dict.fromkeys(range(3), 0), range(5))


def test_a_segment_in_anothers_place(url, folder, space):
    """Deletions name segments: where two change places, nothing that was deleted comes back."""
    space.delete([key(0)])
    space.close()
    first, second = segment_files(folder)[:2]
    aside = folder / "aside"
    os.rename(first, aside)
    os.rename(second, first)
    os.rename(aside, second)
    for path in (folder / "index").iterdir():
        path.unlink()
    again = another(url, mode="r")
    assert sorted(again.damaged()) == sorted([first.stem, second.stem])
    check(again, dict.fromkeys(range(10, 20), 0), range(25))


def test_foreign_origins_are_damage(tmp_path):
    """Origins that are no segments, or too few of them."""
    from actcache.format.ragged import Origins, names_from_array, names_to_array

    names = ("0000000000ab-0123456789abcdef", "ffffffffffff-ffffffffffffffff")
    assert names_from_array(names_to_array(names)) == names
    make_store(tmp_path / "store", range(5))
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        live = compaction.live_segments(space._driver.snapshot())
        merger = compaction.Merger(space._driver.snapshot(), live, space._driver.catalog.columns, ())
        bad = Origins(names, np.full(5, 2, np.uint32), np.arange(5, dtype=np.uint32), names)
        block = merger.block.__class__(**{**merger.block.__dict__, "origins": bad})
        name = space._driver.catalog.publish(block)
        space.refresh()
        assert list(space.damaged()) == [name]
        with pytest.raises(FormatError):
            space._driver.catalog.open_segment(name).origins()
        check(space, dict.fromkeys(range(5), 0), range(6))


def test_an_overwritten_copy_does_not_survive_its_deletion_in_a_slow_compactor(url, space, monkeypatch):
    """What is overwritten, removed and then deleted has left nothing behind that the deletion could name."""

    def act():
        other = another(url)
        put(other, [3], version=1, overwrite=True)
        other.compact(grace=0, waste=0)
        other.delete([key(3)])
        other.close()

    between = Between(monkeypatch, act)
    space.compact(grace=0)  # has the first version of 3
    assert between.done
    held = {n: 0 for n in HELD if n != 3}
    check(space, held, range(25))
    check(another(url), held, range(25))


def flip_in_the_index(folder, array, entry=5):
    (path,) = (folder / "index").iterdir()
    header, mapped = tensorfile.mapped(path)
    arrays = {name: np.array(values) for name, values in mapped.items()}
    arrays[array].reshape(len(arrays[array]), -1).view(np.uint8)[entry, 0] ^= 1
    path.write_bytes(tensorfile.dumps(arrays, header))


@pytest.mark.parametrize("array", ["prefix", "rest", "row", "tokens", "checksum"])
@pytest.mark.parametrize("how", ["compact", "repair"])
def test_a_flipped_bit_in_the_index_costs_no_entry(url, folder, space, array, how):
    space.close()
    flip_in_the_index(folder, array)
    with another(url) as again:
        if how == "compact":
            again.compact(grace=0, waste=0)
        else:
            assert again.repair(again.verify()) == Repair([], [])
        check(again, HELD, range(25))
    for path in (folder / "index").iterdir():
        path.unlink()
    with another(url) as again:
        check(again, HELD, range(25))
        assert again.verify().intact


def test_repair_leaves_alone_what_was_mended_since(url, folder, space):
    path = segment_files(folder)[0]
    path = path if path.is_file() else path / "values" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[data.index(rows(2)[0].tobytes())] ^= 1
    path.write_bytes(data)
    found = space.verify()
    assert found.corrupt == [key(2)]
    with another(url) as other:
        put(other, [2], version=1, overwrite=True)
    assert space.repair(found) == Repair([], [])
    check(space, {**HELD, 2: 1}, range(25))


def test_repair_does_not_move_what_a_newer_release_wrote(tmp_path):
    h5py = pytest.importorskip("h5py")
    folder = make_store(tmp_path / "store", range(5))
    with h5py.File(segment_files(folder)[0], "r+") as file:
        file.attrs["actcache_segment"] = np.bytes_("2")
    for path in (folder / "index").iterdir() if (folder / "index").is_dir() else ():
        path.unlink()
    with another(f"hdf5:{tmp_path}/store") as space:
        assert space.damaged()
        assert space.repair().set_aside == []
    assert len(segment_files(folder)) == 1


def test_a_negative_grace_is_refused(space):
    with pytest.raises(UsageError, match="grace"):
        space.compact(grace=-1)


def test_a_listing_that_spans_the_joining_of_deletions(url, folder, space, monkeypatch):
    """It may show neither the new tombstone nor all of the old ones."""
    for n in (3, 4, 5):
        space.delete([key(n)])
    other = another(url)
    held = {n: 0 for n in HELD if n not in (3, 4, 5)}
    check(other, held, range(25))
    place = other._driver.catalog.place
    listed = place.names
    joined = []

    def listing(of):
        before = listed(of)
        if of.endswith("tombstones") and not joined:
            monkeypatch.setattr(compactor, "SECONDS", -1.0)
            compactor.join_tombstones(space._driver.catalog, 0)
            joined.append(names(folder, "tombstones"))
            return before[:1]
        return before

    monkeypatch.setattr(place, "names", listing)
    other.refresh()
    assert len(joined[0]) == 1
    check(other, held, range(25))
