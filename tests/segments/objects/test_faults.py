"""What networks and servers do to requests, through a proxy: right results, or a clear error, in bounded time."""

from __future__ import annotations

import dataclasses
import json
import socket
import time
import uuid

import numpy as np
import pytest

import actcache
from actcache.admin.retention import plan_pruning, prune
from actcache.errors import (
    ActcacheError,
    BackendError,
    ClosedError,
    CorruptEntryError,
    FormatError,
    ReadOnlyError,
    StorageIOError,
    StoreError,
    StoreNotFoundError,
)
from actcache.io.metrics import process_metrics
from actcache.segments.places.objects import ObjectPlace, s3, transfers
from tests import support
from tests.segments.objects.conftest import Bucket
from tests.support.waiting import DEADLINE, no_hang

LARGE = 40 << 20  # three parts
PATTERN_PART = r"PUT .*partNumber=2"
PATTERN_COMPLETE = r"POST .*\?uploadId="
PATTERN_OBJECT = r"PUT [^?]*/thing(\?x-id=PutObject)?$"
FAULTS = [("InternalError", 500), ("SlowDown", 503), ("ServiceUnavailable", 503), ("cut", 0), ("truncate", 0)]


#: For what both clients do by the same code: the faster one differs in how it reads objects, and in nothing else.
ONE_CLIENT = pytest.mark.parametrize(
    "options", ["s3fs", pytest.param("obstore", marks=pytest.mark.long)], indirect=True
)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    """The pauses before repeated requests double as ever, from a tenth of the first one on."""
    monkeypatch.setattr("actcache.segments.places.objects.session._FIRST_SECONDS", 0.01)


@pytest.fixture(params=["obstore", "s3fs"])
def options(request, bucket, proxy):
    if bucket.server.name == "real" and request.param == "s3fs":
        pytest.skip("the slow server sees the faster client; moto's sees both")
    return {**bucket.through(proxy), "client": request.param, "timeout": 2, "retry_seconds": 20}


@pytest.fixture
def place(bucket, options):
    found = ObjectPlace(bucket.url, "", options)
    yield found
    found.close()


@pytest.fixture
def impatient(bucket, options):
    found = ObjectPlace(bucket.url, "", {**options, "retry_seconds": 0.3})
    yield found
    found.close()


def body(nbytes=1000):
    return np.random.default_rng(nbytes).bytes(nbytes)


def publish(place, data, name="thing", **options):
    return place.publish(name, lambda path: path.write_bytes(data), **options)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "status"), FAULTS)
def test_a_read_is_repeated(place, proxy, kind, status):
    place.publish_bytes("thing", body(), replace=False)
    rule = proxy.rule(kind, "GET .*thing", times=3, status=status)
    assert place.read("thing") == body()
    assert rule.hits == 3


def test_a_read_that_stalls_is_given_up_and_repeated(bucket, options, proxy):
    place = ObjectPlace(bucket.url, "", {**options, "timeout": 0.5})
    place.publish_bytes("thing", body(100_000), replace=False)
    rule = proxy.rule("stall", "GET .*thing")
    with no_hang():  # the proxy stalls for longer
        assert place.read("thing") == body(100_000)
    assert rule.hits == 1
    place.close()


def test_a_body_that_is_too_short_is_asked_for_again(place, proxy):
    place.publish_bytes("thing", body(), replace=False)
    rule = proxy.rule("short", "GET .*thing", times=2)
    assert place.read("thing") == body()
    assert rule.hits == 2


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ("obstore", "GET .*thing"),
        *(("s3fs", pattern) for pattern in ("GET .*thing", "GET .*list-type", "PUT ", "HEAD ")),
        *(
            pytest.param("obstore", pattern, marks=pytest.mark.long)  # by the code of s3fs
            for pattern in ("GET .*list-type", "PUT ", "HEAD ")
        ),
    ],
    indirect=["options"],
)
def test_a_failure_that_lasts_is_raised_in_bounded_time(impatient, proxy, pattern):
    impatient.publish_bytes("thing", body(), replace=False)
    proxy.rule("SlowDown", pattern, times=10**6)
    calls = {
        "GET .*thing": lambda: impatient.read("thing"),
        "GET .*list-type": lambda: impatient.names(""),
        "PUT ": lambda: impatient.publish_bytes("other", b"x", replace=True),
        "HEAD ": lambda: impatient.age("thing"),
    }
    with no_hang(), pytest.raises(StorageIOError, match="tried"):
        calls[pattern]()
    proxy.clear()
    assert impatient.read("thing") == body()  # and works on


def test_a_server_that_is_gone_is_an_error_in_bounded_time(bucket):
    options = {**bucket.options, "endpoint_url": "http://127.0.0.1:9", "retry_seconds": 0.3}
    with no_hang(), pytest.raises(StorageIOError, match=r"tried|cannot"):
        actcache.open(bucket.url, **options)


@ONE_CLIENT
def test_a_listing_is_whole_or_fails(place, proxy, monkeypatch):
    for number in range(7):
        place.publish_bytes(f"folder/{number}", b"x", replace=True)
    for kind in ("truncate", "cut", "InternalError"):
        rule = proxy.rule(kind, "GET .*list-type", status=500)
        assert place.names("folder") == [str(number) for number in range(7)]
        assert rule.hits == 1


# --- writing ---------------------------------------------------------------------------------------------------------


@ONE_CLIENT
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(("kind", "status"), [*FAULTS[:4], ("lost", 0)])
def test_a_small_write_is_repeated_until_it_is_done(place, bucket, proxy, kind, status, replace):
    rule = proxy.rule(kind, PATTERN_OBJECT, status=status)
    assert place.publish_bytes("thing", body(), replace=replace) is True
    assert rule.hits == 1
    assert place.read("thing") == body()


def test_a_lost_answer_does_not_claim_what_another_wrote(place, bucket, proxy):
    bucket.s3.put_object(Bucket=bucket.name, Key="some/store/thing", Body=b"theirs")
    proxy.rule("cut", PATTERN_OBJECT)
    assert place.publish_bytes("thing", body(), replace=False) is False
    assert place.read("thing") == b"theirs"


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        pytest.param("SlowDown", PATTERN_PART, marks=pytest.mark.long),
        pytest.param("cut", PATTERN_PART, marks=pytest.mark.long),
        ("lost", PATTERN_PART),
        ("SlowDown", r"POST .*\?uploads"),
        pytest.param("lost", r"POST .*\?uploads", marks=pytest.mark.long),
        pytest.param("InternalError", PATTERN_COMPLETE, marks=pytest.mark.long),
        pytest.param("cut", PATTERN_COMPLETE, marks=pytest.mark.long),
        ("lost", PATTERN_COMPLETE),
        ("truncate", PATTERN_COMPLETE),
    ],
)
def test_a_large_write_is_repeated_until_it_is_done(bucket, proxy, kind, pattern):
    place = ObjectPlace(bucket.url, "", {**bucket.through(proxy), "timeout": 10, "retry_seconds": 30})
    rule = proxy.rule(kind, pattern)
    assert publish(place, body(LARGE), replace=True)
    assert rule.hits == 1
    got = bucket.s3.get_object(Bucket=bucket.name, Key="some/store/thing")["Body"].read()
    assert got == body(LARGE)
    if (kind, pattern) == ("lost", PATTERN_COMPLETE):
        assert sum("POST" in request and "uploadId" in request for request in proxy.requests) == 1
    assert len(bucket.uploads()) == (pattern == r"POST .*\?uploads" and kind == "lost")
    place.close()


def test_a_large_write_that_fails_leaves_nothing(bucket, proxy):
    place = ObjectPlace(bucket.url, "", {**bucket.through(proxy), "retry_seconds": 0.5})
    proxy.rule("InternalError", PATTERN_PART, times=10**6, status=500)
    with pytest.raises(StorageIOError):
        publish(place, body(LARGE), replace=True)
    assert bucket.listed() == []
    assert bucket.uploads() == []
    place.close()


def test_what_a_killed_uploader_left_is_swept(bucket):
    code = """
import sys, os, signal, json
from actcache.io.metrics import process_metrics
from actcache.segments.places.objects import ObjectPlace, s3, transfers
from actcache.segments.places.objects.s3 import S3Client
part, sent = S3Client.part, []
def kill(self, key, upload, number, data):
    etag = part(self, key, upload, number, data)
    print("part", flush=True)
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return etag
S3Client.part = kill
ObjectPlace(sys.argv[1], "", json.loads(sys.argv[2])).publish("thing", lambda p: p.write_bytes(bytes(40 << 20)))
"""

    child = support.start(code, bucket.url, json.dumps(bucket.options))
    out, err = child.communicate(timeout=60)
    assert "part" in out, err
    assert child.returncode == -9
    assert bucket.uploads() == ["some/store/thing"]
    bucket.s3.create_multipart_upload(Bucket=bucket.name, Key="elsewhere/thing")  # not below our root
    place = ObjectPlace(bucket.url, "", bucket.options)
    assert place.names("") == []
    if bucket.server.name != "moto":  # whose uploads were all begun in 2010
        assert place.sweep(3600) == 0
    assert place.sweep(0) >= 1
    assert bucket.uploads() == ["elsewhere/thing"]
    place.close()


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_store_that_lists_no_uploads_is_swept_of_the_rest(bucket, proxy, caplog, status):
    place = ObjectPlace(bucket.url, "zarr.json", bucket.through(proxy))
    left = "segments/000000000001-0123456789abcdef.zarr/values/c.0.0"
    place.publish_bytes(left, b"rows", replace=True)
    rule = proxy.rule("NotImplemented", r"GET .*\?.*uploads", times=10**6, status=status)
    assert place.sweep(0) >= 1
    assert rule.hits == 1
    assert bucket.listed() == []
    assert "unfinished uploads stay" in caplog.text
    place.close()


@pytest.mark.parametrize("status", [403, 405, 501])
def test_a_store_that_lists_no_uploads_is_pruned(bucket, proxy, status):
    with actcache.open(bucket.url, **bucket.through(proxy)) as store:
        with store.space(support.recipe()) as space:
            support.put(space, range(3))
        rule = proxy.rule("NotImplemented", r"GET .*\?.*uploads", times=10**6, status=status)
        prune(store, plan_pruning(store, left_behind=0.0))
        assert rule.hits == 1
        assert len(store) == 1


def test_pruning_takes_uploads_of_any_age(bucket):
    with actcache.open(bucket.url, **bucket.options) as store:
        bucket.s3.create_multipart_upload(Bucket=bucket.name, Key="some/store/thing")
        prune(store, plan_pruning(store, left_behind=0.0))
        assert bucket.uploads() == []


@ONE_CLIENT
def test_what_arrives_is_compared_with_what_was_sent(place, bucket, monkeypatch):
    """Where the answer tells no MD5 of it, by its size; what is too short goes, and is written again."""
    monkeypatch.setattr(s3, "_etag", lambda answer: "")
    sizes = [3]
    head = s3.S3Client.head

    def short_at_first(self, key):
        found = head(self, key)
        return dataclasses.replace(found, size=sizes.pop()) if sizes else found

    monkeypatch.setattr(s3.S3Client, "head", short_at_first)
    assert place.publish_bytes("thing", body(), replace=True)
    assert not sizes
    assert place.read("thing") == body()


def test_an_upload_in_parts_that_came_out_short_has_not_happened(bucket, monkeypatch):
    place = ObjectPlace(bucket.url, "", {**bucket.options, "retry_seconds": 5})
    monkeypatch.setattr(transfers, "_SINGLE_BYTES", 1 << 20)
    monkeypatch.setattr(transfers, "_PART_BYTES", 5 << 20)
    head = s3.S3Client.head
    monkeypatch.setattr(s3.S3Client, "head", lambda self, key: dataclasses.replace(head(self, key), size=7))
    with pytest.raises(StorageIOError, match="7 of 6291456 bytes after its upload"):
        publish(place, bytes(6 << 20), replace=True)
    assert bucket.listed() == []
    assert bucket.uploads() == []
    place.close()


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_wrong_credentials_are_told_at_once(bucket, proxy, client):
    if bucket.server.name == "moto":
        proxy.rule("SignatureDoesNotMatch", times=10**6, status=403)
    options = {**bucket.through(proxy), "secret": "wrong", "client": client}
    with pytest.raises(StorageIOError, match="credentials") as raised:
        actcache.open(bucket.url, **options)
    assert not isinstance(raised.value, FileNotFoundError)
    assert len(proxy.requests) == 1


def test_absent_credentials_are_told(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = {name: value for name, value in bucket.options.items() if name not in ("key", "secret")}
    with pytest.raises(StorageIOError, match="AWS_ACCESS_KEY_ID"):
        actcache.open(bucket.url, **options)


@ONE_CLIENT
def test_no_permission_to_write_is_told(place, proxy):
    proxy.rule("AccessDenied", "PUT", times=10**6, status=403)
    with pytest.raises(ReadOnlyError, match="mode='r'"):
        place.publish_bytes("thing", b"x", replace=True)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_an_absent_bucket_is_told_at_once(bucket, proxy, mode):
    with pytest.raises(StoreNotFoundError, match="no bucket actcache-absent"):
        actcache.open("s3://actcache-absent/store", mode, **bucket.through(proxy))
    assert len(proxy.requests) <= 2


@ONE_CLIENT
def test_a_full_store_is_told(place, proxy):
    proxy.rule("QuotaExceeded", "PUT", times=10**6, status=403)
    with pytest.raises(StoreError, match="full"):
        place.publish_bytes("thing", b"x", replace=True)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://bucket/p", {"reegion": "x"}, "'reegion'"),
        ("s3://bucket/p", {"client": "boto"}, "client is one of"),
        ("s3://bucket/p?timeout=soon", {}, "timeout"),
        ("s3://bucket/p?secret=x", {}, "does not belong in a URL"),
        ("s3://bucket//p", {}, "names no place: two slashes"),
        ("s3://bucket/a//b", {}, "two slashes follow each other"),
        ("zarr:memory://bucket/a//b", {}, "two slashes follow each other"),
        ("s3://bucket/../p", {}, "names no place: .* mean nothing in an object store"),
        ("memory://bucket/./p", {}, "mean nothing in an object store"),
        ("s3://bucket/a\tb", {}, r"'\\t' is no character that a name can have"),
        ("memory://bucket/a\nb", {}, r"'\\n' is no character"),
        ("s3://bucket/a\x7fb", {"client": "s3fs"}, "is no character"),
        ("zarr:s3://bucket/a\x85b", {}, "is no character"),
        ("memory://bucket/a\u2028b", {}, "is no character"),
        ("s3://bucket/a\udc80b", {}, "is no character"),
        ("s3://buck et/p", {}, "'buck et' is no bucket"),
        ("s3://b\u00fccket/p", {}, "is no bucket"),
        ("s3://arn:aws:s3:us-east-1:123456789012:accesspoint/ap", {}, "is no bucket"),
        ("s3:///p", {}, "no bucket"),
        ("memory://", {}, "there is no bucket"),
        ("s3://bucket/" + "\u00fc" * 401, {}, "802 bytes"),
        ("s3://bucket/a?b", {}, r"'b'.* options begin at '\?'"),
        ("memory://a?b", {}, r"no name can have a '\?'"),
        ("memory://bucket/p", {"mapped": True}, "'mapped'"),
    ],
)
def test_options_that_make_no_sense(url, options, message):
    with pytest.raises(BackendError, match=message):
        actcache.open(url, **options)


# --- a reader's segments ---------------------------------------------------------------------------------------------


@pytest.fixture
def filled(bucket):
    return fill(bucket)


@pytest.fixture(scope="module")
def only_read(server, plain_client):
    """The URL of a store that tests only read."""
    bucket = Bucket(server, f"actcache-{uuid.uuid4().hex[:16]}", plain_client)
    plain_client.create_bucket(Bucket=bucket.name)
    yield fill(bucket).url
    bucket.remove()


def fill(bucket):
    with actcache.open(bucket.url, **bucket.options) as store, store.space(support.recipe()) as space:
        for part in range(4):
            support.put(space, range(part * 10, part * 10 + 10))
            space.flush()
    return bucket


@pytest.mark.parametrize(("kind", "status"), [*FAULTS, ("short", 0)])
def test_a_batch_is_right_though_every_fourth_request_fails(only_read, proxy, options, kind, status):
    with actcache.open(only_read, "r", **options) as store, store.space(support.recipe()) as space:
        for _ in range(3):
            proxy.rule(kind, r"GET .*\.safetensors", times=2, status=status)
            support.check(space, dict.fromkeys(range(40), 0), range(40))


def test_segments_deleted_under_a_reader(filled, options):
    with actcache.open(filled.url, "r", **options) as store, store.space(support.recipe()) as space:
        assert len(space) == 40
        gone = [key for key in filled.listed() if "/segments/" in key][1]
        filled.s3.delete_object(Bucket=filled.name, Key=gone)
        entries = []
        with no_hang():
            for number in range(40):
                try:
                    entry = space.get([support.key(number)])[0]
                except ActcacheError:
                    entry = None
                if entry is not None:
                    np.testing.assert_array_equal(entry.activations, support.rows(number))
                entries.append(entry)
        assert all(entry is not None for number, entry in enumerate(entries) if not 10 <= number < 20)
        assert all(entry is None for entry in entries[10:20])


def test_a_segment_truncated_under_a_reader(filled, options):
    keys = [key for key in filled.listed() if "/segments/" in key]
    with actcache.open(filled.url, "r", **options) as store, store.space(support.recipe()) as space:
        assert len(space) == 40
        whole = filled.s3.get_object(Bucket=filled.name, Key=keys[2])["Body"].read()
        filled.s3.put_object(Bucket=filled.name, Key=keys[2], Body=whole[:-40])
        with pytest.raises(ActcacheError):
            space.get([support.key(number) for number in range(40)])
    with actcache.open(filled.url, "r", **options) as store, store.space(support.recipe()) as space:
        # Nobody lists the segments, and so nobody sees it before it is read: what it has is served, the rest refused.
        support.check(space, dict.fromkeys([*range(29), *range(30, 40)], 0), [*range(29), *range(30, 40)])
        with pytest.raises(CorruptEntryError) as raised:
            space.get([support.key(number) for number in range(40)])
        assert raised.value.keys == [support.key(29)]
        report = space.verify()
        assert not report.intact
        assert list(report.damaged) == [keys[2].rpartition("/")[2].partition(".")[0]]


def test_closing_ends_what_waits(bucket, proxy):
    place = ObjectPlace(bucket.url, "", {**bucket.through(proxy), "retry_seconds": 600})
    place.publish_bytes("thing", b"x", replace=True)
    proxy.rule("SlowDown", "GET .*thing", times=10**6)
    future = place._session.submit(lambda: place.read("thing"))
    while len(proxy.requests) < 4:
        time.sleep(0.01)
    with no_hang():
        place.close()
        with pytest.raises((ClosedError, StorageIOError)):
            future.result(timeout=DEADLINE)
    with pytest.raises(ClosedError):
        place.read("thing")
    place.close()


def test_a_format_error_names_the_object(place):
    with pytest.raises(FormatError, match=r"s3://.*nothing"):
        place.segment("nothing").read("inside", 0, 1)
    with pytest.raises(FileNotFoundError):
        place.segment("nothing").size("")


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_a_server_that_never_answers_is_given_up(client):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = {
            "endpoint_url": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "key": "a",
            "secret": "b",
            "region": "us-east-1",
            "client": client,
            "timeout": 0.2,
            "retry_seconds": 0.5,
        }
        place = ObjectPlace("s3://bucket/store", "", options)
        calls = (
            lambda: place.read("thing"),
            lambda: place.names(""),
            lambda: place.publish_bytes("thing", b"x", replace=True),
        )
        for call in calls:
            with no_hang(), pytest.raises(StorageIOError, match="tried"):
                call()
        place.close()


def test_what_is_counted_is_what_the_server_has_seen(bucket, proxy):
    """Requests, bytes and failures, by operation."""

    def counted():
        return {(m.short, m.attributes[0][1]): m.value for m in process_metrics()}

    place = ObjectPlace(bucket.url, "", bucket.through(proxy))
    before = counted()
    proxy.rule("SlowDown", "PUT .*thing", times=2, status=503)
    place.publish_bytes("thing", bytes(1000), replace=True)
    assert place.read("thing") == bytes(1000)
    place.names("")
    more = {key: value - before.get(key, 0) for key, value in counted().items()}
    seen = [request.split()[0] for request in proxy.requests]
    assert more["failures", "put"] == 2
    assert more["requests", "put"] == 1 == seen.count("PUT") - 2
    assert more["requests", "get"] + more["requests", "listing"] == seen.count("GET")
    assert more["sent", "put"] == more["received", "get"] == 1000
    assert more["time", "put"] > 0
    place.close()
