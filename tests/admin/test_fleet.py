"""plan --nodes: arithmetic against sums by hand, and what bounds what."""

from __future__ import annotations

import dataclasses

import pytest

from actcache.admin import fleet
from actcache.admin.fleet import Nodes, ObjectStore
from actcache.admin.planning import CorpusSize, ModelCosts
from actcache.errors import UsageError
from tests.cli.running import cachectl

GIVEN = ["--documents", 1_000_000_000, "--tokens", 1270, "--hidden", 4096, "--full-ms", 40, "--upper-ms", 20]


def test_a_billion_documents_by_hand():
    found = cachectl("plan", *GIVEN, "--nodes", 125, "--devices", 8, "--json").json()
    nbytes = 10**9 * (1270 * (4096 * 2 + 4) + 64)
    segments = -(-nbytes // 2**28)
    assert found["nbytes"] == nbytes
    assert found["segments"] == segments
    assert found["index_bytes"] == 64 * 10**9 + 700 * segments
    assert found["process_memory"] == 2400 * segments + 56 * 10**9
    assert found["device_hours"] == pytest.approx(10**9 * 20e-3 / 3600)
    assert found["fill"] == pytest.approx(10**9 * 20e-3 / 1000)
    assert found["fill_bound"] == "the lower half"
    assert found["fill_puts"] == segments * (16 + fleet.FLUSH_REQUESTS + fleet.LISTINGS)
    assert found["replay"] == pytest.approx(max(10**9 * 20e-3 / 1000, nbytes / (125 * 12.5e9)))
    assert found["replay_gets_per_second"] == pytest.approx(10**9 / found["replay"])
    assert found["prefixes"] == -(-found["replay_gets_per_second"] // 5500)
    assert found["storage_month"] == pytest.approx(nbytes / 2**30 * 0.023)
    assert found["replay_requests"] == pytest.approx(400)
    text = cachectl("plan", *GIVEN, "--nodes", 125, "--devices", 8).out
    assert found["verdict"] in text.replace("\n", " ")
    assert "5,556 hours of a device" in text
    priced = cachectl("plan", *GIVEN, "--nodes", 2, "--device-hour", 2, "--gib-month", 0.01)
    assert "($11,111)" in priced.out


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({"network": 1e6}, "the network"),
        ({"request_seconds": 60.0}, "requests in flight"),
        ({"cores": 1, "request_cpu": 0.5}, "the processors"),
        ({}, "the upper half"),
    ],
)
def test_what_bounds_a_pass(changes, bound):
    load, costs = CorpusSize(1000, 1_000_000), ModelCosts(1e-4, 5e-5, 1024)
    found = fleet.estimate(load, costs, "float16", dataclasses.replace(Nodes(2), **changes))
    assert found.replay_bound == bound
    assert found.replay >= 1_000_000 * 5e-5 / 16
    more = fleet.estimate(load, costs, "float16", dataclasses.replace(Nodes(4), **changes))
    assert more.replay == pytest.approx(found.replay / 2)


def test_a_pass_reads_a_passage_wherever_it_stands_and_a_fill_computes_it_once():
    once, costs, nodes = CorpusSize(1000, 1_000_000), ModelCosts(1e-4, 5e-5, 1024), Nodes(2)
    repeated = dataclasses.replace(once, passed=3_000_000, places=4000)
    alone, found = (fleet.estimate(load, costs, "float16", nodes) for load in (once, repeated))
    assert (found.nbytes, found.fill, found.fill_puts) == (alone.nbytes, alone.fill, alone.fill_puts)
    assert found.replay == pytest.approx(3_000_000 * 5e-5 / nodes.processes)
    assert found.replay_gets == 4000
    assert found.replay_requests == pytest.approx(4000 * 0.4e-6)
    assert found.process_memory - alone.process_memory == 3000 * fleet.DOCUMENT_MEMORY
    slow = dataclasses.replace(nodes, network=1e6)
    bound = fleet.estimate(repeated, costs, "float16", slow)
    assert bound.replay == pytest.approx(3 * alone.nbytes / (2 * 1e6))


def test_it_asks_as_often_as_the_store_does():
    """The constants of the engine, which admin does not import with its libraries."""
    from actcache.segments.index_files import _SEGMENT_BYTES
    from actcache.segments.places.objects import session
    from actcache.segments.places.objects.transfers import _PART_BYTES

    assert session.IN_FLIGHT == fleet.IN_FLIGHT
    assert _PART_BYTES == fleet.PART_BYTES
    assert _SEGMENT_BYTES == fleet.INDEX_SEGMENT_BYTES


def test_nonsense_is_refused():
    for options, said in ((["--read", "1GB", "--write", "1GB"], "--network"), (["--network", "fast"], "8GiB")):
        assert said in cachectl("plan", *GIVEN, "--nodes", 2, *options).refused(2)
    with pytest.raises(UsageError, match="the network must be positive"):
        fleet.estimate(CorpusSize(1, 1), ModelCosts(1, 1, 8), "float16", Nodes(1, network=0), ObjectStore())
