"""Bad input, read-only places and full disks: an error of ours, a remedy, and nothing that was stored is lost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import numpy as np
import pytest

import actcache
from actcache.errors import (
    ActcacheError,
    CodecOverflowError,
    DataError,
    FormatError,
    FormatVersionError,
    KeyFormatError,
    NonFiniteError,
    NotAStoreError,
    ReadOnlyError,
    ShapeError,
    StorageIOError,
    StoreError,
    StoreNotFoundError,
    UsageError,
)
from tests.support import HIDDEN, check, ids, key, make_store, put, recipe, rows, run, segment_files

HELD = dict.fromkeys(range(10), 0)


@pytest.fixture
def folder(tmp_path):
    """A store of ten documents in two segments, without an index; the folder of its space."""
    folder = make_store(tmp_path / "store", range(10), segments=2)
    shutil.rmtree(folder / "index")
    return folder


def opened(folder, mode="r", **options):
    return actcache.open(folder.parent.parent, mode, **options).space(recipe())


# --- what is put -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "error"),
    [
        ([[[1.0] * HIDDEN, [1.0]]], ShapeError),
        ([None], ShapeError),
        (["text"], ShapeError),
        ([5.0], ShapeError),
        ([np.ones(HIDDEN)], ShapeError),
        ([np.ones((1, 2, HIDDEN))], ShapeError),
        ([np.ones((0, HIDDEN))], ShapeError),
        ([np.ones((3, HIDDEN - 1))], ShapeError),
        ([np.ones((3, HIDDEN), int)], ShapeError),
        ([np.ones((3, HIDDEN), bool)], ShapeError),
        ([np.ones((3, HIDDEN), complex)], ShapeError),
        ([np.ones((3, HIDDEN), object)], ShapeError),
        ([np.full((3, HIDDEN), np.nan)], NonFiniteError),
        ([np.full((3, HIDDEN), -np.inf)], NonFiniteError),
        ([np.full((3, HIDDEN), 1e300)], CodecOverflowError),
        ([], ShapeError),
        ([np.ones((3, HIDDEN))] * 2, ShapeError),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:25]),
)
def test_activations_that_are_refused(folder, arrays, error):
    with opened(folder, "a") as space:
        with pytest.raises(error) as caught:
            space.put([key(50)], arrays)
        assert isinstance(caught.value, UsageError)
        assert len(space) == 10
        put(space, [51])
        check(space, {**HELD, 51: 0}, range(52))


@pytest.mark.parametrize(
    "token_ids",
    [
        [np.ones(4, int)],
        [np.ones((3, 1), int)],
        [np.ones(3)],
        [np.full(3, 2**31)],
        [np.full(3, -(2**31) - 1)],
        [np.full(3, 2**63, np.uint64)],
        [["a", "b", "c"]],
        [None],
        [],
    ],
    ids=lambda value: str(value)[:25],
)
def test_token_ids_that_are_refused(folder, token_ids):
    with opened(folder, "a") as space:
        with pytest.raises(ShapeError):
            space.put([key(50)], [np.ones((3, HIDDEN))], token_ids)
        assert key(50) not in space


def test_one_bad_document_among_good_ones_stores_none(folder):
    with opened(folder, "a") as space:
        bad = rows(52).copy()
        bad[0, 0] = np.nan
        with pytest.raises(NonFiniteError, match=key(52).hex()):
            space.put([key(50), key(51), key(52)], [rows(50), rows(51), bad])
        with pytest.raises(KeyFormatError, match="twice"):
            space.put([key(50), key(51), key(50)], [rows(50), rows(51), rows(50)])
        with pytest.raises(ShapeError):
            space.put([key(50), key(51)], [rows(50), rows(51)], [ids(50), ids(50)[:1]][:1])
        assert len(space) == 10


def test_keys_in_any_container(folder):
    with opened(folder, "a") as space:
        names = [key(60), key(61)]
        array = np.frombuffer(b"".join(names), np.uint8).reshape(2, 32)
        assert space.put(array, [rows(60), rows(61)], [ids(60), ids(61)]) == 2
        check(space, {60: 0, 61: 0}, [60, 61])
        assert [entry is not None for entry in space.get(name for name in [*names, key(99)])] == [True, True, False]
        assert space.contains(array).all()
        assert space.delete(iter(names)) == 2


def test_buffers_and_tensors_of_the_wrong_kind(folder):
    torch = pytest.importorskip("torch")
    with opened(folder) as space:
        total = int(space.lengths([key(1)]).sum())
        good = torch.empty(total, HIDDEN)
        space.read_into([key(1)], good)
        np.testing.assert_array_equal(good.numpy(), rows(1))
        frozen = np.empty((total, HIDDEN), np.float32)
        frozen.flags.writeable = False
        for bad in (
            torch.empty(total, HIDDEN, dtype=torch.bfloat16),
            torch.empty(total, HIDDEN, device="meta"),
            torch.empty(HIDDEN, total).T,
            frozen,
            [[0.0] * HIDDEN] * total,
            None,
            bytearray(total * HIDDEN * 4),
        ):
            with pytest.raises(ShapeError):
                space.read_into([key(1)], bad)


# --- places that are no store, or of another time --------------------------------------------------------------------


def test_places_that_are_no_store(tmp_path):
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("text")
    expected = {
        ("file", "a"): NotAStoreError,
        ("file", "r"): NotAStoreError,
        ("file/below", "a"): StoreError,
        ("file/below", "r"): StoreError,
        ("empty", "r"): StoreNotFoundError,
        ("absent", "r"): StoreNotFoundError,
        ("full", "a"): NotAStoreError,
        ("full", "r"): NotAStoreError,
        ("dangling", "a"): StoreError,
        ("dangling", "r"): StoreError,
        ("loop", "a"): StoreError,
        ("loop", "r"): StoreError,
        ("x" * 300, "a"): StorageIOError,
    }
    for (name, mode), error in expected.items():
        for url in (str(tmp_path / name), f"hdf5:{tmp_path}/{name}"):
            with pytest.raises(error):
                actcache.open(url, mode)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty", "dangling", "loop", "full"}
    assert (tmp_path / "full" / "thesis.tex").read_text() == "text"
    actcache.open(tmp_path / "empty").close()
    with pytest.raises(FileNotFoundError):
        actcache.open(tmp_path / "absent", "r")


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        (b"", NotAStoreError),
        (b"{", NotAStoreError),
        (b"\xff\xfe", NotAStoreError),
        (b"[]", NotAStoreError),
        (b"5", NotAStoreError),
        (b"null", NotAStoreError),
        (b"[" * 100_000, NotAStoreError),
        (b'{"format_version": 1}', NotAStoreError),
        (b'{"backend": "hdf5"}', NotAStoreError),
        (b'{"format_version": "1", "backend": "hdf5"}', NotAStoreError),
        (b'{"format_version": 1, "backend": 5}', NotAStoreError),
        (b'{"format_version": 1e999, "backend": "hdf5"}', NotAStoreError),
        (b'{"format_version": 4, "backend": "hdf5"}', FormatVersionError),
        (b'{"format_version": 99999999999999999999, "backend": "hdf5"}', FormatVersionError),
        (b'{"format_version": 4, "backend": "from-the-future"}', FormatVersionError),
        (b'{"format_version": 1, "backend": "nosuch"}', UsageError),
        (b'{"format_version": 1, "backend": "default"}', UsageError),
    ],
)
def test_markers(folder, marker, error):
    (folder.parent.parent / "actcache.json").write_bytes(marker)
    for mode in ("r", "a"):
        with pytest.raises(error):
            actcache.open(folder.parent.parent, mode)
    (folder.parent.parent / "actcache.json").write_text('{"format_version": 1, "backend": "hdf5"}')
    with opened(folder) as space:
        check(space, HELD, range(11))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", FormatError),
        (b"{}", FormatError),
        (b"[]", FormatError),
        (b"\xff", FormatError),
        (b"[" * 100_000, FormatError),
        (b'{"format_version": 1}', FormatError),
        (b'{"format_version": 1e999}', FormatError),
        (b'{"format_version": "1"}', FormatError),
        (b'{"format_version": 5}', FormatVersionError),
        ("other", FormatError),
    ],
)
def test_descriptions_of_spaces(folder, content, error):
    path = folder / "recipe.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"layer": 1', b'"layer": 2') if content == "other" else content)
    for mode in ("r", "a"):
        with actcache.open(folder.parent.parent, mode) as store:
            with pytest.raises(error):
                store.space(recipe())
            with pytest.raises(error):
                store.recipes()
            if mode == "a":  # other spaces are none of its business
                with store.space(recipe(layer=7)) as space:
                    put(space, [1])
    path.write_bytes(good)
    with opened(folder) as space:
        check(space, HELD, range(11))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"deleted": {}}',
        b'{"deleted": [], "checksum": "0"}',
        b'{"deleted": {"a": 5}, "checksum": "0"}',
        b'{"deleted": {"a": [1e999]}, "checksum": "0"}',
        b'{"deleted": {"a": [-1]}, "checksum": "0"}',
        b'{"deleted": {"a": ["1"]}, "checksum": "0"}',
        b'{"deleted": {"a": [99999999999999999999]}, "checksum": "0"}',
        "flipped",
    ],
)
def test_damaged_tombstones_are_refused_by_name(folder, content):
    """To pass over one would serve what was deleted."""
    with opened(folder, "a") as space:
        space.delete([key(3), key(4)])
    (path,) = (folder / "tombstones").iterdir()
    good = path.read_bytes()
    path.write_bytes(good.replace(b"[3,4]", b"[2,4]") if content == "flipped" else content)
    assert path.read_bytes() != good
    for mode in ("r", "a"):
        with pytest.raises(FormatError, match=str(path)):
            opened(folder, mode)
    path.write_bytes(good)
    with opened(folder) as space:
        check(space, {n: 0 for n in HELD if n not in (3, 4)}, range(11))


def test_a_tombstone_that_turns_up_damaged_under_an_open_writer(folder):
    """Tombstones never change: who has read one goes by that, and who comes later is told of the damage."""
    space = opened(folder, "a")
    space.delete([key(3)])
    (path,) = (folder / "tombstones").iterdir()
    good = path.read_bytes()
    put(space, [20])
    path.write_bytes(b"garbage")
    space.flush()
    check(space, {**{n: 0 for n in HELD if n != 3}, 20: 0}, [*range(10), 20])
    with pytest.raises(FormatError, match="move it away"):
        opened(folder)
    space.close()
    path.write_bytes(good)
    with opened(folder) as again:
        check(again, {**{n: 0 for n in HELD if n != 3}, 20: 0}, [*range(10), 20])


def test_damaged_collections(folder):
    root = folder.parent.parent
    with actcache.open(root) as store:
        store.put_collection("train", [key(1), key(2)], ["a", "bc"])
    path = root / "collections/train.safetensors"
    good = path.read_bytes()
    with actcache.open(root, "r") as store:
        for position in range(len(good)):
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with contextlib.suppress(FormatError):
                found = store.collection("train")
                assert found.ids == ["a", "bc"]
                assert found.keys.tobytes() == key(1) + key(2)
        for size in range(len(good)):
            path.write_bytes(good[:size])
            with pytest.raises(FormatError):
                store.collection("train")
        path.write_bytes(good)
        assert store.collection("train").ids == ["a", "bc"]
    with actcache.open(root) as store, pytest.raises(UsageError, match="surrogate"):
        store.put_collection("bad", [key(1)], ["\ud800"])


# --- foreign and damaged files among the segments --------------------------------------------------------------------


def foreign_folder(path):
    path.mkdir()
    (path / "x").write_text("x")


FOREIGN = {
    "text": lambda path: path.write_text("not a segment"),
    "empty": lambda path: path.touch(),
    "folder": foreign_folder,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "endless device": lambda path: path.symlink_to("/dev/urandom"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.timeout(90)
def test_a_foreign_file_among_the_segments(folder, kind):
    """The rest stays readable and writable, and ``damaged`` names it."""
    name = f"{77:012x}-{'ab' * 8}"
    FOREIGN[kind](folder / "segments" / f"{name}.h5")
    with opened(folder, "a") as space:
        assert list(space.damaged()) == [name]
        check(space, HELD, range(12))
        put(space, [20])
        space.flush()
        check(space, {**HELD, 20: 0}, [*range(12), 20])
        assert space.delete([key(1)]) == 1
    with opened(folder) as space:
        assert list(space.damaged()) == [name]
        check(space, {**{n: 0 for n in HELD if n != 1}, 20: 0}, [*range(12), 20])


def test_files_with_other_names_are_not_ours(folder):
    for name in ("README", "x.h5", ".hidden.h5", "000000000001.h5", f"{1:012x}-{'AB' * 8}.h5", "a\nb.h5", "\udcff.h5"):
        (folder / "segments" / name).write_text("not ours")
        for other in ("tombstones", "index"):
            (folder / other).mkdir(exist_ok=True)
            (folder / other / name.replace(".h5", ".json")).write_text("not ours")
    (folder.parent / "not-a-fingerprint").mkdir()
    (folder.parent.parent / "collections").mkdir(exist_ok=True)
    (folder.parent.parent / "collections/notes.txt").write_text("not ours")
    with actcache.open(folder.parent.parent) as store, store.space(recipe()) as space:
        check(space, HELD, range(12))
        assert space.damaged() == {}
        assert len(store.recipes()) == 1
        assert store.collections() == []


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_truncated_segment(folder, fraction, mapped):
    victim = segment_files(folder)[0]
    os.truncate(victim, int(victim.stat().st_size * fraction))
    with opened(folder, mapped=mapped) as space:
        assert list(space.damaged()) == [victim.stem]
        check(space, dict.fromkeys(range(5, 10), 0), range(12))
        assert len(space) == 5
    with opened(folder, "a", mapped=mapped) as space:  # what is absent is put again, and then all is there
        assert put(space, range(10)) == 5
        space.flush()
        check(space, HELD, range(12))


@pytest.mark.parametrize("mapped", [True, False])
def test_a_segment_that_goes_while_the_space_is_open(folder, mapped):
    with opened(folder, mapped=mapped) as space:
        segment_files(folder)[0].unlink()
        space.read_ahead([key(n) for n in range(10)])  # a hint: the read itself sees what is lost
        # Compaction might have taken it: the read looks again, and finds its entries nowhere.
        check(space, dict.fromkeys(range(5, 10), 0), range(12))


def test_corrupt_entries_are_named_deleted_and_filled_again(folder):
    victim = segment_files(folder)[0]
    data = bytearray(victim.read_bytes())
    offset = data.find(rows(2).tobytes())
    data[offset] ^= 1
    victim.write_bytes(data)
    with opened(folder, "a") as space:
        with pytest.raises(DataError) as caught:
            space.get([key(n) for n in range(12)])
        assert caught.value.keys == [key(2)]
        out = np.zeros((10, 9, HIDDEN), np.float32)
        with pytest.raises(DataError) as caught:
            space.read_into([key(n) for n in range(10)], out)
        assert caught.value.keys == [key(2)]
        for n in (0, 1, 3, 9):  # all others are in place
            np.testing.assert_array_equal(out[n, : len(rows(n))], rows(n))
        assert space.delete(caught.value.keys) == 1
        check(space, {n: 0 for n in HELD if n != 2}, range(12))
        assert put(space, range(10)) == 1
        space.flush()
        check(space, HELD, range(12))


# --- read-only and full ----------------------------------------------------------------------------------------------


def test_mode_r_changes_nothing(folder):
    root = folder.parent.parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with actcache.open(root, "r") as store, store.space(recipe()) as space:
        for call in (
            lambda: put(space, [1]),
            space.flush,
            lambda: space.delete([key(1)]),
            lambda: space.put_blob("x", b""),
            lambda: store.put_collection("x", []),
            lambda: store.delete_collection("x"),
        ):
            with pytest.raises(ReadOnlyError, match="mode"):
                call()
        check(space, HELD, range(11))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_full_disk_for_the_index_alone(folder, monkeypatch):
    """The index only saves time: a flush whose segment is published has succeeded."""
    from actcache.segments.index import Table

    def full(table, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Table, "write", full)
    monkeypatch.setattr("actcache.segments.catalog._UNCOVERED", 1)
    with opened(folder, "a") as space:
        put(space, [20, 21])
        space.flush()
        check(space, {**HELD, 20: 0, 21: 0}, [*range(10), 20, 21])
        assert len(segment_files(folder)) == 3, "it was not published twice"


AS_NOBODY = """
import os, sys
import actcache, actcache_hdf5, numpy.testing
from actcache.errors import *
from tests.support import *
actcache.open("ram:warm-up").space(recipe()).close()
os.setgroups([]); os.setgid(65534); os.setuid(65534)
def fails(kind, call):
    try:
        call()
    except kind as error:
        assert "ermission denied" in str(error) or "Permission" in str(error), error
        return
    raise SystemExit(f"no {kind.__name__}")
"""


@pytest.fixture
def public(tmp_path):
    """A folder that another user may enter."""
    import tempfile

    place = tempfile.mkdtemp()
    os.chmod(place, 0o755)
    yield type(tmp_path)(place)
    shutil.rmtree(place)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")


@needs_root
def test_permissions(public):
    folder = make_store(public / "store", range(10), segments=2)
    code = f"""{AS_NOBODY}
root, held = sys.argv[1], dict.fromkeys(range(10), 0)
for mode in ("r", "a"):
    with actcache.open(root, mode) as store, store.space(recipe()) as space:
        check(space, held, range(11))
        if mode == "a":
            put(space, [20])
            fails(ReadOnlyError, space.flush)
            fails(ReadOnlyError, lambda: space.put_blob("x", b""))
            check(space, {{**held, 20: 0}}, [*range(11), 20])
            space._writer.abandon()
fails(ReadOnlyError, lambda: actcache.open(root + "/../new"))
"""
    run(code, public / "store")
    segment_files(folder)[0].chmod(0)
    code = f"""{AS_NOBODY}
with actcache.open(sys.argv[1], "r") as store, store.space(recipe()) as space:
    assert len(space.damaged()) == 1, space.damaged()
    assert "ermission" in str(space.damaged())
    check(space, dict.fromkeys(range(5, 10), 0), range(11))
"""
    run(code, public / "store")
    (folder / "recipe.json").chmod(0)
    run(f"{AS_NOBODY}\nfails(StoreError, lambda: actcache.open(sys.argv[1], 'r').space(recipe()))", public / "store")
    (public / "store").chmod(0)
    for mode in ("r", "a"):
        run(f"{AS_NOBODY}\nfails(StoreError, lambda: actcache.open(sys.argv[1], {mode!r}))", public / "store")


def test_names_of_errors_say_what_to_do():
    """Every error of a store is an ``ActcacheError`` with a message."""
    for error in (StoreError("x"), DataError("x"), UsageError("x")):
        assert isinstance(error, ActcacheError)
    assert json.dumps(str(actcache.errors.SpaceNotFoundError("plain"))) == '"plain"'
