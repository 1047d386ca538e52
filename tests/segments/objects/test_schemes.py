"""Every scheme that fsspec knows: it is accepted, says which package it needs, or is refused."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
from fsspec.registry import _registry, known_implementations

import actcache
from actcache.errors import BackendError, MissingExtraError, ReadOnlyError
from actcache.segments import registry
from actcache.segments.places.objects import ObjectPlace, protocols
from tests.support import check, put, recipe

#: Scheme, the module that serves it, what the error says to install.
PACKAGES = [
    ("gs", "gcsfs", r"pip install 'actcache\[gs\]'"),
    ("gcs", "gcsfs", r"pip install 'actcache\[gs\]'"),
    ("az", "adlfs", r"pip install 'actcache\[az\]'"),
    ("abfs", "adlfs", r"pip install 'actcache\[az\]'"),
    ("abfss", "adlfs", r"pip install 'actcache\[az\]'"),
    ("s3", "s3fs", r"pip install 'actcache\[s3\]'"),
    ("s3a", "s3fs", r"pip install 'actcache\[s3\]'"),
    ("hf", "huggingface_hub", "pip install 'huggingface_hub'"),
    ("sftp", "paramiko", "pip install 'paramiko'"),
    ("oss", "ossfs", "pip install 'ossfs'"),
    ("oci", "ocifs", "pip install 'ocifs'"),
    ("webdav", "webdav4", r"pip install 'webdav4\[fsspec\]'"),
    ("smb", "smbprotocol", "pip install 'smbprotocol'"),
]


@pytest.mark.parametrize(("scheme", "module", "remedy"), PACKAGES, ids=[scheme for scheme, *_ in PACKAGES])
def test_a_scheme_whose_package_is_missing_says_which(scheme, module, remedy, monkeypatch):
    hidden = [name for name in sys.modules if name.partition(".")[0] == module]
    for name in [module, *hidden]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(_registry, scheme, raising=False)
    if module == "s3fs":
        for ours in ("s3", "obstore_reads"):
            monkeypatch.delitem(sys.modules, f"actcache.segments.places.objects.{ours}", raising=False)
            monkeypatch.delattr(f"actcache.segments.places.objects.{ours}", raising=False)
    if module == "smbprotocol":
        monkeypatch.setitem(sys.modules, "smbclient", None)
    with pytest.raises(MissingExtraError, match=remedy) as raised:
        actcache.open(f"{scheme}://bucket/prefix", "r")
    assert f"{scheme}://bucket/prefix" in str(raised.value)


@pytest.mark.parametrize("scheme", ["zip", "http", "simplecache", "github", "reference", "nosuch"])
def test_what_is_no_place_is_refused(scheme):
    with pytest.raises(BackendError, match=f"no backend '{scheme}'; installed are .*hdf5"):
        actcache.open(f"{scheme}://bucket/prefix")


def test_every_scheme_of_fsspec_is_decided():
    """None is left to chance: it is known, a path of this machine, or refused by name."""
    undecided = {
        scheme
        for scheme in known_implementations
        if "_" not in scheme  # which no URL's can have
        and not protocols.is_known(scheme)
        and scheme not in protocols._NO_PLACES
        and scheme not in ("file", "local")
    }
    assert undecided == set()
    for scheme in {*filter(protocols.is_known, known_implementations)} - {"arrow_hdfs", "file", "local"}:
        assert registry.resolve(f"{scheme}://bucket/prefix") == f"{scheme}://bucket/prefix"


@pytest.mark.parametrize("url", ["file://{}", "file:{}", "local://{}", "FILE://{}", "zarr:file://{}", "hdf5:file:{}"])
def test_urls_of_files_are_folders(url, tmp_path):
    if url.startswith("zarr") and find_spec("zarr") is None:
        pytest.skip("zarr is not installed")
    with actcache.open(url.format(tmp_path / "store")) as store, store.space(recipe()) as space:
        put(space, range(3))
    with actcache.open(tmp_path / "store", "r") as store:
        check(store.space(recipe()), dict.fromkeys(range(3), 0), range(5))


def test_s3a_is_s3(bucket):
    with actcache.open(bucket.url.replace("s3:", "s3a:"), **bucket.options) as store, store.space(recipe()) as space:
        put(space, range(3))
    with actcache.open(bucket.url, "r", **bucket.options) as store:
        check(store.space(recipe()), dict.fromkeys(range(3), 0), range(5))


def test_where_files_appear_in_pieces_nothing_is_written(monkeypatch):
    monkeypatch.setattr(protocols, "FOLDERS", {"memory"})
    place = ObjectPlace("memory://there/store", "", {})
    with pytest.raises(ReadOnlyError, match=r"mount it .*or read it with mode='r'"):
        place.publish_bytes("thing", b"bytes", replace=True)
    place.close()
