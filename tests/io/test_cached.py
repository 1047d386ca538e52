"""A property that is computed once."""

from __future__ import annotations

import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import actcache
from actcache.io.cached import cached_property


class Thing:
    computing, go_on = threading.Event(), threading.Event()

    def __init__(self, slow=False):
        self.slow, self.times = slow, 0

    @cached_property
    def value(self):
        """What it is."""
        self.times += 1
        if self.slow:
            self.computing.set()
            self.go_on.wait(60)
        return [self.times]


def test_it_is_computed_once():
    thing = Thing()
    assert thing.value is thing.value
    assert thing.value == [1]
    assert Thing.value.__doc__ == "What it is."
    del thing.value
    assert thing.value == [2]


def test_threads_get_one_value():
    thing = Thing()
    with ThreadPoolExecutor(8) as pool:
        assert len({id(value) for value in pool.map(lambda _: thing.value, range(100))}) == 1


def test_a_child_that_is_forked_while_it_is_computed_does_not_wait():
    thread = threading.Thread(target=lambda: Thing(slow=True).value)
    thread.start()
    try:
        assert Thing.computing.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if Thing().value == [1] else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        Thing.go_on.set()
        thread.join()


def test_nobody_uses_the_one_that_locks():
    root = Path(actcache.__file__).parent
    sources = [*root.rglob("*.py"), *(root.parents[1] / "backends").rglob("*.py")]
    found = re.compile(r"functools\.cached_property$|from functools import .*cached_property", re.MULTILINE)
    assert [path for path in sources if path.name != "cached.py" and found.search(path.read_text())] == []
