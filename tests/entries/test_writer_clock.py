"""What was put is published when it is old enough, whether more comes or not. Tests turn a clock, none waits."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

import actcache
from actcache.entries.writer import SEGMENT_SECONDS, Clock, Writer
from actcache.errors import OutOfSpaceError
from tests.support import check, put, recipe
from tests.support.backends import each

COLUMNS = {"values": ("float32", (4,))}


class Hand(Clock):
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.calls: list[tuple[float, Callable[[], Any]]] = []

    def now(self) -> float:
        return self.time

    def later(self, seconds: float, call: Callable[[], Any]) -> Callable[[], None]:
        made = (self.time + seconds, call)
        self.calls.append(made)

        def call_off() -> None:
            with suppress(ValueError):
                self.calls.remove(made)

        return call_off

    def turn(self, seconds: float) -> None:
        end = self.time + seconds
        while due := [made for made in self.calls if made[0] <= end]:
            first = min(due, key=lambda made: made[0])
            self.calls.remove(first)
            self.time = max(self.time, first[0])
            first[1]()
        self.time = end


def until(there: Callable[[], bool]) -> None:
    """Wait for a thread that has all it needs."""
    deadline = time.monotonic() + 120
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def add(writer: Writer, number: int) -> None:
    key = np.frombuffer(number.to_bytes(32, "big"), np.uint8).reshape(1, 32)
    writer.add(key, np.array([3]), frozenset(COLUMNS), lambda out: out["values"].fill(number))


@pytest.fixture
def clock() -> Hand:
    return Hand()


@each()
def test_what_is_put_is_published_when_it_is_old(kind, clock, tmp_path, monkeypatch):
    """On every backend, for another process to see, and with nothing put after it."""
    monkeypatch.setattr("actcache.entries.writer.Clock", lambda: clock)
    url = kind.url(tmp_path / "s")

    def seen() -> int:
        with actcache.open(url, "r") as other, other.space(recipe()) as space:
            check(space, dict.fromkeys(range(len(space)), 0), range(30))
            return len(space)

    with actcache.open(url) as store, store.space(recipe()) as space:
        put(space, range(10))
        clock.turn(SEGMENT_SECONDS - 1)
        put(space, range(10, 20))
        assert seen() == 0
        clock.turn(2)
        until(lambda: seen() == 20)
        put(space, range(20, 30))
        clock.turn(SEGMENT_SECONDS - 1)
        assert seen() == 20
        clock.turn(2)
        until(lambda: seen() == 30)
        assert clock.calls == []  # nothing is to be looked at


def test_what_was_flushed_meanwhile_gives_the_next_block_its_own_time(clock):
    blocks: list[int] = []
    writer = Writer(lambda block: blocks.append(len(block)), COLUMNS, 1, clock=clock)
    add(writer, 1)
    clock.turn(SEGMENT_SECONDS / 2)
    writer.flush()
    add(writer, 2)
    clock.turn(SEGMENT_SECONDS * 0.75)  # a block of the first entry would be older than it may be
    assert blocks == [1]
    assert len(clock.calls) == 1
    clock.turn(SEGMENT_SECONDS * 0.25)
    until(lambda: blocks == [1, 1])
    writer.close()
    assert clock.calls == []


def test_a_block_waits_for_the_one_before_it(clock):
    gate, blocks = threading.Event(), []

    def append(block: Any) -> None:
        gate.wait(60)
        blocks.append(len(block))

    writer = Writer(append, COLUMNS, 1, clock=clock)
    add(writer, 1)
    clock.turn(SEGMENT_SECONDS)
    add(writer, 2)
    clock.turn(SEGMENT_SECONDS + 5)  # returns, though the storage is slow
    assert len(writer) == 2
    gate.set()
    until(lambda: blocks == [1])
    until(lambda: clock.turn(1.0) or blocks == [1, 1])
    writer.close()


def test_a_failure_is_told_to_whoever_puts_and_nothing_is_lost(clock):
    full, blocks = [True], []

    def append(block: Any) -> None:
        if full[0]:
            raise OutOfSpaceError("full")
        blocks.append(len(block))

    writer = Writer(append, COLUMNS, 1, clock=clock)
    add(writer, 1)
    clock.turn(SEGMENT_SECONDS)
    add(writer, 2)
    clock.turn(10 * SEGMENT_SECONDS)
    with pytest.raises(OutOfSpaceError):
        add(writer, 3)
    full[0] = False
    writer.close()
    assert blocks == [1, 1]


def test_a_writer_that_nobody_has_is_not_kept():
    """By the real clock: neither is a process kept from ending."""
    writer = Writer(lambda block: None, COLUMNS, 1)
    add(writer, 1)
    gone = weakref.ref(writer)
    watching = [thread for thread in threading.enumerate() if thread.name == "actcache-clock"]
    assert watching
    assert all(thread.daemon for thread in watching)
    del writer
    gc.collect()
    assert gone() is None


def test_an_interrupt_while_it_closes_loses_nothing(clock):
    """It ends a wait; both blocks are published all the same."""
    blocks: list[int] = []
    interrupts = iter([True])
    writer = Writer(lambda block: blocks.append(len(block)), COLUMNS, 1, clock=clock, segment_bytes=48)
    settle = writer._finish_publishing

    def interrupted() -> None:
        if next(interrupts, False):
            raise KeyboardInterrupt
        settle()

    add(writer, 1)
    add(writer, 2)
    writer._finish_publishing = interrupted
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert blocks == [1, 1]
