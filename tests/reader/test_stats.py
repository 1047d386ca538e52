"""What a reader says about itself, and to whom."""

from __future__ import annotations

import time

import numpy as np
import pytest

import actcache
from actcache.reader.stats import ReaderStats, prometheus_text
from tests.support import HIDDEN, key, length, put, recipe

COUNT = 30
KEYS = [key(n) for n in range(COUNT)]
TOKENS = sum(length(n) for n in range(COUNT))


@pytest.fixture
def space(tmp_path):
    with actcache.open(tmp_path / "store") as store, store.space(recipe()) as space:
        put(space, range(COUNT))
        space.flush()
        yield space


def test_times_are_of_what_they_say(space, monkeypatch):
    read_into = space.read_into

    def slow(*args, **options):
        time.sleep(0.03)
        return read_into(*args, **options)

    monkeypatch.setattr(space, "read_into", slow)
    reader = space.reader(KEYS, batch_size=10, depth=1, device="meta")
    start = time.perf_counter()
    for _ in reader:
        time.sleep(0.01)
    passed = time.perf_counter() - start
    stats = reader.stats()
    assert stats.read_seconds > 0.09
    assert 0 < stats.copy_seconds < passed
    assert 0 < stats.decode_seconds < passed
    assert stats.copy_seconds + stats.decode_seconds <= stats.deliver_seconds
    assert 0.03 <= stats.step_seconds < passed
    assert 0.025 < stats.first_seconds <= stats.wait_seconds
    assert stats.wait_seconds + stats.step_seconds <= passed
    waited = stats.wait_seconds - stats.first_seconds
    assert stats.stall_fraction == waited / (waited + stats.step_seconds)
    assert (stats.epochs, stats.batches, stats.documents, stats.tokens) == (1, 3, COUNT, TOKENS)
    host = space.reader(KEYS)
    list(host)
    assert host.stats().copy_seconds == 0
    assert host.stats().decode_seconds > 0


@pytest.mark.parametrize("depth", [0, 2])
def test_whoever_listens_is_told(space, depth):
    told = []
    reader = space.reader(KEYS, batch_size=10, depth=depth, on_stats=told.append)
    for epoch in range(2):
        for i, _ in enumerate(reader):
            assert len(told) == 4 * epoch + i
            time.sleep(0.005)
    assert [(stats.epochs, stats.batches) for stats in told] == [
        *((0, 1), (0, 2), (0, 3), (1, 3)),
        *((1, 4), (1, 5), (1, 6), (2, 6)),
    ]
    # Each is a snapshot that has the last step in it.
    steps = [stats.step_seconds for stats in told]
    assert all(after - before >= 0.005 for before, after in zip([0, *steps], steps[:3], strict=False))
    assert told[-1] == reader.stats()


def test_a_listeners_failure_reaches_the_consumer_and_loses_no_batch(space):
    failing = [True]

    def listen(stats):
        if failing.pop():
            raise RuntimeError("the exporter")
        failing.append(False)

    iterator = iter(space.reader(KEYS, batch_size=10, on_stats=listen))
    seen = next(iterator).documents.tolist()
    with pytest.raises(RuntimeError, match="exporter"):
        next(iterator)
    failing.append(False)
    for batch in iterator:
        seen += batch.documents.tolist()
    assert seen == list(range(COUNT))


def test_metrics(space):
    reader = space.reader(KEYS, batch_size=10)
    list(reader)
    metrics = {metric.name: metric for metric in reader.stats().metrics()}
    assert metrics["actcache.reader.batches"].value == 3
    assert metrics["actcache.reader.io"].value == TOKENS * HIDDEN * 4
    assert metrics["actcache.reader.io"].unit == "By"
    assert {metric.unit for name, metric in metrics.items() if name.endswith(".time")} == {"s"}
    counters = {metric.attribute for metric in metrics.values() if metric.kind == "counter"}
    assert counters == set(vars(ReaderStats())) - {"ready"}  # every count is exported, "ready" as queue.depth


def test_the_text_for_prometheus(space):
    reader = space.reader(KEYS, batch_size=10)
    list(reader)
    lines = prometheus_text(reader.stats().metrics(), rank="0", run='a "b"\\').splitlines()
    assert len(lines) == 3 * len(reader.stats().metrics())
    assert 'actcache_reader_batches_total{rank="0",run="a \\"b\\"\\\\"} 3.0' in lines
    assert "# TYPE actcache_reader_read_time_seconds_total counter" in lines
    assert "# TYPE actcache_reader_stall_ratio gauge" in lines
    for line in prometheus_text(reader.stats().metrics()).splitlines():
        assert line.startswith("# ") or np.isfinite(float(line.split()[1]))
