"""The gate that every transaction of the process goes through.

Resizing a map under a live transaction, and closing an environment in a fork's child while the parent had one, are the
two ways to die in LMDB. So transactions enter a gate, and whoever resizes or forks waits until nobody is inside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class ReadersWriterLock:
    """Lets any number of threads in, or one alone. Not reentrant: nobody may enter twice, or be alone inside."""

    def __init__(self) -> None:
        self._condition = threading.Condition(threading.Lock())
        self._inside = 0
        self._shut = False

    def enter(self) -> None:
        with self._condition:
            while self._shut:
                self._condition.wait()
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            if not self._inside:
                self._condition.notify_all()

    def shut(self, seconds: float | None = None) -> bool:
        """Keep everybody out and wait until nobody is inside; return False, having opened again, when time is up."""
        began = time.monotonic()
        with self._condition:
            if not self._condition.wait_for(lambda: not self._shut, seconds):
                return False
            self._shut = True
            left = None if seconds is None else max(0.0, began + seconds - time.monotonic())
            if not self._condition.wait_for(lambda: not self._inside, left):
                self._shut = False
                self._condition.notify_all()
            return self._shut

    def open(self) -> None:
        """Let others in again after ``shut``."""
        with self._condition:
            self._shut = False
            self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.shut()
        try:
            yield
        finally:
            self.open()
