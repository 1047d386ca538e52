"""``ObjectPlace``: names, publication of one and of several objects, ages, copies, sweeping, processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

import actcache
from actcache.errors import ClosedError, FormatError, OutOfSpaceError, StorageIOError
from actcache.segments.places.objects import ObjectPlace, blocks, object_place, obstore_reads, s3, transfers
from actcache.segments.places.objects.client import ObjectExistsError, TransientError
from actcache.segments.places.objects.fetched_rows import coalesce
from actcache.segments.places.objects.generic import FsspecClient
from actcache.segments.places.objects.session import Retrying
from tests import support
from tests.support.waiting import DEADLINE, ended, ours

SEGMENT = "segments/000000000001-0123456789abcdef.zarr"
OTHER = "quarantine/000000000001-0123456789abcdef.zarr"
FILES = {"zarr.json": b"{}", "values/c.0.0": b"rows" * 99, "values/zarr.json": b"{1}"}


@pytest.fixture(params=["obstore", "s3fs", "memory"])
def make(request, bucket):
    """From the name of the commit file to a place; all of them are the same place."""
    made = []
    if request.param == "memory":
        name = uuid.uuid4().hex

        def factory(commit="", **options):
            made.append(ObjectPlace(f"memory://{name}/some", commit, options))
            return made[-1]

    else:

        def factory(commit="", **options):
            made.append(ObjectPlace(bucket.url, commit, {**bucket.options, "client": request.param, **options}))
            return made[-1]

    yield factory
    for each in made:
        each.close()
    if request.param == "memory" and fsspec.filesystem("memory").exists(f"/{name}"):
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


@pytest.fixture
def local(bucket):
    """A place, and what its bucket really holds."""
    found = ObjectPlace(bucket.url, "zarr.json", bucket.options)
    yield found, bucket
    found.close()


def folder(path, files=FILES):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def test_files(make):
    here = make()
    assert here.names("") == []
    assert here.read("a") is None
    assert here.age("a") is None
    assert here.remove("a") is False
    assert here.move("a", "b") is False
    assert here.publish_bytes("a", b"1", replace=False) is True
    assert here.publish_bytes("a", b"2", replace=False) is False
    assert here.read("a") == b"1"
    assert here.publish_bytes("a", b"2", replace=True) is True
    assert here.publish("d/e.bin", lambda path: path.write_bytes(b"3"), replace=False) is True
    assert here.publish("d/e.bin", lambda path: path.write_bytes(b"4"), replace=False) is False
    assert here.publish_bytes("d/empty", b"", replace=False) is True
    assert here.read("d/empty") == b""
    assert make().names("") == ["a", "d"]
    assert here.names("d") == ["e.bin", "empty"]
    assert here.names("nothing") == []
    assert here.names("d/e") == []
    assert 0 <= here.age("a") < 60
    assert here.move("d/e.bin", "f/g") is True
    assert here.read("d/e.bin") is None
    assert make().read("f/g") == b"3"
    assert here.remove("a") is True
    assert here.remove("a") is False
    assert here.names("") == ["d", "f"]


def test_segments_of_several_objects(make):
    here = make("zarr.json")
    assert here.publish(SEGMENT, folder) is True
    assert here.publish(SEGMENT, folder) is False
    assert make("zarr.json").names("segments") == [Path(SEGMENT).name]
    assert here.names("") == ["segments"]
    files = make("zarr.json").segment(SEGMENT)
    assert files.names() == sorted(FILES)
    assert files.size("values/c.0.0") == 396
    assert files.read("values/c.0.0", 392, 100) == b"rows"
    assert files.read("values/c.0.0", 4000, 100) == b""
    with pytest.raises(FormatError):
        files.size("values/missing")
    for name in ("", "../../secret", "values//c.0.0"):
        with pytest.raises(FormatError):
            files.read(name, 0, 1)
    assert here.age(SEGMENT) < 60
    assert here.move(SEGMENT, OTHER) is True
    assert here.names("segments") == []
    assert make("zarr.json").segment(OTHER).read("zarr.json", 0, 9) == b"{}"
    with pytest.raises(FileNotFoundError):
        make("zarr.json").segment(SEGMENT).size("values/c.0.0")
    with pytest.raises(FileNotFoundError):
        make("zarr.json").segment(SEGMENT).names()
    assert here.remove(OTHER) is True
    assert here.remove(OTHER) is False
    assert here.age(OTHER) is None


def test_large_objects_go_in_parts_and_come_back_as_a_file(make, monkeypatch):
    monkeypatch.setattr(transfers, "_SINGLE_BYTES", 1 << 20)
    monkeypatch.setattr(transfers, "_PART_BYTES", 5 << 20)
    here = make()
    data = np.random.default_rng(0).bytes((12 << 20) + 7)
    assert here.publish("large.index", lambda path: path.write_bytes(data)) is True
    copy = here.local_copy("large.index")
    assert copy.read_bytes() == data
    assert here.local_copy("large.index") == copy
    assert here.read("large.index") == data
    files = here.segment("large.index")
    assert files.size("") == len(data)
    assert files.read("", 3, 5 << 20) == data[3 : 3 + (5 << 20)]
    assert files.read("", len(data) - 3, 100) == data[-3:]
    with pytest.raises(FileNotFoundError):
        here.local_copy("absent")
    here.close()
    assert not copy.exists()
    with pytest.raises(ClosedError):
        here.read("large.index")


def test_a_failing_write_leaves_nothing(make, tmp_path, monkeypatch):
    here = make("zarr.json")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(path):
        folder(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OutOfSpaceError, match="TMPDIR"):
        here.publish(SEGMENT, fail)
    assert here.names("") == []
    assert not list(tmp_path.iterdir())


# --- on the server ---------------------------------------------------------------------------------------------------


def test_the_commit_object_is_last_to_come_and_first_to_go(local, proxy):
    _, bucket = local
    here = ObjectPlace(bucket.url, "zarr.json", bucket.through(proxy))
    here.publish(SEGMENT, folder)
    written = [request for request in proxy.requests if request.startswith("PUT")]
    assert len(written) == 3
    assert ".zarr/zarr.json" in written[-1]
    proxy.clear()
    here.remove(SEGMENT)
    removed = [request for request in proxy.requests if request.startswith("DELETE")]
    assert ".zarr/zarr.json" in removed[0]
    assert len(removed) == 3
    here.close()


def test_without_its_commit_object_a_segment_is_not_there_and_swept(local):
    here, bucket = local
    here.publish(SEGMENT, folder)
    whole = SEGMENT.replace("0000000001-", "0000000002-")
    here.publish(whole, folder)
    bucket.s3.delete_object(Bucket=bucket.name, Key=f"some/store/{SEGMENT}/zarr.json")
    assert here.names("segments") == [Path(whole).name]
    assert here.age(SEGMENT) is None
    assert here.sweep(3600) == 0
    assert here.sweep(0) >= 2
    assert not [key for key in bucket.listed() if SEGMENT in key]
    assert len([key for key in bucket.listed() if whole in key]) == 3


def test_a_failed_upload_of_a_folder_is_taken_back(local, proxy):
    _, bucket = local
    here = ObjectPlace(bucket.url, "zarr.json", {**bucket.through(proxy), "retry_seconds": 0.3})
    proxy.rule("InternalError", "PUT .*values/zarr.json", times=10**6, status=500)
    with pytest.raises(StorageIOError):
        here.publish(SEGMENT, folder)
    assert bucket.listed() == []
    here.close()


def test_listings_of_several_pages(local, monkeypatch):
    here, bucket = local
    monkeypatch.setattr(s3, "_PAGE", 3)
    for number in range(10):
        bucket.s3.put_object(Bucket=bucket.name, Key=f"some/store/many/{number:05}", Body=b"x")
    for number in range(3):
        here.publish(SEGMENT.replace("000001-", f"00000{number}-"), folder)
    assert here.names("many") == [f"{number:05}" for number in range(10)]
    assert here.names("") == ["many", "segments"]
    assert len(here.names("segments")) == 3


def test_one_request_opens_a_segment(bucket, proxy):
    with actcache.open(bucket.url, **bucket.options) as store, store.space(support.recipe()) as space:
        support.put(space, range(100))
    with actcache.open(bucket.url, "r", **bucket.through(proxy)) as store, store.space(support.recipe()) as space:
        support.check(space, dict.fromkeys(range(100), 0), range(100))
        gets = [request for request in proxy.requests if "/segments/" in request and "GET" in request]
        assert len(gets) <= 2  # its head, which has all of so small a segment, and perhaps the rows


def test_what_a_reader_announces_is_fetched_once(bucket, proxy):
    wide = support.recipe(hidden_size=64)  # rows that are read by ranges, not in blocks
    keys = [support.key(n) for n in range(60)]
    rows = [np.full((n % 7 + 1, 64), n, np.float32) for n in range(60)]
    with actcache.open(bucket.url, **bucket.options) as store, store.space(wide) as space:
        space.put(keys, rows, [np.arange(len(r)) for r in rows])
    with actcache.open(bucket.url, "r", **bucket.through(proxy)) as store, store.space(wide) as space:
        batches = [keys[first : first + 10] for first in range(0, 60, 10)]
        for entries, batch in zip([space.get(b) for b in batches], batches, strict=True):
            assert len(entries) == len(batch)
        proxy.clear()
        for batch in batches:
            space.read_ahead(batch)  # the first ones are given up for the last
            space.read_ahead(batch)
        for number, batch in enumerate(batches):
            for n, entry in zip(range(number * 10, number * 10 + 10), space.get(batch), strict=True):
                np.testing.assert_array_equal(entry.activations, rows[n])
        ranges = [request for request in proxy.requests if "GET" in request and "/segments/" in request]
        assert 6 <= len(ranges) <= 6 + 3  # once each, and again those that were given up
        proxy.rule("cut", r"GET .*\.safetensors", times=10)
        for batch in batches[:3]:
            space.read_ahead(batch)
        for n, entry in enumerate(space.get(batches[0])):
            np.testing.assert_array_equal(entry.activations, rows[n])
        assert len(list(space.reader(keys, batch_size=4, shuffle=True))) == 15


def test_the_ordinary_configuration_of_aws(bucket, tmp_path, monkeypatch):
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {bucket.server.endpoint}\n"
        "aws_access_key_id = {key}\naws_secret_access_key = {secret}\n".format(**bucket.server.keys)
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with actcache.open(f"{bucket.url}?profile=lab") as store, store.space(support.recipe()) as space:
        support.put(space, range(3))
        space.flush()
        support.check(space, dict.fromkeys(range(3), 0), range(3))
    monkeypatch.delenv("AWS_CONFIG_FILE")
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", bucket.server.keys["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", bucket.server.keys["secret"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with actcache.open(bucket.url, "r") as store, store.space(support.recipe()) as space:
        support.check(space, dict.fromkeys(range(3), 0), range(3))
    url = f"{bucket.url}?endpoint_url={bucket.server.endpoint}&region=us-east-1&timeout=30&retry_seconds=5"
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with actcache.open(url, "r") as store, store.space(support.recipe()) as space:
        support.check(space, dict.fromkeys(range(3), 0), range(3))


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_public_bucket_needs_no_credentials(bucket, client, monkeypatch, tmp_path):
    if bucket.server.name != "moto":
        pytest.skip("its buckets are not public")
    monkeypatch.setenv("HOME", str(tmp_path))
    with actcache.open(bucket.url, **bucket.options) as store, store.space(support.recipe()) as space:
        support.put(space, range(3))
    bucket.s3.put_bucket_acl(Bucket=bucket.name, ACL="public-read")
    for found in bucket.listed():
        bucket.s3.put_object_acl(Bucket=bucket.name, Key=found, ACL="public-read")
    url = f"{bucket.url}?endpoint_url={bucket.server.endpoint}&region=us-east-1&anon=true&client={client}"
    with actcache.open(url, "r") as store, store.space(support.recipe()) as space:
        support.check(space, dict.fromkeys(range(3), 0), range(3))


class _Forgetful(FsspecClient):
    """Carries a write out, and says that it failed."""

    def put(self, key, data, token, *, create):
        super().put(key, data, token, create=create)
        if not self.__dict__.setdefault("failed", 0):
            self.failed = 1
            raise TransientError("lost")


def test_a_lost_answer_where_no_token_is_kept():
    url = f"memory://{uuid.uuid4().hex}"
    client = Retrying(_Forgetful(url, {}), 5)
    client.put("a", b"mine", "token", create=True)
    with pytest.raises(ObjectExistsError):
        client.put("a", b"mine", "token", create=True)
    other = Retrying(_Forgetful(url, {}), 5)
    with pytest.raises(ObjectExistsError):
        other.put("a", b"else", "token", create=True)


# --- processes and threads -------------------------------------------------------------------------------------------


def _child(space, result):
    support.check(space, dict.fromkeys(range(20), 0), range(20))
    result.put(("read", obstore_reads.usable()))
    support.put(space, range(20, 25))
    space.flush()
    result.put(("written", None))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_after_a_fork(bucket):
    with actcache.open(bucket.url, **bucket.options) as store, store.space(support.recipe()) as space:
        support.put(space, range(20))
        space.flush()
        support.check(space, dict.fromkeys(range(20), 0), range(20))
        context = multiprocessing.get_context("fork")
        result = context.Queue()
        child = context.Process(target=_child, args=(space, result))
        child.start()
        assert result.get(timeout=DEADLINE) == ("read", False)
        assert result.get(timeout=DEADLINE)[0] == "written"
        child.join(DEADLINE)
        assert child.exitcode == 0
        space.refresh()
        support.check(space, dict.fromkeys(range(25), 0), range(25))


def test_no_threads_stay(bucket):
    before = ours()
    with actcache.open(bucket.url, **bucket.options) as store, store.space(support.recipe()) as space:
        support.put(space, range(50))
        space.flush()
        space.get([support.key(n) for n in range(50)])
    ended(before)


def test_a_session_that_ends_without_closing_leaves_nothing(bucket, tmp_path, monkeypatch):
    code = """
import sys, json, actcache
from tests import support
store = actcache.open(sys.argv[1], **json.loads(sys.argv[2]))
space = store.space(support.recipe())
for first in (0, 5):
    support.put(space, range(first, first + 5))
    space.flush()
space.close()  # which writes an index
space = actcache.open(sys.argv[1], **json.loads(sys.argv[2])).space(support.recipe())
assert space.get([support.key(1)])[0] is not None
"""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    child = support.start(code, bucket.url, json.dumps(bucket.options))
    _, err = child.communicate(timeout=DEADLINE)
    assert child.returncode == 0, err
    assert not list(tmp_path.iterdir())
    assert "ClientSession" not in err
    assert "Error" not in err


def test_local_leftovers_are_swept(local, tmp_path, monkeypatch):
    here, _ = local
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    old, new, other = (
        tmp_path / name for name in (f"{object_place._TEMPORARY}a", f"{object_place._TEMPORARY}b", "else")
    )
    for path in (old, new, other):
        path.mkdir()
        (path / "file").touch()
    for path in (old, old / "file", other, other / "file"):
        os.utime(path, (0, 0))
    assert here.sweep(3600) == 1
    assert not old.exists()
    assert new.exists()
    assert other.exists()


# --- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_coalesced_ranges_cover_every_entry(seed):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 40))
    offsets = np.cumsum(rng.integers(1, 2000, 60))
    pick = rng.integers(0, 59, count)
    segments = rng.integers(0, 3, count)
    begins, ends = offsets[pick], offsets[pick + 1]
    ends = np.where(rng.random(count) < 0.2, begins, ends)  # absent entries
    gap, most = int(rng.choice([0, 100, 5000])), int(rng.choice([1, 3000, 10**6]))
    found = coalesce(segments, begins, ends, gap, most)
    assert (found.ends > found.begins).all()
    assert found.users.sum() == (ends > begins).sum()
    for i in range(count):
        if ends[i] == begins[i]:
            assert found.of_entry[i] == -1
            continue
        number = found.of_entry[i]
        assert found.segments[number] == segments[i]
        assert found.begins[number] <= begins[i] < ends[i] <= found.ends[number]
    first_use = [np.flatnonzero(found.of_entry == number)[0] for number in range(len(found.begins))]
    assert first_use == sorted(first_use)
    longest = (ends - begins).max()
    assert (found.ends - found.begins <= most + longest).all()
    wasted = (found.ends - found.begins).sum() - len({*zip(segments, begins, strict=True)}) * 2000
    assert wasted <= gap * count


def test_blocks_stay_within_their_memory(local, monkeypatch):
    here, bucket = local
    monkeypatch.setattr(blocks, "CACHE_BYTES", 1 << 20)
    data = np.random.default_rng(1).bytes(3 << 20)
    bucket.s3.put_object(Bucket=bucket.name, Key="some/store/x", Body=data)
    rng = np.random.default_rng(2)
    for _ in range(40):
        begin, length = int(rng.integers(0, 3 << 20)), int(rng.integers(0, 1 << 19))
        assert here._blocks.read("x", begin, length) == data[begin : begin + length]
        assert here._blocks._held <= 1 << 20
    assert here._blocks._held == sum(map(len, here._blocks._kept.values()))
