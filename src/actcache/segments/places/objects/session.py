"""A client and the threads that use it, made anew in every process: neither survives a fork."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from actcache.errors import ClosedError
from actcache.segments.places.objects.client import Client
from actcache.segments.places.objects.retry import Retrying

T = TypeVar("T")

IN_FLIGHT = 32  # requests at a time
_CLOSE_SECONDS = 5.0


_LIVE: weakref.WeakSet[Client] = weakref.WeakSet()
_INHERITED: list[Client] = []  # clients of the parent: what they hold must not be closed here, so it is kept


def _after_fork() -> None:
    for client in list(_LIVE):
        _INHERITED.append(client)
        client.abandon()
    _LIVE.clear()


os.register_at_fork(after_in_child=_after_fork)


class ProcessLock:
    """A lock that is free after a fork, whoever held it before: that thread is not there any more."""

    def __init__(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():  # a fork has one thread
            self._lock, self._pid = threading.Lock(), os.getpid()
        self._lock.acquire()

    def __exit__(self, *failure: object) -> None:
        self._lock.release()


class Session:
    """Thread-safe; usable after a fork.

    Args:
        connect: makes a client.
        retry_seconds: see ``Retrying``.
    """

    def __init__(self, where: str, connect: Callable[[], Client], retry_seconds: float) -> None:
        self.where = where
        self._connect = connect
        self._seconds = retry_seconds
        self._closed = False
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._made: Retrying | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[object]] = set()

    def client(self) -> Retrying:
        """Return the client of this process.

        Raises:
            ClosedError: the session was closed.
        """
        if self._pid != os.getpid():  # a fork has one thread, and a lock that another one held stays locked for ever
            self._forget()
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.where} was closed")
            if self._made is None:
                self._made = Retrying(self._connect(), self._seconds)
                _LIVE.add(self._made)
            return self._made

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Have a thread do a job; not more than ``IN_FLIGHT`` are done at a time."""
        self.client()
        with self._lock:
            if self._closed:
                raise ClosedError(f"{self.where} was closed")
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="actcache-fetch")
            future = self._pool.submit(job)
            self._running.add(future)  # type: ignore[arg-type]
        future.add_done_callback(self._running.discard)
        return future

    def close(self) -> None:
        """End the threads and connections; within a few seconds, whatever the network does."""
        if self._pid != os.getpid():
            self._closed = True
            return
        with self._lock:
            self._closed = True
            pool, self._pool, made, self._made = self._pool, None, self._made, None
        if made is not None:
            made.stop()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
            wait(list(self._running), timeout=_CLOSE_SECONDS)
        if made is not None:
            made.close()
