"""What ``gs://``, ``az://`` and other file systems of fsspec do: absent buckets, options, uploads that go wrong."""

from __future__ import annotations

import base64
import hashlib

import pytest
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

import actcache
from actcache.errors import BackendError, StorageIOError, StoreNotFoundError
from actcache.segments.places.objects import ObjectPlace
from actcache.segments.places.objects.client import Body, ObjectNotFoundError, TransientError
from actcache.segments.places.objects.generic import FsspecClient
from tests.cli.running import cachectl
from tests.support import check, put, recipe


class Answer404(Exception):
    """What azure's library raises, which fsspec's file system lets through."""

    status_code = 404


class Buckets(MemoryFileSystem):
    """A file system whose buckets have to be made, as gcsfs and adlfs have; with their options, some of them."""

    store: dict = {}  # noqa: RUF012 (as fsspec's)
    pseudo_dirs: list = [""]  # noqa: RUF012
    absent: type[Exception] = FileNotFoundError
    cut = 0  # bytes that are lost of what is written

    def __init__(self, project=None, token=None, **kwargs):
        super().__init__(**kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else "/" + str(path).strip("/")

    def _there(self, path):
        return self._strip_protocol(path).split("/")[1] == "there"

    def info(self, path, **options):
        if not self._there(path):
            raise FileNotFoundError(path)
        if self._strip_protocol(path) == "/there":
            return {"name": "there", "size": 0, "type": "directory"}
        found = super().info(path, **options)
        data = self.store[self._strip_protocol(path)].getvalue() if found["type"] == "file" else b""
        return {**found, "content_settings": {"content_md5": bytearray(hashlib.md5(data).digest())}}

    def ls(self, path, detail=True, **options):
        if not self._there(path):
            raise FileNotFoundError(path)
        return super().ls(path, detail=detail, **options)

    def pipe_file(self, path, value, mode="overwrite", **options):
        if not self._there(path):
            raise type(self).absent(path)
        super().pipe_file(path, value[: len(value) - type(self).cut], mode=mode, **options)

    def put_file(self, lpath, rpath, **options):
        if not self._there(rpath):
            raise type(self).absent(rpath)
        with open(lpath, "rb") as file:
            self.pipe_file(rpath, file.read())


@pytest.fixture(params=["gs", "az"])
def protocol(request, monkeypatch):
    kind = type(
        f"Buckets{request.param}",
        (Buckets,),
        {"protocol": request.param, "store": {}, "pseudo_dirs": [""], "cut": 0}
        | ({"absent": Answer404} if request.param == "az" else {}),
    )
    monkeypatch.setitem(_registry, request.param, kind)
    return request.param


def test_a_store_in_a_bucket(protocol):
    url = f"{protocol}://there/store"
    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(3))
    with actcache.open(url, "r", project="x") as store, store.space(recipe()) as space:
        check(space, dict.fromkeys(range(3), 0), range(5))
    with pytest.raises(StoreNotFoundError, match="open it with mode='a'"):
        actcache.open(f"{protocol}://there/other", "r")


@pytest.mark.parametrize("mode", ["r", "a"])
def test_an_absent_bucket_is_told(protocol, mode):
    with pytest.raises(StoreNotFoundError, match="there is no bucket absent; create it") as raised:
        actcache.open(f"{protocol}://absent/store", mode)
    assert "mode='a'" not in str(raised.value)


def test_a_migration_to_an_absent_bucket(protocol, tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(3))
    done = cachectl("migrate", tmp_path / "store", f"{protocol}://absent/store")
    assert done.code == 3
    assert "there is no bucket absent; create it" in done.err
    assert "Traceback" not in done.err


def test_a_bucket_that_is_deleted_meanwhile(protocol):
    place = ObjectPlace(f"{protocol}://there/store", "", {"retry_seconds": 0.2})
    place.publish_bytes("thing", b"some bytes", replace=True)
    gone = _registry[protocol]
    gone._there = lambda self, path: False
    with pytest.raises(StoreNotFoundError, match="no bucket there"):
        place.publish_bytes("other", b"some bytes", replace=True)
    place.close()


@pytest.mark.parametrize("url", ["{}://there/store?bananas=1", "{}://there/store"])
def test_unknown_options_are_refused(protocol, url):
    options = {} if "?" in url else {"bananas": 1}
    with pytest.raises(BackendError, match=r"store has no option 'bananas'; it has .*project.*token"):
        actcache.open(url.format(protocol), **options)


def test_options_that_go_to_another_library_are_not_asked(protocol, monkeypatch):
    def make(self, host=None, **ssh_kwargs):
        MemoryFileSystem.__init__(self)

    kind = type("Passing", (Buckets,), {"__init__": make, "protocol": protocol, "store": {}, "pseudo_dirs": [""]})
    monkeypatch.setitem(_registry, protocol, kind)
    actcache.open(f"{protocol}://there/store", port=22).close()


def test_what_is_cut_short_is_not_taken_for_written(protocol):
    place = ObjectPlace(f"{protocol}://there/store", "", {"retry_seconds": 0.2})
    kind = _registry[protocol]
    kind.cut = 1
    with pytest.raises(StorageIOError, match="not what was sent"):
        place.publish_bytes("thing", b"some bytes", replace=True)
    assert place.names("") == []
    kind.cut = 0
    assert place.publish_bytes("thing", b"some bytes", replace=True)
    place.close()


def test_other_bytes_are_not_taken_for_written(protocol, monkeypatch):
    place = ObjectPlace(f"{protocol}://there/store", "", {"retry_seconds": 0.2})
    wrong = hashlib.md5(b"other bytes").digest()
    info = Buckets.info
    settings = {"content_settings": {"content_md5": bytearray(wrong)}}
    monkeypatch.setattr(Buckets, "info", lambda self, path, **options: info(self, path, **options) | settings)
    with pytest.raises(StorageIOError, match="not what was sent"):
        place.publish_bytes("thing", b"some bytes", replace=True)
    place.close()


# --- what is asked of a library, each of which may be two requests or three -------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The methods of the file system that are called, one after the other."""
    calls: list[str] = []
    call = FsspecClient._call

    def noted(self, method, *args, **options):
        calls.append(method)
        return call(self, method, *args, **options)

    monkeypatch.setattr(FsspecClient, "_call", noted)
    return calls


@pytest.mark.parametrize("word", ["md5Hash", "content_md5"])
def test_the_answer_to_an_upload_is_compared_where_there_is_one(protocol, asked, monkeypatch, word):
    """And what it does not confirm is looked at."""
    place = ObjectPlace(f"{protocol}://there/store", "", {"retry_seconds": 0.2})
    pipe, holds = Buckets.pipe_file, []

    def answering(self, path, value, **options):
        pipe(self, path, value, **options)
        digest = hashlib.md5(holds[0] if holds else value).digest()
        return {word: base64.b64encode(digest).decode() if word == "md5Hash" else bytearray(digest)}

    monkeypatch.setattr(Buckets, "pipe_file", answering)
    assert place.publish_bytes("thing", b"some bytes", replace=True)
    assert asked == ["pipe_file"]
    holds.append(b"other bytes")
    asked.clear()
    assert place.publish_bytes("thing", b"some bytes", replace=True)
    assert asked == ["pipe_file", "info"]
    place.close()


def test_a_size_that_is_known_is_not_asked_for(protocol, asked):
    client = FsspecClient(f"{protocol}://there/store", {})
    data = bytes(range(100))
    client.put("thing", data, "token", create=False)
    asked.clear()
    assert client.get("thing", 10, 50, 100) == Body(data[10:60], 100)
    assert client.get("thing", 90, 50, 100) == Body(data[90:], 100)
    assert client.get("thing", 100, 50, 100) == Body(b"", 100)
    assert asked == ["cat_file", "cat_file"]
    # It has others by now, or somebody was wrong.
    assert client.get("thing", 10, 200, 300) == Body(data[10:], 100)
    client.remove("thing")
    with pytest.raises(ObjectNotFoundError):
        client.get("thing", 10, 50, 100)


def test_all_below_a_folder_is_found_at_once_where_the_library_can(protocol, asked, monkeypatch):
    find = MemoryFileSystem.find
    monkeypatch.setattr(_registry[protocol], "find", AbstractFileSystem.find, raising=False)
    client = FsspecClient(f"{protocol}://there/store", {})
    names = ["one", "spaces/a/segments/b/c/d", "spaces/a/segments/b/e", "spaces/f"]
    for name in names:
        client.put(name, b"bytes", "token", create=False)
    asked.clear()
    listed = client.listing("spaces/", recursive=True)  # by what fsspec has, which passes over what it cannot list
    assert (sorted(listed.files), listed.folders) == (names[1:], frozenset())
    assert "find" not in asked
    monkeypatch.setattr(_registry[protocol], "find", lambda self, *a, **o: find(self, *a, **o), raising=False)
    client = FsspecClient(f"{protocol}://there/store", {})
    asked.clear()
    assert sorted(client.listing("spaces/", recursive=True).files) == names[1:]
    assert client.listing("absent/", recursive=True).files == {}
    assert asked == ["find", "find"]
    # As adlfs, where there is an object of the folder's own name.
    monkeypatch.setattr(_registry[protocol], "find", lambda self, path, **o: [path], raising=False)
    assert sorted(client.listing("spaces/", recursive=True).files) == names[1:]

    def fails(self, *args, **options):
        raise OSError("a fault of the test")

    monkeypatch.setattr(_registry[protocol], "find", fails, raising=False)
    with pytest.raises(TransientError):
        client.listing("spaces/", recursive=True)
