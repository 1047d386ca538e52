"""Stores that somebody made to do harm: refused with an error of ours, in little memory and little time.

What a format's own files may claim is in the tests of the formats; here is what is common, and what takes a process.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import traceback
from pathlib import Path

import h5py
import numpy as np
import pytest

import actcache
from actcache.errors import ActcacheError
from tests.support import damage, key, make_store, put, recipe, rows, segment_files
from tests.support.backends import each

pytestmark = pytest.mark.processes


def read_all(root: Path) -> list[str]:
    """Return the damaged segments and the entries that are there, or the name of the error."""
    try:
        with actcache.open(root, "r") as store:
            for name in store.collections():
                store.collection(name)
            with store.space(recipe()) as space:
                found = space.get([key(n) for n in range(10)])
                for n, entry in enumerate(found):
                    assert entry is None or (entry.activations == rows(n)).all()
                space.verify()
                return [str(len(space.damaged())), str(sum(entry is not None for entry in found))]
    except ActcacheError as error:
        return [type(error).__name__]


def read(root: Path) -> list[str]:
    """As ``read_all``, in a fork that has 256 MiB of memory and 20 seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = [""]
        try:
            damage.limited()
            said = read_all(root)
        except BaseException:
            said = [traceback.format_exc()]
        finally:
            os.write(writing, json.dumps(said).encode())
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"exit status {status}"
    return json.loads(said)


@pytest.fixture(scope="module")
def good():
    """A store in memory, made once."""
    place = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    root = Path(place) / "store"
    make_store(root, range(10), segments=2)
    with actcache.open(root) as store, store.space(recipe()) as space:
        space.delete([key(9)])
        store.put_collection("named", [key(1)], ["one"])
    yield root
    shutil.rmtree(place)


@pytest.fixture
def folder(good):
    """The space of a copy of it."""
    copy = good.with_name("copy")
    shutil.copytree(good, copy)
    yield copy / "spaces" / recipe().fingerprint
    shutil.rmtree(copy)


def test_the_reader_reads_what_is_good(folder):
    """The test of the tests."""
    assert read(folder.parents[1]) == ["0", "9"]


def zeros(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    path.unlink()
    path.symlink_to(path)


def folder_instead(path):
    path.unlink()
    path.mkdir()


def nested(path):
    path.write_bytes(b"[" * (1 << 20))


def nested_objects(path):
    path.write_bytes(b'{"a":' * (1 << 18))


def long_number(path):
    path.write_bytes(b'{"format_version": ' + b"9" * (1 << 20) + b"}")


FILES = {
    "marker": "actcache.json",
    "recipe": "spaces/*/recipe.json",
    "tombstone": "spaces/*/tombstones/*.json",
    "index": "spaces/*/index/*.index",
    "segment": "spaces/*/segments/*.h5",
    "collection": "collections/*.safetensors",
}
TRICKS = [zeros, pipe, loop, folder_instead, nested, nested_objects, long_number]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
@pytest.mark.parametrize("which", FILES)
def test_what_stands_in_the_place_of_a_file(folder, which, trick):
    root = folder.parents[1]
    trick(sorted(root.glob(FILES[which]))[0])
    said = read(root)
    match which:
        case "index":
            assert said == ["0", "9"], "the segments have all that it says"
        case "segment":
            # A link that leads nowhere is a segment that is gone; a file that is long enough fails its checksums.
            assert said in (["1", "4"], ["0", "4"], ["CorruptEntryError"])
        case _:
            assert len(said) == 1
            assert said[0].endswith("Error"), said


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"", 1 << 63),
        (b"{}", 255 << 20),
        (b"[" * (1 << 20), None),
        (b'{"keys":' * (1 << 16), None),
        (json.dumps({"keys": {"dtype": "U8", "shape": [1 << 60, 32], "data_offsets": [0, 1 << 65]}}).encode(), None),
        (json.dumps({"keys": {"dtype": "U8", "shape": [1 << 40, 0], "data_offsets": [0, 0]}}).encode(), None),
        (json.dumps({"keys": {"dtype": "U8", "shape": [1] * 100_000, "data_offsets": [0, 1]}}).encode(), None),
        (json.dumps({"keys": {"dtype": "U8", "shape": [-1, -32], "data_offsets": [0, 32]}}).encode(), None),
        (json.dumps({"keys": {"dtype": "U8", "shape": [1, 32], "data_offsets": [-32, 0]}}).encode(), None),
        (
            json.dumps({f"{i}": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]} for i in range(9999)}).encode(),
            None,
        ),
    ],
    ids=[
        "endless",
        "long",
        "nested",
        "nested objects",
        "huge",
        "much of nothing",
        "deep",
        "negative",
        "before",
        "many",
    ],
)
@pytest.mark.parametrize("which", ["index", "collection"])
def test_headers_that_lie(folder, which, header, length):
    root = folder.parents[1]
    (path,) = root.glob(FILES[which])
    path.unlink()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(64))
    if which == "index":
        assert read(root) == ["0", "9"]
    else:
        assert read(root) == ["FormatError"]


def bomb(file):
    """Zeros that take little."""
    del file["values"]
    file.create_dataset("values", data=np.zeros((1 << 22, 8), "f4"), chunks=(1 << 18, 8), compression="gzip")


def huge(file):
    del file["values"]
    file.create_dataset("values", (1 << 50, 8), "f4")  # nothing is allocated


def crowd(file):
    for number in range(3000):
        file.create_group(f"g{number}")


def deep(file):
    group = file
    for _ in range(1000):
        group = group.create_group("g")


def to_itself(file):
    file["again"] = file["/"]


@pytest.mark.parametrize("trick", [bomb, huge, crowd, deep, to_itself], ids=lambda trick: trick.__name__)
def test_hdf5_files_that_would_take_much(folder, trick):
    first = segment_files(folder)[0]
    with h5py.File(first, "r+") as file:
        trick(file)
    for path in (folder / "index").iterdir():
        path.unlink()
    assert read(folder.parents[1]) == ["1", "4"]


@each(segmented=True)
def test_a_store_whose_folders_are_links_to_elsewhere_is_only_read(kind, tmp_path):
    """Following them writes nothing outside: names are claimed inside of the store's own root."""
    with actcache.open(kind.url(tmp_path / "other")) as store, store.space(recipe()) as space:
        put(space, range(5))
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        put(space, range(5, 10))
    before = {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()}
    mine, theirs = (tmp_path / name / "spaces" / recipe().fingerprint / "segments" for name in ("store", "other"))
    (mine / sorted(os.listdir(theirs))[0]).symlink_to(theirs / sorted(os.listdir(theirs))[0])
    with actcache.open(kind.url(tmp_path / "store")) as store, store.space(recipe()) as space:
        space.delete([key(n) for n in range(10)])
        space.compact(waste=0.0, grace=0.0)
        assert len(space) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file()} == before


def test_names_that_lead_away_are_no_names(folder):
    with actcache.open(folder.parents[1]) as store, store.space(recipe()) as space:
        for name in ("../x", "/etc/x", "a/b", "..", ".", "a\0b", "x" * 5000):
            with pytest.raises(actcache.errors.ActcacheError):
                store.put_collection(name, [key(1)])
            with pytest.raises(actcache.errors.ActcacheError):
                store.collection(name)
        del space
    assert not Path("/etc/x.safetensors").exists()
