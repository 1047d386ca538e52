"""Fills on a Ray cluster of several nodes, which are raylets of this machine: one is lost, some have GPUs by their own
word, and the cluster is found by ``RAY_ADDRESS``, by its address, and through Ray's client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: run make .venv/.ray")

import actcache
from actcache import Recycler
from actcache.errors import WorkerError
from bench.docstrings import docstrings as all_docstrings
from tests.cli.test_fill import TEXTS, _own_cache, tiny  # noqa: F401
from tests.models.cluster.driving import GO, fill
from tests.models.cluster.killing import Killed, different
from tests.support import PYTHONPATH
from tests.support.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.processes, pytest.mark.timeout(3600)]
pytestmark.append(pytest.mark.filterwarnings("ignore"))  # of Ray's own

SECONDS = 900.0
CHUNK, HELD = 16, 5
SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 << 20}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster whose head computes nothing, and takes Ray's clients at ``nodes.client``."""
    from ray.cluster_utils import Cluster

    for name, value in (("PYTHONPATH", PYTHONPATH), ("memory_monitor_refresh_ms", "0"), ("USAGE_STATS_ENABLED", "0")):
        monkeypatch.setenv(name if name == "PYTHONPATH" else f"RAY_{name}", value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head = {**SMALL, "num_cpus": 0, "include_dashboard": False, "ray_client_server_port": port}
    made = Cluster(initialize_head=True, head_node_args=head)
    made.client = f"ray://127.0.0.1:{port}"
    try:
        yield made
    finally:
        made.shutdown()


def test_a_node_is_lost_and_each_document_is_there_once(nodes, minilm_path, tokenizer, tmp_path, monkeypatch):
    homes = [nodes.add_node(**SMALL) for _ in range(3)]
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    documents = different((text[:250] for _, text in all_docstrings()), tokenizer, 600)
    killed = Killed(f"hdf5:{tmp_path / 'store'}", documents, tmp_path / "log")
    lost: list[set[str]] = []

    def lose() -> None:
        until(lambda: len(killed.notes()) == 2, SECONDS)
        above = {one.pid for one in psutil.Process(next(iter(killed.workers()))).parents()}
        (home,) = [one for one in homes if one.all_processes["raylet"][0].process.pid in above]
        lost.append(killed.stored())
        nodes.remove_node(home, allow_graceful=False)
        (tmp_path / GO).touch()

    losing = threading.Thread(target=lose)
    losing.start()
    place = {"store": killed.url, "options": {}, "log": str(killed.log)}
    try:
        more: dict[str, Any] = {"cpus": 1, "chunk": CHUNK, "finish": False}
        report = fill(place, minilm_path, killed.texts, held=HELD, segment_bytes=1 << 20, **more)
    finally:
        (tmp_path / GO).touch()
        losing.join()
    assert (report["documents"], report["computed"] + report["present"]) == (600, 600)
    assert killed.stored() == set(documents)
    assert sorted(one["attempt"] for one in report["contributions"]) in ([0, 0, 1], [0, 0, 0, 1])
    for document, by in killed.logged().items():
        assert len(by) == 1 or document not in lost[0]
    killed.recompute(minilm_path, tokenizer, 30)


def test_what_asks_for_gpus(nodes, tiny, tmp_path):  # noqa: F811
    """A node that says that it has two: a worker on each; torch, which finds none here, says so."""
    nodes.add_node(**{**SMALL, "num_cpus": 2, "num_gpus": 2})
    with Recycler.from_pretrained(tiny, layer=1, store=tmp_path / "s", device="cpu") as recycler:
        if not torch.cuda.is_available():
            with pytest.raises(
                WorkerError, match=r"Ray gave this worker a GPU on .* finds none there: .* device='cpu'"
            ):
                recycler.fill_ray(TEXTS, address=nodes.address, progress=False)
        report = recycler.fill_ray(TEXTS[:100], address=nodes.address, device="cpu", gpus=1, progress=False)
        assert {one.partition for one in report.contributions} == {"0/2", "1/2"}
        report = recycler.fill_ray(TEXTS, address=nodes.address, device="cpu", progress=False)  # asks for none
        assert {one.partition for one in report.contributions} == {"0/1"}
        assert recycler.missing(TEXTS) == []
        with pytest.raises(WorkerError, match=r"did not start within 5 s: each asks for 1 CPUs and 3 GPUs, .* 2 and 2"):
            recycler.fill_ray(["new"], address=nodes.address, gpus=3, start_seconds=5, progress=False)


def test_through_the_client_of_ray(nodes, tiny, tmp_path):  # noqa: F811
    """In a process of its own: Ray's client is for one cluster a process."""
    nodes.add_node(**{**SMALL, "num_cpus": 2})
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    command = ["fill", tmp_path / "s", tmp_path / "corpus.jsonl", "--field", "body", "--model", tiny, "--layer", 1]
    command += ["--workers", 2, "--ray", nodes.client, "--json"]
    for computed in (200, 0):
        for _ in range(3):  # Ray gives the process that serves a client 30 s to start, which a busy machine may not
            done = subprocess.run(
                [sys.executable, "-m", "cachectl", *map(str, command)],
                env={**os.environ, "PYTHONPATH": PYTHONPATH},
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
            if "Starting Ray client server failed" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["computed"] == computed
    with actcache.open(tmp_path / "s", mode="r") as store:
        (space,) = store
        assert len(space) == 200
