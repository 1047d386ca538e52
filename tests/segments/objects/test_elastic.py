"""Ranks of ``torchrun`` read from S3, are killed in the middle of an epoch, and others go on, more or fewer of them.

Not every day, since a rank takes two seconds to load torch: `make test-object-stores`, which CI runs, and the long run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import pytest

import actcache
from tests.segments.objects import elastic_ranks
from tests.support import PYTHONPATH, put, recipe
from tests.support.tiny import save_tiny
from tests.support.waiting import until

pytestmark = pytest.mark.long

COUNT = 100


class Job:
    """Runs of one training job, one after another, by any number of ranks."""

    def __init__(self, bucket, folder, **config):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.config = {"url": bucket.url, "options": bucket.options, "folder": str(folder), **config}

    def start(self, ranks, **config):
        """Start ranks under an agent of torchrun, in a process group of its own."""
        given = self.folder / "config.json"
        given.write_text(json.dumps({**self.config, **config}))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", elastic_ranks.__file__, str(given)]
        environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
        with open(self.folder / "stderr", "w", encoding="utf-8") as stderr:
            return subprocess.Popen(command, stderr=stderr, env=environment, start_new_session=True)

    def run(self, ranks, **config):
        """Run ranks to their end; return whether that was a good one."""
        process = self.start(ranks, **config)
        return process.wait(timeout=120) == 0

    @property
    def checkpoint(self):
        path = self.folder / "checkpoint.json"
        return json.loads(path.read_text()) if path.exists() else None

    @property
    def told(self):
        return (self.folder / "stderr").read_text()


@pytest.fixture
def job(bucket, tmp_path):
    with actcache.open(bucket.url, **bucket.options) as store:
        for first in range(0, COUNT, 40):
            put(store.space(recipe()), range(first, min(COUNT, first + 40)))
    return Job(bucket, tmp_path / "job", count=COUNT)


@pytest.mark.timeout(300)
def test_two_ranks_are_killed_and_three_go_on_and_then_one(job):
    """What was trained on after the last checkpoint does not count: other ranks read it again, each document once."""
    counted = 0
    for ranks, killed in ((2, [1, 5]), (3, [0, 5])):
        assert not job.run(ranks, kill=killed)
        assert "Signal 9" in job.told or "SIGKILL" in job.told
        counted += elastic_ranks.EVERY * 4 * ranks
        assert len(job.checkpoint["epochs"][0]) == counted  # two steps more were made, and were lost
    assert job.run(1), job.told
    assert sorted(job.checkpoint["epochs"][0]) == list(range(COUNT))


@pytest.mark.timeout(300)
def test_what_is_missing_is_computed_by_the_ranks_and_by_those_who_go_on(bucket, tmp_path):
    model = save_tiny(tmp_path / "model", words=["document", "says", "la"])
    texts = [f"document {i} says " + "la " * (i % 13) for i in range(61)]
    job = Job(bucket, tmp_path / "job", model=str(model), texts=texts, epochs=2)
    assert not job.run(2, kill=[1, 4])
    assert job.run(3), job.told
    said = job.checkpoint
    for epoch in range(2):
        assert sorted(said["epochs"][epoch]) == list(range(len(texts)))
    assert said["digests"][0] == said["digests"][1]  # as computed and as replayed
    assert said["computed"][0] > 0
    assert said["computed"][1] == 0  # by nobody: what another rank has computed is seen
    keys = [actcache.document_key(text) for text in texts]
    with (
        actcache.Recycler.from_pretrained(model, layer=2, store=tmp_path / "alone", dtype="float32") as alone,
        actcache.open(bucket.url, "r", **bucket.options) as store,
    ):
        alone.fill(texts, progress=False)
        for one, other in zip(alone.space.get(keys), store.spaces()[0].get(keys), strict=True):
            np.testing.assert_allclose(one.activations, other.activations, atol=1e-5)


@pytest.mark.timeout(1200)
def test_many_kills_from_outside(bucket, tmp_path):
    """Of a rank, of the agent, of all at once, at any moment, while a checkpoint is written, too."""
    count = 1200
    with actcache.open(bucket.url, **bucket.options) as store:
        put(store.space(recipe()), range(count))
    job = Job(bucket, tmp_path / "job", count=count, seconds=0.02)
    chance = random.Random(7)
    kills = 0
    while len((job.checkpoint or {}).get("epochs", ())) < 2:
        before = job.checkpoint
        process = job.start(chance.choice([1, 2, 3]))
        if kills < 12:
            with suppress(AssertionError):
                until(lambda: job.checkpoint != before or process.poll() is not None, 60)  # noqa: B023
            time.sleep(chance.uniform(0, 0.5))
            victim = chance.choice(["rank", "agent", "all"])
            with suppress(ProcessLookupError, FileNotFoundError):
                if victim == "rank":
                    os.kill(int((job.folder / "pid-0").read_text()), signal.SIGKILL)
                elif victim == "agent":
                    process.kill()
            kills += 1
        else:
            assert process.wait(timeout=300) == 0, job.told
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # nothing of this run is left
        process.wait()
    assert kills >= 3
    assert sorted(job.checkpoint["epochs"][0]) == list(range(count))
