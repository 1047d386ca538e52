"""Threads that share the jobs of a batch."""

from __future__ import annotations

import threading

import pytest

from actcache.io.workers import Workers
from tests.support.waiting import DEADLINE


@pytest.fixture
def workers():
    made = Workers(threads=3)
    yield made
    made.close()


def test_each_job_is_done_once_on_several_threads(workers):
    """They meet: that takes three threads at work at once."""
    meet, done = threading.Barrier(3), []

    def job(number: int) -> None:
        if number % 4 == 0:
            meet.wait(DEADLINE)
        done.append(number)

    workers.run(job, 12)
    assert sorted(done) == list(range(12))
    workers.run(done.append, 0)
    assert len(done) == 12


def test_chunks_go_through_all_steps_in_order(workers):
    seen: dict[tuple[int, int], list[str]] = {}
    steps = [lambda *at, name=name: seen.setdefault(at, []).append(name) for name in ("read", "check")]
    workers.run_chunks(steps, [slice(0, 4), slice(4, 8), slice(8, 9)])
    assert seen == {at: ["read", "check"] for at in ((0, 4), (4, 8), (8, 9))}


@pytest.mark.parametrize("bad", [0, 5, 11])
def test_a_failure_is_raised_when_all_have_ended(workers, bad):
    def job(number: int) -> None:
        if number == bad:
            raise ValueError(f"job {number}")

    with pytest.raises(ValueError, match=f"job {bad}$"):
        workers.run(job, 12)


def test_it_works_when_its_threads_were_ended(workers):
    done: list[int] = []
    workers.run(done.append, 6)
    workers.close()
    workers.run(done.append, 6)
    assert sorted(done) == sorted([*range(6), *range(6)])
