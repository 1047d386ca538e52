"""The lock that every transaction of the process shares.

Resizing a map under a live transaction, and closing an environment in a fork's child while the parent had one, are the
two ways to die in LMDB. So transactions share a lock, and whoever resizes or forks has it alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Shared by any number of threads, or held by one alone, for whom new ones wait. Not reentrant."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._sharing = 0
        self._exclusive = False

    def acquire_shared(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._exclusive)
            self._sharing += 1

    def release_shared(self) -> None:
        with self._condition:
            self._sharing -= 1
            if not self._sharing:
                self._condition.notify_all()

    def acquire_exclusive(self, seconds: float | None = None) -> bool:
        """Keep new ones out and wait until nobody shares it; return False, having let go, when time is up."""
        began = time.monotonic()
        with self._condition:
            if not self._condition.wait_for(lambda: not self._exclusive, seconds):
                return False
            self._exclusive = True
            left = None if seconds is None else max(0.0, began + seconds - time.monotonic())
            if not self._condition.wait_for(lambda: not self._sharing, left):
                self._exclusive = False
                self._condition.notify_all()
            return self._exclusive

    def release_exclusive(self) -> None:
        with self._condition:
            self._exclusive = False
            self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self.acquire_exclusive()
        try:
            yield
        finally:
            self.release_exclusive()
