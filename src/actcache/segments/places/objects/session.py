"""A client and the threads that use it, made anew in every process: neither survives a fork.

What may succeed a moment later is repeated: exponential backoff with full jitter, bounded in time.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, TypeVar

from actcache.errors import ClosedError, StorageIOError
from actcache.io.metrics import OBJECTS
from actcache.segments.places.objects.client import (
    Body,
    Client,
    Data,
    ObjectExistsError,
    ObjectNotFoundError,
    TransientError,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")

IN_FLIGHT = 32  # requests at a time
_CLOSE_SECONDS = 5.0
_FIRST_SECONDS = 0.1  # the most that the first pause lasts; the next ones' limit doubles
_LONGEST_SECONDS = 8.0


def _repeated(method: str) -> Callable[..., Any]:
    """Return a method that calls the wrapped client's until it succeeds."""

    def call(self: Retrying, *args: Any, **options: Any) -> Any:
        answer = self.run(lambda: getattr(self.wrapped, method)(*args, **options), operation=method)
        if isinstance(answer, Body):
            OBJECTS.add(method, received=len(answer.data))
        return answer

    return call


class Retrying(Client):
    """Wraps a client. A write whose answer was lost is looked for on the store before it is repeated. Thread-safe.

    No attempt begins more than ``seconds`` after the first one.
    """

    def __init__(self, client: Client, seconds: float) -> None:
        self.where, self.multipart = client.where, client.multipart
        self.wrapped, self._seconds = client, seconds
        self._closed = threading.Event()

    def run(
        self, attempt: Callable[[], T], lost: Callable[[], T | None] = lambda: None, *, operation: str = "other"
    ) -> T:
        """Return what ``attempt`` returns in the end; after a failure ``lost`` tells what it has done nevertheless."""
        begin = time.monotonic()
        try:
            answer = self._run(attempt, lost, operation, begin)
        finally:
            OBJECTS.add(operation, time=time.monotonic() - begin)
        OBJECTS.add(operation, requests=1)
        return answer

    def _run(self, attempt: Callable[[], T], lost: Callable[[], T | None], operation: str, begin: float) -> T:
        count = 0
        while True:
            if self._closed.is_set():
                raise ClosedError(f"{self.where} was closed")
            try:
                done = lost() if count else None
                return attempt() if done is None else done
            except TransientError as error:
                pause = random.uniform(0, min(_LONGEST_SECONDS, _FIRST_SECONDS * 2**count))
                count += 1
                elapsed = time.monotonic() - begin
                OBJECTS.add(operation, failures=1)
                logger.debug(
                    "a request failed: %s", error, extra={"operation": operation, "attempt": count, "store": self.where}
                )
                if elapsed + pause > self._seconds:
                    raise StorageIOError(
                        f"{error} (tried {count} times in {elapsed:.0f} s): check the network and the store, "
                        "then do the same again"
                    ) from error
            self._closed.wait(pause)

    get, head, listing, put_file, begin = map(_repeated, ("get", "head", "listing", "put_file", "begin"))
    uploads, copy, remove, check_bucket = map(_repeated, ("uploads", "copy", "remove", "check_bucket"))

    def part(self, key: str, upload: str, number: int, data: Data) -> str:
        etag = self.run(lambda: self.wrapped.part(key, upload, number, data), operation="part")
        OBJECTS.add("part", sent=len(data))
        return etag

    def put(self, key: str, data: Data, token: str, *, create: bool) -> None:
        attempts = 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self.wrapped.put(key, data, token, create=create)
            except ObjectExistsError:
                # An attempt that seemed to fail may have been the one that made it.
                if not self._wrote(key, len(data), token) and not (attempts > 1 and self._holds(key, data)):
                    raise
            return True

        self.run(attempt, lambda: self._wrote(key, len(data), token) or None, operation="put")
        OBJECTS.add("put", sent=len(data))

    def complete(self, key: str, upload: str, etags: Sequence[str], token: str, *, create: bool) -> None:
        def attempt() -> bool:
            try:
                self.wrapped.complete(key, upload, etags, token, create=create)
            except (ObjectNotFoundError, ObjectExistsError) as error:  # the upload ended: well, or by another's hand
                if not self._wrote(key, None, token):
                    if isinstance(error, ObjectExistsError):
                        raise
                    raise StorageIOError(
                        f"the upload of {self.where}/{key} was aborted by somebody else; do the same again"
                    ) from None
            return True

        self.run(attempt, lambda: self._wrote(key, None, token) or None, operation="complete")

    def _wrote(self, key: str, size: int | None, token: str) -> bool:
        """Return whether the object is there and is ours."""
        try:
            head = self.wrapped.head(key)
        except ObjectNotFoundError:
            return False
        return head.token is not None and secrets.compare_digest(head.token, token) and size in (None, head.size)

    def _holds(self, key: str, data: Data) -> bool:
        """Return whether the object has these bytes, where the store keeps no tokens that would tell whose it is."""
        try:
            if self.wrapped.head(key).token is not None:
                return False
            body = self.wrapped.get(key, 0, len(data) + 1)
        except ObjectNotFoundError:
            return False
        return body.size == len(data) and bytes(body.data) == bytes(data)

    def abort(self, key: str, upload: str) -> None:
        with suppress(ObjectNotFoundError):
            self.run(lambda: self.wrapped.abort(key, upload), operation="abort")

    def abandon(self) -> None:
        self.wrapped.abandon()

    def stop(self) -> None:
        """Have calls that wait for their next attempt end with ``ClosedError``."""
        self._closed.set()

    def close(self) -> None:
        self.stop()
        self.wrapped.close()


# --- clients and forks ----------------------------------------------------------------------------------------------

_LIVE: weakref.WeakSet[Client] = weakref.WeakSet()
_INHERITED: list[Client] = []  # clients of the parent: what they hold must not be closed here, so it is kept


def _after_fork() -> None:
    for client in list(_LIVE):
        _INHERITED.append(client)
        client.abandon()
    _LIVE.clear()


os.register_at_fork(after_in_child=_after_fork)


class Session:
    """Has one client a process, made by ``connect``, and its threads. Thread-safe; usable after a fork."""

    def __init__(self, where: str, connect: Callable[[], Client], retry_seconds: float) -> None:
        self.where, self._connect, self._seconds, self._closed = where, connect, retry_seconds, False
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._made: Retrying | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: set[Future[object]] = set()

    def client(self) -> Client:
        """Return the client of this process. Raises ``ClosedError``."""
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
