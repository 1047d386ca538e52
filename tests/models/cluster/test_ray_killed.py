"""A real Ray in everyday size: a worker is killed, then the driver, and the next fill completes what they left.

Ray takes seconds to start, and each of its workers some to import torch: one cluster, and both stores at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("ray", reason="Ray is not installed: run make .venv/.ray")

from actcache import Recycler
from actcache.models.cluster import leader
from bench.docstrings import docstrings as all_docstrings
from tests.models.cluster.driving import GO, OPTIONS, fill
from tests.models.cluster.killing import Driver, Killed, different, runs
from tests.segments.objects.conftest import REAL, REAL_KEYS, Bucket, Server, moto  # noqa: F401
from tests.support import PYTHONPATH

pytestmark = [pytest.mark.processes, pytest.mark.timeout(1800)]
pytestmark.append(pytest.mark.skipif(sys.platform != "linux", reason="Ray was tried on Linux alone"))
pytestmark.append(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"))  # of Ray's own

COUNT = 480
CHUNK = 16  # documents that a worker is given at a time
HELD = 5  # batches, of so many documents, that each computes before it waits: no worker is done before it is killed
SECONDS = 600.0  # on a machine that is busy with other things
SMALL = {"chunk": CHUNK, "segment_bytes": 1 << 20, "cpus": 1, "finish": False}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """That of a small cluster here, to which this process is connected. It leaves no process behind."""
    import ray

    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)  # of the workers, too
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setattr(leader, "available_cpus", lambda: 4)  # two stores, two workers each
    monkeypatch.setattr(ray, "init", lambda init=ray.init, **more: init(object_store_memory=100 << 20, **more))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    before = {one.pid for one in psutil.Process().children(recursive=True)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with leader.connected(ray, "local"):
            assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
            assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
            yield ray.get_runtime_context().gcs_address
            started = {one.pid for one in psutil.Process().children(recursive=True)} - before
            assert started
    _gone, left = psutil.wait_procs([psutil.Process(pid) for pid in started if psutil.pid_exists(pid)], timeout=60)
    assert [one for one in left if runs(one.pid)] == []


@pytest.fixture
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """On the real server where one is named, else moto's."""
    server = Server(REAL, REAL_KEYS, "real") if REAL else request.getfixturevalue("moto")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with contextlib.closing(server.client()) as client:
        found = Bucket(server, f"ray-{uuid.uuid4().hex[:16]}", client)
        client.create_bucket(Bucket=found.name)
        yield found
        found.remove()


def test_a_worker_is_killed_then_the_driver_and_the_next_fill_completes_it(
    address: str, bucket: Bucket, minilm_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Two workers fill hdf5 with real documents, two others an object store. Each document is there once, and none was
    computed by two workers but those of the killed ones."""
    documents = different((text[:250] for _, text in all_docstrings()), tokenizer, COUNT)
    places = [
        Killed(f"hdf5:{tmp_path / 'store'}", documents, tmp_path / "log"),
        Killed(bucket.url, documents, tmp_path / "log of objects", bucket.options),
    ]

    def all_held() -> bool:
        return all(list(one.workers().values()).count(HELD * CHUNK) >= 2 for one in places)

    with Driver(tmp_path, places, model=minilm_path, address=address, held=HELD, **SMALL) as driver:
        driver.wait(lambda: all_held() and all(len(one.notes()) == 2 for one in places), SECONDS)
        for one in places:
            one.kill_a_worker()
        driver.wait(lambda: all(len(one.notes()) == 3 for one in places), SECONDS)  # their successors store
    for one in places:
        one.driver_is_dead()
    (tmp_path / GO).touch()

    def rerun(one: Killed) -> dict[str, Any]:
        place = {"store": one.url, "options": dict(one.options), "log": str(one.log)}
        return fill(place, minilm_path, one.texts, **SMALL)

    with ThreadPoolExecutor() as threads:
        reports = [*threads.map(rerun, places)]
    for one, report in zip(places, reports, strict=True):
        one.check_report(report)
        one.recompute(minilm_path, tokenizer, 20)
        with one.space("a") as space:
            space.finish()
            assert len(space) == COUNT
            assert space.verify().intact
    with Recycler.from_pretrained(minilm_path, store=places[0].url, **OPTIONS) as recycler:
        assert recycler.missing(places[0].texts) == []
