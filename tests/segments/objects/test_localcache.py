"""A local cache over a store on an S3 server, over the wire: what was read once needs no server any more."""

from __future__ import annotations

import numpy as np
import pytest

import actcache
from tests.segments.objects.proxy import Rule
from tests.support import ids, key, length, recipe

COUNT = 60
RECIPE = recipe(hidden_size=2048)  # what is read with the head of a segment is not all of it


def rows(number):
    return np.random.default_rng(number).standard_normal((length(number), RECIPE.hidden_size)).astype(np.float32)


@pytest.fixture(autouse=True)
def _stored(bucket):
    with actcache.open(bucket.url, **bucket.options) as store, store.space(RECIPE) as space:
        numbers = range(COUNT)
        space.put([key(n) for n in numbers], [rows(n) for n in numbers], [ids(n) for n in numbers])


def epoch(reader):
    delivered = []
    for batch in reader:
        offsets = np.r_[0, np.cumsum(batch.lengths)]
        for i, number in enumerate(batch.documents.tolist()):
            np.testing.assert_array_equal(batch.activations[offsets[i] : offsets[i + 1]], rows(number))
            np.testing.assert_array_equal(batch.token_ids[offsets[i] : offsets[i + 1]], ids(number))
            delivered.append(number)
    assert sorted(delivered) == list(range(COUNT))


def gets(proxy):
    return [request for request in proxy.requests if request.startswith("GET") and "list-type" not in request]


def test_the_second_epoch_needs_no_server(bucket, proxy, tmp_path):
    options = {**bucket.through(proxy), "timeout": 1, "retry_seconds": 1}
    with actcache.open(bucket.url, mode="r", **options) as store, store.space(RECIPE) as space:
        kept = {"local_cache": tmp_path / "cache", "local_bytes": "64MiB"}
        reader = space.reader([key(i) for i in range(COUNT)], batch_size=7, shuffle=True, layout="packed", **kept)
        opened = len(gets(proxy))
        epoch(reader)
        assert len(gets(proxy)) > opened
        proxy.requests.clear()
        epoch(reader)
        assert gets(proxy) == []
        proxy.rules.append(Rule("SlowDown", times=1_000_000))  # it answers nothing any more
        epoch(reader)
        assert reader.stats().local_documents == 2 * COUNT


def test_the_next_run_reads_the_index_alone(bucket, proxy, tmp_path):
    for run in range(2):
        proxy.requests.clear()
        with actcache.open(bucket.url, mode="r", **bucket.through(proxy)) as store, store.space(RECIPE) as space:
            opened = len(gets(proxy))
            kept = {"local_cache": tmp_path / "cache", "local_bytes": "64MiB"}
            with space.reader([key(i) for i in range(COUNT)], batch_size=7, layout="packed", **kept) as reader:
                epoch(reader)
                assert reader.stats().local_documents == run * COUNT
        assert (len(gets(proxy)) > opened) == (run == 0)
