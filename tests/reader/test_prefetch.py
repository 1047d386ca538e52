"""The thread that works ahead: it never leaves anybody waiting, and nothing behind."""

from __future__ import annotations

import os
import threading
import time

import pytest

from actcache.errors import ClosedError
from actcache.reader.prefetch import Prefetch
from tests.support import run
from tests.support.waiting import DEADLINE, until


def none(seconds, ready):
    pass


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("actcache-prefetch")]


def test_all_in_order():
    assert list(Prefetch(iter(range(1000)), 3, none)) == list(range(1000))
    assert list(Prefetch(iter([]), 1, none)) == []


def test_it_works_ahead_but_no_farther_than_it_may():
    made = []

    def produce():
        for i in range(20):
            made.append(i)
            yield i

    items = Prefetch(produce(), 3, none)
    assert next(items) == 0
    until(lambda: len(made) == 4)
    time.sleep(0.05)
    assert len(made) == 4  # the consumer's and three that wait
    items.close()


def test_an_exception_comes_in_its_turn_with_its_cause():
    def produce():
        yield 1
        yield 2
        try:
            raise OSError("the disk")
        except OSError as error:
            raise ValueError("wrong") from error

    items = Prefetch(produce(), 5, none)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="wrong") as caught:
        next(items)
    assert isinstance(caught.value.__cause__, OSError)
    assert list(items) == []  # and not for ever


def test_what_is_produced_is_closed_wherever_it_stands():
    for taken in (0, 1, 3):
        closed = threading.Event()

        def produce(closed=closed):
            try:
                while True:
                    yield 0
            finally:
                closed.set()

        items = Prefetch(produce(), 2, none)
        for _ in range(taken):
            next(items)
        items.close()
        items.close()
        assert closed.is_set() or taken == 0
        assert list(items) == []


def test_breaking_off_and_the_collector():
    for _ in range(20):
        for i in Prefetch(iter(range(100)), 2, none):
            if i == 3:
                break


def test_a_consumer_that_waits_is_woken_by_close():
    go = threading.Event()

    def produce():
        go.wait(90)
        yield 1

    items = Prefetch(produce(), 1, none)
    threading.Timer(0.1, lambda: (items._channel.close(), go.set())).start()
    assert list(items) == []


def test_an_interrupt_ends_the_wait():
    code = """
import os, signal, threading, time
from actcache.reader.prefetch import Prefetch
def produce():
    time.sleep(600)
    yield 1
items = Prefetch(produce(), 1, lambda s, r: None)
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    next(items)
except KeyboardInterrupt:
    print("interrupted", flush=True)
os._exit(0)
"""
    assert run(code, timeout=120) == "interrupted\n"


def test_a_process_that_ends_in_the_middle_ends():
    code = """
from actcache.reader.prefetch import Prefetch
items = Prefetch(iter(range(10**9)), 4, lambda s, r: None)
print(next(items))
"""
    assert run(code, timeout=120) == "0\n"


def test_a_forks_child_is_told():
    items = Prefetch(iter(range(100)), 2, none)
    assert next(items) == 0
    pid = os.fork()
    if pid == 0:
        try:
            next(items)
        except ClosedError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert next(items) == 1
    items.close()


def test_waiting_is_counted(monkeypatch):
    """By a clock that goes on only while the first item is made."""
    seen, now, waiting = [], [0.0], threading.Event()

    def clock():
        waiting.set()
        return now[0]

    def produce():
        waiting.wait(DEADLINE)
        now[0] = 0.1
        yield 1
        yield 2

    monkeypatch.setattr(time, "perf_counter", clock)
    items = Prefetch(produce(), 2, lambda seconds, ready: seen.append((seconds, ready)))
    next(items)
    until(lambda: len(items._channel) == 1)
    next(items)
    assert [seconds for seconds, _ in seen] == [0.1, 0.0]
    assert seen[1][1] == 1
    items.close()
