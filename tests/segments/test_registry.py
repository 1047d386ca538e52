"""URLs and entry points: third parties' backends work as ours do, and what is missing says how to get it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import actcache
from actcache.errors import BackendError, MissingExtraError, NotAStoreError
from actcache.segments import registry
from tests.support import check, put, recipe

#: A segment format that a third party might write: each array a file of its own, in a folder, with a JSON table.
PLUGIN = """
import json
from actcache.backend import Extent, Layout, SegmentFormat
from actcache.errors import FormatError

class RawFormat(SegmentFormat):
    name = "rawdir"
    suffix = ".raw"
    commit = "table.json"

    def write(self, path, block, metadata):
        path.mkdir()
        table = {}
        for name, array in block.arrays().items():
            array.tofile(path / f"{name}.bin")
            table[name] = [array.dtype.str, list(array.shape)]
        (path / "table.json").write_text(json.dumps([table, dict(metadata)]))

    def layout(self, files):
        try:
            table, metadata = json.loads(files.read("table.json", 0, 1 << 16))
            extents = {n: Extent(f"{n}.bin", 0, dtype, tuple(shape)) for n, (dtype, shape) in table.items()}
            return Layout(extents, metadata)
        except (ValueError, TypeError, AttributeError) as error:
            raise FormatError(f"{files.where}: {error}")

backend = RawFormat()
"""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on ``sys.path``; call it to install a distribution with these entry points."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def install(name, points, modules=None):
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nProvides-Extra: x\n")
        lines = [f"{scheme} = {value}" for scheme, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[actcache.backends]", *lines]) + "\n")
        for module, text in (modules or {}).items():
            (folder / f"{module}.py").write_text(text)

    yield install
    for module in ("rawdir_plugin", "broken_plugin"):
        sys.modules.pop(module, None)


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("hdf5:./a", ("hdf5", "./a")),
        ("HDF5:a", ("hdf5", "a")),
        ("hdf5:/abs/a", ("hdf5", "/abs/a")),
        ("hdf5:///abs/a", ("hdf5", "/abs/a")),
        ("s3://bucket/prefix", ("s3", "//bucket/prefix")),
        ("./a", (None, "./a")),
        ("a", (None, "a")),
        ("/a/b:c", (None, "/a/b:c")),
        ("./a:b", (None, "./a:b")),
        ("x/y:z", (None, "x/y:z")),
        ("C:\\data\\store", (None, "C:\\data\\store")),
        ("c:/data", (None, "c:/data")),
        ("hdf5:a:b", ("hdf5", "a:b")),
        ("hdf5:with\nnewline", ("hdf5", "with\nnewline")),
        ("", (None, "")),
        ("hdf5:", ("hdf5", "")),
        ("1st:x", (None, "1st:x")),
    ],
)
def test_parsing(url, parsed):
    assert registry.parse(url) == parsed


def test_places_that_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with actcache.open(f"hdf5://{tmp_path}/store") as store, store.space(recipe()) as space:
        put(space, range(3))
    for url in ("store", "./store", "hdf5:store", f"hdf5:{tmp_path}/store", f"hdf5://{tmp_path}/store", Path("store")):
        with actcache.open(url, "r") as store, store.space(recipe()) as space:
            check(space, dict.fromkeys(range(3), 0), range(4))


def test_a_path_object_is_never_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    actcache.open(Path("nosuch:store")).close()
    assert json.loads((tmp_path / "nosuch:store" / "actcache.json").read_text())["backend"] == "hdf5"


def test_a_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    actcache.open("~/one").close()
    actcache.open("hdf5:~/two").close()
    assert (tmp_path / "one/actcache.json").exists()
    assert (tmp_path / "two/actcache.json").exists()


@pytest.mark.parametrize("url", ["nosuch:/x", "http://host/x", "", "hdf5:", "a\0b", "~no-such-user/x", None, 5, b"x"])
def test_urls_that_name_no_place(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BackendError):
        actcache.open(url)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_lists_the_known_ones():
    with pytest.raises(BackendError, match=r"no backend 'nosuch'; installed are .*hdf5"):
        actcache.open("nosuch:/x")


def test_modes_and_options(tmp_path):
    for mode in ("w", "", "rw", None):
        with pytest.raises(BackendError, match="mode"):
            actcache.open(tmp_path / "store", mode)
    with pytest.raises(BackendError, match="'colour'"):
        actcache.open(tmp_path / "store", colour="blue")
    assert not (tmp_path / "store").exists()


def test_a_missing_extra_says_what_to_install(site, tmp_path):
    site("their-cache", {"theirs": "no_such_module_here:backend [x]", "plain": "no_such_module_here:backend"})
    with pytest.raises(MissingExtraError, match=r"no_such_module_here.*pip install 'their-cache\[x\]'"):
        actcache.open(f"theirs:{tmp_path}/store")
    with pytest.raises(MissingExtraError, match=r"pip install 'their-cache'$"):
        actcache.open(f"plain:{tmp_path}/store")
    assert "theirs" in registry.backends()
    assert not (tmp_path / "store").exists()


def test_a_broken_plugin(site, tmp_path):
    site("broken", {"noattr": "json:backend", "nobackend": "json:dumps"})
    for scheme in ("noattr", "nobackend"):
        with pytest.raises(BackendError):
            actcache.open(f"{scheme}:{tmp_path}/store")


def test_a_third_partys_format(site, tmp_path):
    """Segments that are folders of several files, by the same core."""
    site("raw", {"rawdir": "rawdir_plugin:backend"}, {"rawdir_plugin": PLUGIN})
    url = f"rawdir:{tmp_path}/store"
    with actcache.open(url) as store, store.space(recipe(), segment_bytes=500) as space:
        put(space, range(30))
        space.flush()
        check(space, dict.fromkeys(range(30), 0), range(35))
        assert space.usage().segments > 3
    for mapped in (True, False):
        # A bare path finds the backend by itself; so does the index, which closing wrote.
        with actcache.open(tmp_path / "store", mapped=mapped) as store, store.space(recipe()) as space:
            put(space, [3, 40], version=1, overwrite=True)
            space.flush()
            held = {**dict.fromkeys(range(30), 0), 3: 1, 40: 1}
            check(space, held, range(45))
            put(space, [3], overwrite=True)
            space.delete([actcache.document_key("document 40")])
    folder = tmp_path / "store/spaces" / recipe().fingerprint
    assert list((tmp_path / "store/tmp").iterdir()) == []
    victim = sorted((folder / "segments").iterdir())[1]
    (victim / "values.bin").write_bytes((victim / "values.bin").read_bytes()[:-1])
    with actcache.open(url, "r") as store, store.space(recipe()) as space:
        assert list(space.damaged()) == [victim.stem]
    with pytest.raises(BackendError, match="is a rawdir store"):
        actcache.open(f"hdf5:{tmp_path}/store")


def test_a_store_whose_backend_is_not_installed_any_more(tmp_path):
    actcache.open(tmp_path / "store").close()
    marker = tmp_path / "store/actcache.json"
    marker.write_text(marker.read_text().replace("hdf5", "gone"))
    with pytest.raises(BackendError, match="'gone'"):
        actcache.open(tmp_path / "store")
    with pytest.raises(BackendError, match="is a gone store"):
        actcache.open(f"hdf5:{tmp_path}/store")


def test_a_folder_that_is_no_store(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for url in (tmp_path, f"hdf5:{tmp_path}", str(tmp_path)):
        for mode in ("a", "r"):
            with pytest.raises(NotAStoreError):
                actcache.open(url, mode)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_reader_of_a_third_partys_store_gets_arrays(site, tmp_path):
    site("raw", {"rawdir": "rawdir_plugin:backend"}, {"rawdir_plugin": PLUGIN})
    with actcache.open(f"rawdir:{tmp_path}/store") as store, store.space(recipe()) as space:
        put(space, range(10))
        keys = list(space.keys())
        batches = list(space.reader(keys, batch_size=4))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert np.isfinite(batches[0].activations).all()
