"""A prefix that was emptied, or holds another store, under an open one; see ``tests/segments/test_store_gone.py``."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fsspec
import pytest

import actcache
from actcache.errors import StoreGoneError
from tests.support import check, key, put, recipe

HELD = dict.fromkeys(range(6), 0)


@dataclass
class There:
    """An empty place for a store, and what lies in it, through another library than ours."""

    url: str
    options: dict[str, Any]
    read: Callable[[], dict[str, bytes]]
    write: Callable[[dict[str, bytes]], None]

    def empty(self) -> dict[str, bytes]:
        held = self.read()
        self.write({})
        return held


@pytest.fixture(params=["", "zarr:", "memory"])
def there(request, bucket):
    if request.param == "memory":
        memory, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}/store"

        def found():
            return {name: memory.cat_file(name) for name in memory.find(root)}

        def written(held):
            for name in found().keys() - held.keys():
                memory.rm_file(name)
            for name, data in held.items():
                memory.pipe_file(name, data)

        yield There(f"memory:/{root}", {}, found, written)
        written({})
        return

    def objects():
        return {k: bucket.s3.get_object(Bucket=bucket.name, Key=k)["Body"].read() for k in bucket.listed()}

    def put_objects(held):
        for name in set(bucket.listed()) - held.keys():
            bucket.s3.delete_object(Bucket=bucket.name, Key=name)
        for name, data in held.items():
            bucket.s3.put_object(Bucket=bucket.name, Key=name, Body=data)

    yield There(request.param + bucket.url, bucket.options, objects, put_objects)


def refused(store, space):
    for change in (
        lambda: space.delete([key(1)]),
        lambda: space.compact(waste=0.0, grace=0.0),
        space.refresh,
        space.repair,
        lambda: space.put_blob("note.json", b"{}"),
        lambda: store.put_collection("other", [key(2)]),
        lambda: store.collection("some"),
        lambda: store.delete_collection("some"),
        lambda: store.space(recipe(layer=3)),
        lambda: store.delete_space(recipe().fingerprint),
        lambda: store.sweep(0.0),
    ):
        with pytest.raises(StoreGoneError):
            change()


def test_an_emptied_prefix_takes_nothing_until_the_store_is_back(there):
    with actcache.open(there.url, **there.options) as store, store.space(recipe()) as space:
        put(space, range(3))
        store.put_collection("some", [key(1)])
        space.flush()
        put(space, range(3, 6))
        held = there.empty()
        with pytest.raises(StoreGoneError, match=r"not stored: 3, .* flush again"):
            space.flush()
        refused(store, space)
        assert there.read() == {}
        with pytest.raises(StoreGoneError):
            pickle.loads(pickle.dumps(space))  # noqa: S301
        assert there.read() == {}
        there.write(held)
        space.flush()
        check(space, HELD, range(8))
    with actcache.open(there.url, "r", **there.options) as store, store.space(recipe()) as space:
        check(space, HELD, range(8))


def test_another_store_in_its_place_is_not_touched(there):
    with actcache.open(there.url, **there.options) as store, store.space(recipe()) as space:
        put(space, range(5))
        store.put_collection("some", [key(1)])
        space.flush()
        put(space, [5])
        sent, held = pickle.dumps(space), there.empty()
        with actcache.open(there.url, **there.options) as other, other.space(recipe()) as others:
            put(others, range(8), version=1)
            other.put_collection("some", [key(7)])
        before = there.read()
        with pytest.raises(StoreGoneError, match="another store"):
            space.flush()
        refused(store, space)
        with pytest.raises(StoreGoneError, match="another store"):
            pickle.loads(sent)  # noqa: S301
        assert there.read() == before
        there.write(held)
        space.flush()
        check(space, HELD, range(8))


def test_what_the_look_costs(bucket, proxy):
    """One small GET a segment that is published, none a batch that is read."""
    with actcache.open(bucket.url, **bucket.through(proxy)) as store, store.space(recipe()) as space:
        put(space, range(3))
        space.flush()

        def looks():
            found = [request for request in proxy.requests if request.startswith("GET") and "/actcache.json" in request]
            proxy.requests.clear()
            return len(found)

        looks()
        for first in (3, 6, 9):
            put(space, range(first, first + 3))
            space.flush()
            assert looks() == 1
        check(space, dict.fromkeys(range(12), 0), range(12))
        space.refresh()
        assert looks() == 0
